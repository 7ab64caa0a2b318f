"""`executorch`: the command for .pte files. Imports JAX, torch and ExecuTorch only when it runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conversion.command_options import add_checkpoint, add_source, require_meaning, say
from conversion.memory import memory
from conversion.outputs import free, writing
from moe_jax.command_line import add_command, add_json, at_least
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location, write_bytes

if TYPE_CHECKING:
    from conversion.weights import Weights

PREFILL = 512  # the most tokens that one call takes by default; what a call needs of memory grows with it
Say = Callable[[str], object]


def add_commands(commands: Any, load: Callable[[str], RunConfig]) -> None:
    """Add it to the parser's commands; `load` finds a registered config."""
    sub = add_command(
        commands,
        "executorch",
        partial(_executorch, load=load),
        "write a run's checkpoint as a .pte file that stock ExecuTorch runs, codes and scales unchanged",
        "runs/s/qat s.pte",
        "mobilemoe_s s.pte --random-weights --seed 0 --context 2048",
    )
    add_source(sub)
    sub.add_argument("output", help="the file, ending in .pte; the tokenizer goes beside it")
    add_checkpoint(sub, ", none for random weights")
    sub.add_argument("--context", type=at_least(2), help="most tokens of prompt and answer (default: as trained)")
    sub.add_argument("--prefill", type=at_least(1), help=f"most tokens of one call (default {PREFILL})")
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_json(sub)


def export_run(
    run_dir: str | Path,
    output: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    prefill: int | None = None,
    quantize_float: bool = False,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write the checkpoint of a run (the last, or that of `step`) as `output`; what was written, for a report.

    `<name>.tokenizer.json` goes beside it. Options and errors as `conversion.export.export`, and a UserError for a
    model that ExecuTorch's experts do not know.
    """
    from conversion.checkpoint import open_checkpoint
    from conversion.weights import through_file

    output = _free(output, overwrite)
    source = open_checkpoint(run_dir, step, tokenizer)
    config, group = source.run.model, source.group(quantize_float)
    _require_expressible(config)

    def quantise(folder: Path) -> Weights:
        say("quantising")
        return through_file(source.parameters, config, group, folder / "codes.safetensors")

    context = context or source.run.data.seq_len
    return _write(quantise, config, output, context, prefill, tokenizer=source.tokenizer_file, say=say)


def export_random(
    config: ModelConfig,
    output: str | Path,
    *,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    prefill: int | None = None,
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write random weights of any model as `output`, those that a bundle of the same seed has; see `export_run`."""
    from conversion.weights import random
    from moe_jax.data.tokenizer import Tokenizer

    output = _free(output, overwrite)
    if tokenizer is not None:
        Tokenizer.load(tokenizer).require(config.vocab_size)
    _require_expressible(config)
    context = context or config.max_position_embeddings
    return _write(lambda _: random(config, seed), config, output, context, prefill, tokenizer=tokenizer, say=say)


def _write(
    source: Callable[[Path], Weights],
    config: ModelConfig,
    output: Path,
    context: int,
    prefill: int | None,
    *,
    tokenizer: AnyPath | None,
    say: Say,
) -> dict[str, Any]:
    from conversion.executorch import lower, readback
    from moe_jax.train.checksums import digest

    if not 2 <= context <= (limit := config.max_position_embeddings):
        raise UserError(f"context {context} is not within 2 and the model's {limit} positions")
    if (prefill or 0) > context:
        raise UserError(f"--prefill {prefill} is more than the context of {context}; ask for at most that")
    begun, prefill = time.monotonic(), prefill or min(PREFILL, context)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
            weights, aside = source(Path(folder)), Path(folder, output.name)
            say("tracing and lowering, some minutes at real size")
            lower.export_pte(weights, aside, context, prefill, _metadata(config, context, prefill, tokenizer))
            say("reading all codes and scales back")
            found = readback.compare(aside, weights)
            if found.mismatches:
                raise UserError(f"{output} does not hold its source ({found.reports[0]}); check the disk")
            sha256, size = digest(aside), aside.stat().st_size
            if tokenizer is None:
                _tokenizer_of(output).unlink(missing_ok=True)
            else:
                write_bytes(_tokenizer_of(output), location(tokenizer).read_bytes())
            aside.replace(output)
    return {
        "file": str(output),
        "bytes": size,
        "context": context,
        "prefill": prefill,
        "sha256": sha256,
        "codes_checked": found.codes_checked,
        "mismatches": found.mismatches,
        "file_gb": size / 1e9,
        "peak_rss_gb": memory()["peak_rss_gb"],
        "seconds": time.monotonic() - begun,
    }


def _metadata(config: ModelConfig, context: int, prefill: int, tokenizer: AnyPath | None) -> dict[str, Any]:
    """What ExecuTorch's LLM runner asks a file (`extension/llm/runner/constants.h`)."""
    from moe_jax.data.tokenizer import Tokenizer

    known: dict[str, Any] = {
        "get_max_seq_len": prefill,
        "get_max_context_len": context,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": prefill > 1,
    }
    if tokenizer is not None:
        words = Tokenizer.load(tokenizer)
        known |= {"get_bos_id": words.bos, "get_eos_ids": [words.end, words.eot]}
    return known


def _require_expressible(config: ModelConfig) -> None:
    if find_spec("executorch") is None:
        raise UserError("ExecuTorch's package is not installed; pip install -r requirements/executorch.txt")
    from conversion.executorch.program import require_expressible

    require_expressible(config)


def _free(output: str | Path, overwrite: bool) -> Path:
    """The path of the file; its tokenizer's must be free too, or an app would take another's for its own."""
    path = free(output, ".pte", overwrite)
    free(_tokenizer_of(path), ".json", overwrite)
    return path


def _tokenizer_of(output: Path) -> Path:
    return output.with_name(f"{output.stem}.tokenizer.json")


def _executorch(arguments: Any, load: Callable[[str], RunConfig]) -> dict[str, Any]:
    require_meaning(arguments)
    options = {name: getattr(arguments, name) for name in ("tokenizer", "context", "prefill", "overwrite")}
    if arguments.random_weights:
        model = load(arguments.source).model
        result = export_random(model, arguments.output, seed=arguments.seed, **options, say=say)
    else:
        options |= {name: getattr(arguments, name) for name in ("step", "quantize_float")}
        result = export_run(arguments.source, arguments.output, **options, say=say)
    codes = f"{result['codes_checked']:,} codes read back"
    print(f"file {result['file']}: {result['file_gb']:.3f} GB, for ExecuTorch; {codes}, none differs")
    return result
