"""`python -m conversion`: make, check, measure and use bundles. Imports torch and LiteRT only where needed."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from conversion import bench_commands, gguf, hf
from conversion.command_options import (
    add_checkpoint,
    add_source,
    add_threads,
    lengths,
    options,
    require_meaning,
    say,
)
from conversion.executorch import command as executorch
from conversion.litert import FORMS
from moe_jax.command_line import (
    add_command,
    add_json,
    at_least,
    guarded,
    heed_interrupts,
    leave,
    make_parser,
    parse,
)
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import write_json

_EXAMPLES = """\
From the run folder of a QAT stage to a model that the stock LiteRT-LM engine runs:

  python -m conversion export runs/demo/qat runs/demo/model.litertlm      INT4 bundle, safetensors beside it
  python -m conversion verify runs/demo/qat runs/demo/model.litertlm      was anything lost on the way?
  python -m conversion chat runs/demo/model.litertlm --prompt 'What does os.getcwd do?'

What the sparse experts are worth, against the same model with all experts computed on every token:

  python -m conversion export runs/demo/qat runs/demo/dense.litertlm --experts dense
  python -m conversion bench runs/demo/model.litertlm --against runs/demo/dense.litertlm --json speed.json

From the released folders to a run that training goes on from, and to other engines:

  python -m conversion import downloads/MobileMoE-S-SFT runs/s/sft
  python -m conversion export-hf runs/s/qat out/s-qat --format int4-g32 --allow-requantization
  python -m conversion gguf runs/s/qat s.gguf
  python -m conversion executorch runs/s/qat s.pte

Exit status: 0, 1 if verify finds that something differs, 2 after one sentence on what to mend.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = parse(_parser(), argv)
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it is announced
    # torch, torchao and the converter speak of their own insides; errors still come through as exceptions.
    warnings.simplefilter("ignore")
    for name in ("torchao", "torch.utils._pytree", "torch._export", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return guarded(_run, arguments)


def _run(arguments: Any) -> int:
    """Call the command and write what it found; 1 where that is a failure."""
    result = arguments.command(arguments)
    if path := getattr(arguments, "json", None):
        write_json(path, result)
    return 1 if (result or {}).get("failed") else 0


def _parser() -> argparse.ArgumentParser:
    parser, commands = make_parser("python -m conversion", "From a checkpoint to a phone.", _EXAMPLES)
    add = partial(add_command, commands)

    sub = add(
        "export",
        _export,
        "write a run's checkpoint as a .litertlm bundle and as .safetensors, codes and scales unchanged",
        "runs/demo/qat model.litertlm --context 512 --prefill 16,128",
        "mobilemoe_s --random-weights --seed 0 --out bundles --json export.json",
    )
    add_source(sub)
    sub.add_argument("output", nargs="?", help="the bundle, ending in .litertlm")
    sub.add_argument("--out", metavar="DIR", help="instead of a name: the folder for <last part of run>.litertlm")
    add_checkpoint(sub)
    sub.add_argument("--context", type=at_least(1), help="most tokens of prompt and answer (default: as trained)")
    sub.add_argument(
        "--prefill",
        type=lengths,
        default=(),
        metavar="N,N",
        help="tokens that one call can take in, into which prompts are cut (default: what of 16, 128 and 512 is "
        "within a quarter of the context)",
    )
    sub.add_argument(
        "--experts",
        choices=FORMS,
        default="sparse",
        help="default sparse, on stock ops; kernel has custom ops, for runtimes with conversion/kernel; "
        "dense computes all of them on every token, to compare with",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace existing files")
    add_json(sub)

    sub = add(
        "verify",
        _verify,
        "climb the parity ladder: file against checkpoint, JAX, PyTorch, .tflite, and the engine on held-out text",
        "runs/demo/qat model.litertlm --json parity.json",
    )
    sub.add_argument("run_dir", metavar="run", help="run folder that was exported")
    sub.add_argument("bundle", help="what it was exported to")
    add_checkpoint(sub)
    sub.add_argument("--texts", type=at_least(1), default=16, help="held-out pieces that the engine reads")
    sub.add_argument("--tokens", type=at_least(1), default=128, help="tokens of each")
    sub.add_argument("--probes", type=at_least(1), default=16, help="next tokens asked for in each")
    sub.add_argument(
        "--arm",
        nargs="?",
        const="cortex-a76",
        metavar="CPU",
        help="ask the engine's Arm build too, on a processor that qemu-aarch64 emulates (default cortex-a76; "
        "cortex-a710 has i8mm); needs QEMU 10 and a cross compiler",
    )
    add_threads(sub)
    add_json(sub)

    hf.add_commands(commands)
    gguf.add_commands(commands, _config)
    executorch.add_commands(commands, _config)
    bench_commands.add_commands(commands, _config)
    return parser


def _export(arguments: Any) -> dict[str, Any]:
    from conversion.export import export, export_random

    require_meaning(arguments)
    given = options(arguments)
    source, output, folder, seed = (given.pop(name) for name in ("source", "output", "out", "seed"))
    if (output is None) == (folder is None):
        raise UserError("say where to: either a name that ends in .litertlm or --out with a folder")
    if folder is not None:
        output = Path(folder, f"{os.path.basename(os.path.abspath(source))}.litertlm")
    if given.pop("random_weights"):
        given = {k: v for k, v in given.items() if k not in ("step", "quantize_float")}
        result = export_random(_config(source).model, output, seed=seed, **given, say=say)
    else:
        result = export(source, output, **given, say=say)
    _table(result)
    return result


def _verify(arguments: Any) -> dict[str, Any]:
    from conversion.verify import BOUNDS, verify

    result = verify(**options(arguments), say=say)
    _table(result["export"] | result["parity"], BOUNDS)
    for sentence in result["left_out"]:
        print(f"left out: {sentence}", file=sys.stderr)
    for sentence in result["failed"][:20]:
        print(f"failed: {sentence}", file=sys.stderr)
    if (more := len(result["failed"]) - 20) > 0:
        print(f"and {more} more, all of them in --json", file=sys.stderr)
    return result


def _config(name: str) -> RunConfig:
    import configs

    return configs.load(name)


def _table(values: dict[str, Any], bounds: dict[str, tuple[float, float]] | None = None) -> None:
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else f"{value}"
        least, most = (bounds or {}).get(name, (None, None))
        print(f"{name:30} {shown:>14}" + ("" if least is None else f"   {least:g} .. {most:g}"))


if __name__ == "__main__":
    # As an exception, so that half-written files of gigabytes are removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    heed_interrupts()
    leave(main())
