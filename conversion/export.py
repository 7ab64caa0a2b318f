"""One call from weights to what a phone loads: `<name>.litertlm`, and of a run `<name>.safetensors` beside it.

Weights come from a checkpoint or, for measurements, from a seed, one tensor at a time. Files are made in a folder
aside, read back against their source, and renamed at the end: after a refusal or a full disk earlier files are as
they were.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from conversion import kernel
from conversion import weights as _weights
from conversion.checkpoint import open_checkpoint
from conversion.litert import FORMS, PREFILL
from conversion.memory import memory
from conversion.outputs import free, writing
from conversion.weights import Weights
from moe_jax.config import ModelConfig
from moe_jax.data import corpus
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import AnyPath
from moe_jax.train.checksums import digest

_MERGES = 32_768  # entries that the embedded corpus gives to the tokenizer of random weights
Say = Callable[[str], object]


def export(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    prefill: Sequence[int] = (),
    experts: str = "sparse",
    quantize_float: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint of a run (the last, or that of `step`) as `output`; what was written, for a report.

    `context` is the most tokens of prompt and answer (default: the length that the run trained on), `prefill` the
    lengths of the prefill signatures (default: what of PREFILL is at most a quarter of the context), `experts` one
    of FORMS, of which dense only serves to compare speed. `quantize_float` takes a run without quantisation too.

    Raises:
        UserError: no readable checkpoint, one without QAT, a tokenizer that is not the checkpoint's, lengths that
            cannot be, an output that exists or cannot be written; existing files stay as they were.
    """
    begun, output = time.monotonic(), free(output, ".litertlm", overwrite)
    tensors = free(output.with_suffix(".safetensors"), ".safetensors", overwrite)
    source = open_checkpoint(run_dir, step, tokenizer)
    config, group = source.run.model, source.group(quantize_float)
    context = context or source.run.data.seq_len
    lengths = _lengths(config, context, prefill, experts)

    def quantise(folder: Path) -> Weights:
        say("writing INT4 codes and scales")
        return _weights.through_file(source.parameters, config, group, folder / tensors.name)

    result = _write(quantise, source.tokenizer_file, output, context, lengths, experts, say)
    return result | {"safetensors": str(tensors), "seconds": time.monotonic() - begun}


def export_random(
    config: ModelConfig,
    output: str | Path,
    *,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    prefill: Sequence[int] = (),
    experts: str = "sparse",
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write random weights of any model as `output`, for measurements of size and speed; options as of `export`.

    Without `tokenizer` one is made of the embedded corpus and filled up to the model's vocabulary.
    """
    context = context or config.max_position_embeddings
    lengths = _lengths(config, context, prefill, experts)
    begun, output = time.monotonic(), free(output, ".litertlm", overwrite)
    if tokenizer is not None:
        Tokenizer.load(tokenizer).require(config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(tokenizer or Path(folder, "tokenizer.json"))
        if tokenizer is None:
            say("learning a tokenizer")
            file.write_text(_tokenizer(config.vocab_size))
        result = _write(lambda _: _weights.random(config, seed), file, output, context, lengths, experts, say)
    return result | {"seconds": time.monotonic() - begun}


def _lengths(config: ModelConfig, context: int, prefill: Sequence[int], experts: str) -> list[int]:
    """The lengths of prefill calls; UserError for what no file can be made of, before there is any work."""
    if not 0 < context <= (limit := config.max_position_embeddings):
        raise UserError(f"context {context} is not within 1 and the model's {limit} positions")
    if experts not in FORMS:
        raise UserError(f"experts is {experts!r}; choose one of {', '.join(FORMS)}")
    if experts == "kernel":
        kernel.require_room(config)
    if max(prefill, default=0) > context:
        raise UserError(f"--prefill {max(prefill)} is more than the context of {context}; ask for at most that")
    return sorted(set(prefill or [n for n in PREFILL if 4 * n <= context])) or [min(*PREFILL, context)]


def _write(
    source: Callable[[Path], Weights],
    tokenizer: AnyPath,
    output: Path,
    context: int,
    lengths: Sequence[int],
    experts: str,
    say: Say,
) -> dict[str, Any]:
    """Write the weights that `source` makes, with what else it leaves in the folder that it is given."""
    from conversion import readback  # slow to import, as what lowers is, and not needed to refuse
    from conversion.litert import bundle, lower

    with writing(output):
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
            if experts != "dense":
                say("reading all codes and scales back")
            parts, known = readback.sections(bundled), Codes(weights)
            # Experts side by side, which only serve to compare with, have no names in the file.
            found = readback.Findings() if experts == "dense" else readback.compare(parts.tflite, known, output)
            if found.mismatches:
                raise UserError(f"{output} does not hold its source ({found.reports[0]}); check the disk")
            sha256 = digest(bundled)
            for path in sorted(aside.iterdir(), key=lambda path: path == bundled):
                os.replace(path, output.parent / path.name)
    return {
        "bundle": str(output),
        "bytes": sizes[0],
        "tflite_bytes": sizes[1],
        "context": context,
        "prefill": lengths,
        "experts": experts,
        "sha256": sha256,
        **({} if experts == "dense" else {"codes_checked": found.codes_checked, "mismatches": found.mismatches}),
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


def _tokenizer(vocab_size: int) -> str:
    """A tokenizer.json of the embedded corpus; entries that no text gives stand for what the corpus lacks."""
    learnt = Tokenizer.train(corpus.stdlib_texts(False), min(_MERGES, vocab_size))
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        learnt.save(file.name)
        described = json.loads(Path(file.name).read_text("utf-8"))
    described["model"]["vocab"] |= {f"<|{i}|>": i for i in range(learnt.vocab_size, vocab_size)}
    return json.dumps(described)
