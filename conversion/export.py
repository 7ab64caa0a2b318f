"""One call from a run folder to what a phone loads: `<name>.litertlm` and beside it `<name>.safetensors`.

Both are made in a folder aside and renamed at the end, so a refusal or a full disk leaves earlier files as
they were.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from conversion import weights as _weights
from conversion.weights import Weights
from moe_jax.config import RunConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

PREFILL = (16, 128)


def export(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    prefill: Sequence[int] = PREFILL,
    experts: str = "sparse",
    quantize_float: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, int | str | list[int]]:
    """Write the checkpoint of a run (the last, or that of `step`) as `output`; what was written, for a report.

    `context` is the most tokens of prompt and answer (default: the length that the run trained on), `prefill` the
    lengths of the prefill signatures (those beyond the context are left out), `experts` sparse or dense (all of
    them computed on every token, only to compare speed), `quantize_float` takes a run without quantisation too.

    Raises:
        UserError: no readable checkpoint, one without QAT, a tokenizer that is not the checkpoint's, lengths that
            cannot be, an output that exists or cannot be written; existing files stay as they were.
    """
    output = Path(output)
    if output.suffix != ".litertlm":
        raise UserError(f"the output is {output.name!r}; end its name in .litertlm, for LiteRT-LM")
    if experts not in ("sparse", "dense"):
        raise UserError(f"experts is {experts!r}; choose sparse or dense")
    tensors = output.with_suffix(".safetensors")
    for path in (output, tensors):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; choose another output or pass --overwrite")
    run, _, weights = load(run_dir, step, quantize_float)
    file = Path(tokenizer or Path(run_dir) / "tokenizer.json")
    matching_tokenizer(run_dir, run, file, step)
    context = context or run.data.seq_len
    lengths = sorted({n for n in prefill if n <= context}) or [context]

    from conversion.litert import bundle, lower  # slow to import, and not needed to refuse

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            aside = Path(folder)
            say("writing INT4 codes and scales")
            _weights.save_safetensors(weights, aside / tensors.name)
            say(f"lowering to decode and prefill of {', '.join(map(str, lengths))} tokens")
            lowered = aside / "model.tflite"
            lower.export_tflite(weights, lowered, context, lengths, dense=experts == "dense")
            say("bundling with tokenizer and chat template")
            bundle.write_bundle(lowered, file, aside / output.name, context)
            sizes = {p: p.stat().st_size for p in (lowered, aside / output.name)}
            for path in (tensors, output):
                os.replace(aside / path.name, path)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; free the disk or choose another"
        ) from error
    return {
        "bundle": str(output),
        "bytes": sizes[aside / output.name],
        "tflite_bytes": sizes[lowered],
        "safetensors": str(tensors),
        "context": context,
        "prefill": lengths,
        "experts": experts,
    }


def load(
    run_dir: str | Path, step: int | None = None, quantize_float: bool = False
) -> tuple[RunConfig, dict[str, np.ndarray], Weights]:
    """Config, float32 parameters by path and INT4 weights of a run's checkpoint.

    Raises UserError for a run without QAT unless `quantize_float`: its weights were not trained for the grid.
    """
    from moe_jax.train.checkpoint import load_parameters

    run, parameters = load_parameters(run_dir, step)
    if run.quant is None and not quantize_float:
        raise UserError(
            f"{run_dir} is a {run.stage} run without quantisation; export the folder of its QAT stage, "
            "or pass --quantize-float to round weights that were not trained for it"
        )
    group = run.quant.weight_group_size if run.quant else 32
    return run, parameters, _weights.from_parameters(parameters, run.model, group)


def matching_tokenizer(run_dir: str | Path, run: RunConfig, file: Path, step: int | None = None) -> Tokenizer:
    """The tokenizer in `file`, if it is the one that the run's checkpoint was trained with, else UserError."""
    from moe_jax.train.checkpoint import Checkpoints

    found = Tokenizer.load(file)
    found.require(run.model.vocab_size, Checkpoints(run_dir).metadata(step)["tokenizer"])
    return found
