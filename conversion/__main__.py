"""`python -m conversion`: make, check, measure and use bundles. Imports torch and LiteRT only where needed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax.__main__ import guarded
from moe_jax.files import write_json

_EXAMPLES = """\
From the run folder of a QAT stage to a model that the stock LiteRT-LM engine runs:

  python -m conversion export runs/demo/qat runs/demo/model.litertlm      INT4 bundle, safetensors beside it
  python -m conversion verify runs/demo/qat runs/demo/model.litertlm      was anything lost on the way?
  python -m conversion chat runs/demo/model.litertlm --prompt 'What does os.getcwd do?'

What the sparse experts are worth, against the same model with all experts computed on every token:

  python -m conversion export runs/demo/qat runs/demo/dense.litertlm --experts dense
  python -m conversion bench runs/demo/model.litertlm --dense runs/demo/dense.litertlm --json speed.json

Exit status: 0, 1 if verify finds that something differs, 2 after one sentence on what to mend.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # else it is announced
    # torch, torchao and the converter speak of their own insides; errors still come through as exceptions.
    warnings.simplefilter("ignore")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return guarded(arguments.command, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m conversion",
        description="From a checkpoint to a phone.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable, text: str, example: str) -> Any:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"Example:\n  python -m conversion {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    def add_checkpoint(sub: Any) -> None:
        sub.add_argument("--step", type=int, help="this checkpoint instead of the last")
        sub.add_argument("--tokenizer", metavar="PATH", help="default: the run's tokenizer.json")
        sub.add_argument("--quantize-float", action="store_true", help="accept a run that had no QAT stage")

    def add_threads(sub: Any) -> None:
        sub.add_argument("--threads", type=int, default=2, help="CPU threads of the engine")

    def add_json(sub: Any) -> None:
        sub.add_argument("--json", metavar="PATH", help="write the numbers here as well")

    sub = add(
        "export",
        _export,
        "write a run's checkpoint as a .litertlm bundle and as .safetensors, codes and scales unchanged",
        "runs/demo/qat model.litertlm --context 512 --prefill 16,128",
    )
    sub.add_argument("run_dir", metavar="run", help="run folder")
    sub.add_argument("output", help="the bundle, ending in .litertlm")
    add_checkpoint(sub)
    sub.add_argument("--context", type=int, help="most tokens of prompt and answer (default: as trained)")
    sub.add_argument(
        "--prefill",
        type=_lengths,
        default=(16, 128),
        metavar="N,N",
        help="tokens that one call can take in (default 16,128); a prompt is cut into these",
    )
    sub.add_argument(
        "--experts",
        choices=("sparse", "dense"),
        default="sparse",
        help="dense computes all of them on every token, to compare with",
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
    sub.add_argument("--texts", type=int, default=16, help="held-out pieces that the engine reads")
    sub.add_argument("--tokens", type=int, default=128, help="tokens of each")
    sub.add_argument("--probes", type=int, default=16, help="next tokens asked for in each")
    add_threads(sub)
    add_json(sub)

    sub = add(
        "bench",
        _bench,
        "measure tokens per second in the stock engine on real text, each figure a median",
        "model.litertlm --dense dense.litertlm --json speed.json",
    )
    sub.add_argument("bundle")
    sub.add_argument("--dense", metavar="BUNDLE", help="the same model exported with --experts dense")
    sub.add_argument("--text", default="stdlib:heldout", help="path, glob or part of the corpus")
    sub.add_argument("--texts", type=int, default=12, help="pieces of text")
    sub.add_argument("--prefill", type=int, default=128, help="tokens of each to take in")
    sub.add_argument("--decode", type=int, default=64, help="tokens to answer")
    add_threads(sub)
    add_json(sub)

    sub = add(
        "chat",
        _chat,
        "talk to a bundle: one answer with --prompt, else a conversation until the end of input",
        "model.litertlm --prompt 'What does os.getcwd do?'",
    )
    sub.add_argument("bundle")
    sub.add_argument("--prompt", help="one question")
    sub.add_argument("--max-tokens", type=int, default=256, help="of each reply")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    add_threads(sub)
    return parser


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _options(arguments: Any) -> dict[str, Any]:
    """What the command's function takes: its parameters bear the names of the options."""
    return {k: v for k, v in vars(arguments).items() if k not in ("command", "json", "prompt")}


def _export(arguments: Any) -> None:
    from conversion.export import export

    result = export(**_options(arguments), say=_say)
    _table(result)
    _write(arguments, result)


def _verify(arguments: Any) -> int:
    from conversion.verify import BOUNDS, verify

    result = verify(**_options(arguments), say=_say)
    _table(result["export"] | result["parity"], BOUNDS)
    _write(arguments, result)
    for sentence in result["failed"][:20]:
        print(f"failed: {sentence}", file=sys.stderr)
    return 1 if result["failed"] else 0


def _bench(arguments: Any) -> None:
    from conversion.bench import bench

    result = bench(**_options(arguments))
    _table(result["speed"])
    _write(arguments, result)


def _chat(arguments: Any) -> None:
    from conversion.chat import chat

    prompts = _questions() if arguments.prompt is None else [arguments.prompt]
    chat(prompts=prompts, **_options(arguments))


def _questions() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(values: dict[str, Any], bounds: dict[str, tuple[float, float]] | None = None) -> None:
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else f"{value}"
        least, most = (bounds or {}).get(name, (None, None))
        print(f"{name:30} {shown:>14}" + ("" if least is None else f"   {least:g} .. {most:g}"))


def _write(arguments: Any, result: dict[str, Any]) -> None:
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    sys.exit(main())
