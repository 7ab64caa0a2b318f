"""Options that several commands take, and how their values reach the command's function."""

from __future__ import annotations

import sys
from typing import Any

from moe_jax.command_line import at_least, seed
from moe_jax.errors import UserError


def add_checkpoint(sub: Any, without: str = "") -> None:
    """Let the command take a checkpoint of a run; `without` adds to the help what another source has no need of."""
    sub.add_argument("--step", type=at_least(0), help="this checkpoint instead of the last")
    sub.add_argument("--tokenizer", metavar="PATH", help=f"default: the run's tokenizer.json{without}")
    sub.add_argument("--quantize-float", action="store_true", help="accept a run that had no QAT stage")


def add_source(sub: Any) -> None:
    """Let the command take a run, or weights of a seed in its place (`require_meaning`)."""
    sub.add_argument("source", metavar="run", help="run folder, or a registered config with --random-weights")
    sub.add_argument("--random-weights", action="store_true", help="a model of these shapes, to measure with")
    sub.add_argument("--seed", type=seed, default=0, help="of random weights")


def require_meaning(arguments: Any) -> None:
    """UserError for an option that would be passed over: of a checkpoint with random weights, a seed without."""
    given = ("step", "quantize_float") if arguments.random_weights else ("seed",)
    for name in given:
        if getattr(arguments, name) not in (None, False, 0):
            other = "random weights" if arguments.random_weights else "a run"
            raise UserError(f"--{name.replace('_', '-')} means nothing to {other}; leave it out")


def add_threads(sub: Any, text: str = "CPU threads of the engine") -> None:
    """Let the command take a number of threads."""
    sub.add_argument("--threads", type=at_least(1), default=2, help=text)


def lengths(text: str) -> tuple[int, ...]:
    """The numbers of an option like 16,128."""
    return tuple(map(at_least(1), text.split(",")))


def options(arguments: Any, *left_out: str) -> dict[str, Any]:
    """What the command's function takes: its parameters bear the names of the options."""
    return {k: v for k, v in vars(arguments).items() if k not in ("command", "json", *left_out)}


def say(text: str) -> None:
    """A word on the progress, to standard error."""
    print(text, file=sys.stderr, flush=True)
