"""One call from weights to what a phone loads: `<name>.litertlm`, and of a run `<name>.safetensors` beside it.

Weights come from a checkpoint or, for measurements, from a seed, one tensor at a time. Files are made in a folder
aside, read back against their source, and renamed at the end: after a refusal or a full disk earlier files are as
they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from conversion import weights as _weights
from conversion.litert import FORMS, PREFILL
from conversion.memory import memory
from conversion.outputs import free
from conversion.weights import Weights
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.data import corpus
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location

_MERGES = 32_768  # entries that the embedded corpus gives to the tokenizer of random weights
Say = Callable[[str], object]


def export(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    quantize_float: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """Write the checkpoint of a run (the last, or that of `step`) as `output`; what was written, for a report.

    `context` is the most tokens of prompt and answer (default: the length that the run trained on),
    `quantize_float` takes a run without quantisation too; other options as `write`.

    Raises:
        UserError: no readable checkpoint, one without QAT, a tokenizer that is not the checkpoint's, lengths that
            cannot be, an output that exists or cannot be written; existing files stay as they were.
    """
    begun, output = time.monotonic(), free(output, ".litertlm", overwrite)
    tensors = free(output.with_suffix(".safetensors"), ".safetensors", overwrite)
    run, parameters = open_checkpoint(run_dir, step)
    group = group_of(run, run_dir, quantize_float)
    file, _ = matching_tokenizer(run_dir, run, tokenizer, step)

    def quantise(folder: Path) -> Weights:
        say("writing INT4 codes and scales")
        arrays = _weights.quantised(parameters, run.model, group)
        _weights.write_safetensors(arrays, run.model, group, folder / tensors.name)
        return _weights.load_safetensors(folder / tensors.name)

    result = write(quantise, run.model, file, output, context or run.data.seq_len, say=say, **options)
    return result | {"safetensors": str(tensors), "seconds": time.monotonic() - begun}


def export_random(
    config: ModelConfig,
    output: str | Path,
    *,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    """Write random weights of any model as `output`, for measurements of size and speed.

    Without `tokenizer` one is made of the embedded corpus and filled up to the model's vocabulary.
    """
    begun, output = time.monotonic(), free(output, ".litertlm", overwrite)
    if tokenizer is not None:
        Tokenizer.load(tokenizer).require(config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(tokenizer or Path(folder, "tokenizer.json"))
        if tokenizer is None:
            say("learning a tokenizer")
            file.write_text(_tokenizer(config.vocab_size))
        context = context or config.max_position_embeddings
        result = write(lambda _: _weights.random(config, seed), config, file, output, context, say=say, **options)
    return result | {"seconds": time.monotonic() - begun}


def write(
    source: Callable[[Path], Weights],
    config: ModelConfig,
    tokenizer: AnyPath,
    output: Path,
    context: int,
    *,
    prefill: Sequence[int] = (),
    experts: str = "sparse",
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the weights of `config` that `source` makes, with what else it leaves in the folder that it is given.

    `prefill` are the lengths of the prefill signatures (by default what of PREFILL is at most a quarter of the
    context), `experts` is one of FORMS; dense ones only serve to compare speed.
    """
    if not 0 < context <= (limit := config.max_position_embeddings):
        raise UserError(f"context {context} is not within 1 and the model's {limit} positions")
    if experts not in FORMS:
        raise UserError(f"experts is {experts!r}; choose one of {', '.join(FORMS)}")
    if max(prefill, default=0) > context:
        raise UserError(f"--prefill {max(prefill)} is more than the context of {context}; ask for at most that")
    lengths = sorted(set(prefill or [n for n in PREFILL if 4 * n <= context])) or [min(*PREFILL, context)]

    from conversion import readback  # slow to import, as what lowers is, and not needed to refuse
    from conversion.litert import bundle, lower

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            aside = Path(folder)
            weights = source(aside)
            say(f"lowering to decode and prefill of {', '.join(map(str, lengths))} tokens")
            lowered, bundled = aside / "model.tflite", aside / output.name
            lower.export_tflite(weights, lowered, context, lengths, experts=experts, say=say)
            say("bundling with tokenizer and chat template")
            bundle.write_bundle(lowered, tokenizer, bundled, context)
            sizes = [path.stat().st_size for path in (bundled, lowered)]
            lowered.unlink()
            say("reading all codes and scales back")
            parts, known = readback.sections(bundled), Codes(weights)
            # Experts side by side, which only serve to compare with, have no names in the file.
            found = readback.Findings() if experts == "dense" else readback.compare(parts.tflite, known, output)
            if found.mismatches:
                raise UserError(f"{output} does not hold its source ({found.reports[0]}); check the disk")
            digest = _sha256(bundled)
            for path in sorted(aside.iterdir(), key=lambda path: path == bundled):
                os.replace(path, output.parent / path.name)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; free the disk or choose another"
        ) from error
    return {
        "bundle": str(output),
        "bytes": sizes[0],
        "tflite_bytes": sizes[1],
        "context": context,
        "prefill": lengths,
        "experts": experts,
        "sha256": digest,
        "codes_checked": found.codes_checked,
        "mismatches": found.mismatches,
        "file_gb": sizes[0] / 1e9,
        "peak_rss_gb": memory()["peak_rss_gb"],
    }


class Codes(Mapping):
    """Codes and scales of every INT4 tensor by name; those asked for last stay in memory."""

    def __init__(self, weights: Weights) -> None:
        self._names = weights.int4_names()
        self._get = lru_cache(2)(lambda name: (weights.int4(name).codes, weights.scales(name)))

    def __getitem__(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Stack:
    """A float32 parameter of a checkpoint, layers stacked, of which only the layers asked for are read."""

    def __init__(self, path: str, name: str) -> None:
        import tensorstore

        base = path if "://" in path else f"file://{path}"
        store = {"driver": "ocdbt", "base": f"{base}/model", "path": f"{name}/"}
        self._array = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
        self.shape = tuple(self._array.shape)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._array[layer].read().result()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array.read().result()


def open_checkpoint(run_dir: str | Path, step: int | None = None) -> tuple[RunConfig, dict[str, _Stack]]:
    """Config and parameters of a run's checkpoint, verified by its checksums; a layer is read when asked for."""
    from conversion import keymap
    from moe_jax.train.checkpoint import Checkpoints, checkpoint_path, config_of, verify

    path = checkpoint_path(run_dir, step)
    verify(path, model_only=True)
    run = config_of(path, Checkpoints(run_dir).metadata(step))
    try:
        return run, {name: _Stack(str(path), name) for name in keymap.jax_shapes(run.model)}
    except ValueError as error:
        raise UserError(f"checkpoint {path} lacks a parameter of its config ({error}); export another") from None


def load(
    run_dir: str | Path, step: int | None = None, quantize_float: bool = False
) -> tuple[RunConfig, dict[str, np.ndarray], Weights]:
    """Config, float32 parameters by path and INT4 weights of a run's checkpoint.

    Raises UserError for a run without QAT unless `quantize_float`: its weights were not trained for the grid.
    """
    from moe_jax.train.checkpoint import load_parameters

    run, parameters = load_parameters(run_dir, step)
    return run, parameters, _weights.from_parameters(parameters, run.model, group_of(run, run_dir, quantize_float))


def group_of(run: RunConfig, run_dir: str | Path, quantize_float: bool) -> int:
    """Weights that share a scale, 32 for a run without QAT; a UserError for such a run unless `quantize_float`."""
    if run.quant is None and not quantize_float:
        raise UserError(
            f"{run_dir} is a {run.stage} run without quantisation; export the folder of its QAT stage, "
            "or pass --quantize-float to round weights that were not trained for it"
        )
    return run.quant.weight_group_size if run.quant else 32


def matching_tokenizer(
    run_dir: str | Path, run: RunConfig, path: str | Path | None = None, step: int | None = None
) -> tuple[epath.Path, Tokenizer]:
    """File and tokenizer at `path`, by default the run's; UserError if the checkpoint was trained with another."""
    from moe_jax.train.checkpoint import Checkpoints

    file = location(path or Path(run_dir) / "tokenizer.json")
    found = Tokenizer.load(file)
    found.require(run.model.vocab_size, Checkpoints(run_dir).metadata(step)["tokenizer"])
    return file, found


def _tokenizer(vocab_size: int) -> str:
    """A tokenizer.json of the embedded corpus; entries that no text gives stand for what the corpus lacks."""
    learnt = Tokenizer.train(corpus.stdlib_texts(False), min(_MERGES, vocab_size))
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        learnt.save(file.name)
        described = json.loads(Path(file.name).read_text("utf-8"))
    described["model"]["vocab"] |= {f"<|{i}|>": i for i in range(learnt.vocab_size, vocab_size)}
    return json.dumps(described)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
