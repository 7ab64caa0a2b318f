"""`gguf`: the command for llama.cpp's format. Imports JAX only when it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conversion.command_options import add_checkpoint, add_source, require_meaning
from conversion.outputs import free, writing
from moe_jax.command_line import add_command, add_json
from moe_jax.config import ModelConfig, RunConfig

TYPES = ("q4_0", "f32")


def add_commands(commands: Any, load: Callable[[str], RunConfig]) -> None:
    """Add it to the parser's commands; `load` finds a registered config."""
    sub = add_command(
        commands,
        "gguf",
        partial(_gguf, load=load),
        "write a run's checkpoint as a .gguf file that stock llama.cpp runs, codes and scales unchanged",
        "runs/s/qat s.gguf",
        "mobilemoe_s s.gguf --random-weights --seed 0",
    )
    add_source(sub)
    sub.add_argument("output", help="the file, ending in .gguf")
    sub.add_argument(
        "--type", dest="kind", choices=TYPES, default="q4_0", help="f32 holds the same values, to compare with"
    )
    add_checkpoint(sub, ", none for random weights")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")
    add_json(sub)


def export_run(
    run_dir: str | Path,
    output: str | Path,
    *,
    kind: str = "q4_0",
    step: int | None = None,
    tokenizer: str | Path | None = None,
    quantize_float: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint of a run (the last, or that of `step`) as `output`; what was written, for a report.

    Raises UserError as `conversion.export.export` and `gguf_file.write_gguf` do; an existing file stays as it was.
    """
    from conversion import gguf_file, weights
    from conversion.checkpoint import open_checkpoint

    output = free(output, ".gguf", overwrite)
    source = open_checkpoint(run_dir, step, tokenizer)
    config, group, file = source.run.model, source.group(quantize_float), source.tokenizer_file
    gguf_file.words(config, file)  # refuses before minutes of work
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        # By way of a file, because each tensor is wanted at another time than it comes.
        codes = weights.through_file(source.parameters, config, group, Path(folder, "codes.safetensors"))
        return gguf_file.write_gguf(codes, output, file, kind=kind)


def export_random(
    config: ModelConfig,
    output: str | Path,
    *,
    kind: str = "q4_0",
    seed: int = 0,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write random weights of any model as `output`, those that a bundle of the same seed has; see `export_run`."""
    from conversion import gguf_file, weights

    path = free(output, ".gguf", overwrite)
    return gguf_file.write_gguf(weights.random(config, seed), path, tokenizer, kind=kind)


def _gguf(arguments: Any, load: Callable[[str], RunConfig]) -> dict[str, Any]:
    require_meaning(arguments)
    options = {name: getattr(arguments, name) for name in ("kind", "tokenizer", "overwrite")}
    if arguments.random_weights:
        model = load(arguments.source).model
        result = export_random(model, arguments.output, seed=arguments.seed, **options)
    else:
        options |= {name: getattr(arguments, name) for name in ("step", "quantize_float")}
        result = export_run(arguments.source, arguments.output, **options)
    print(f"file {result['file']}: {result['bytes'] / 1e9:.3f} GB, {result['type']}, for llama.cpp")
    return result
