"""`python -m launch design`: the architecture of least loss that a phone's memory and a compute budget allow.

The family of `configs.mobilemoe` with other widths, depths and numbers of experts, judged by the scaling law: the
paper's own problem (arXiv 2605.27358, section 3). Memory is what the files of this project take: INT4 weights with
their scales and a float32 cache; the engine's own buffers come on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import configs
from configs.mobilemoe import family
from launch.scaling_law import PUBLISHED, Law, Point, expansion, fit_law
from moe_jax.command_line import add_command, add_json, at_least
from moe_jax.config import TRAINING_OPTIONS, ModelConfig, RunConfig
from moe_jax.errors import UserError
from moe_jax.files import location, write_bytes, write_json
from moe_jax.flops import cache_bytes, count_parameters, deployed_bytes
from moe_jax.overrides import differences, from_dict
from moe_jax.train.metrics import read_metrics

COARSE_EXPERTS = (1, 2, 4, 8, 16, 32)  # the paper's sweep; 1 is a dense model
_HEADS = range(4, 52, 4)  # multiples of the family's key and value heads
_DEPTHS = 0.25  # share by which a depth may differ from the family's for its width
_BASE = "mobilemoe_s"  # whose other options a designed model has
_OF_TRAINING = [name for name in TRAINING_OPTIONS if name.startswith("moe.")]  # the base config's stay
_LAST = 0.05  # share of a run's steps whose mean loss is the run's


class Design(NamedTuple):
    """A model within the budget: N, total parameters, bytes on the phone, tokens D and the law's loss for them."""

    model: ModelConfig
    active: int
    total: int
    bytes: float
    tokens: float
    loss: float


class Budget(NamedTuple):
    """`memory` in bytes at `context` tokens, at most `active` parameters, and `tokens` or `flops` to train."""

    memory: float
    active: float
    context: int
    tokens: float | None
    flops: float | None = None

    def tokens_for(self, active: float) -> float:
        """D: what is given, or what 6 N D leaves."""
        return self.tokens if self.tokens is not None else (self.flops or 0.0) / (6 * active)


def best_designs(law: Law, budget: Budget, vocab_size: int) -> list[Design]:
    """For each number of coarse experts the model of least loss that the budget allows, if there is one."""
    found = []
    for coarse in COARSE_EXPERTS:
        if allowed := list(designs(law, budget, coarse, vocab_size)):
            # The law knows nothing of depth: of models as good, the one that is most like the family.
            found.append(min(allowed, key=lambda d: (round(d.loss, 4), _unlike(d.model))))
    return found


def designs(law: Law, budget: Budget, coarse: int, vocab_size: int, vary_depth: bool = True) -> Iterator[Design]:
    """All members of the family with so many coarse experts that the budget allows, the narrowest first."""
    for heads in _HEADS:
        usual = family(heads).num_layers
        least, most = (round(usual * (1 + sign * _DEPTHS * vary_depth)) for sign in (-1, 1))

        def model(layers: int, heads: int = heads) -> ModelConfig:
            return replace(family(heads, layers, coarse), vocab_size=vocab_size)

        # Every layer adds the same, so two depths tell all: to describe a model takes some 0.3 s.
        one, two = (_sizes(model(layers), budget.context) for layers in (1, 2))
        fits = False
        for layers in range(least, most + 1):
            active, total, size = one + (layers - 1) * (two - one)
            if active <= budget.active and size <= budget.memory:
                fits, made, tokens = True, model(layers), budget.tokens_for(active)
                loss = law.loss(active, tokens, expansion(made))
                yield Design(made, int(active), int(total), float(size), tokens, loss)
        if not fits:
            return  # nor does any wider one


def _sizes(model: ModelConfig, context: int) -> np.ndarray:
    """Active and total parameters, bytes on the phone."""
    size = deployed_bytes(model).total + cache_bytes(model, context)
    return np.array([*count_parameters(model), size])


def _unlike(model: ModelConfig) -> float:
    return abs(model.num_layers - family(model.num_heads).num_layers)


def best_of(law: Law, found: Sequence[Design]) -> Design:
    """The model of least loss; one that the law's own models do not cover only where none is covered."""
    covered = [d for d in found if law.covers(d.active, d.tokens, expansion(d.model))]
    return min(covered or found, key=lambda d: d.loss)


def overrides_of(model: ModelConfig) -> list[str]:
    """What makes the base config's model this one, as words of a command line."""
    changed = differences(configs.load(_BASE).model, model)
    words = {name: str(new) for name, (_, new) in changed.items() if name not in _OF_TRAINING}
    if model.moe is None:
        words = {name: new for name, new in words.items() if not name.startswith("moe")} | {"moe": "none"}
    return [f"model.{name}={new}" for name, new in words.items()]


def command_of(design: Design) -> str:
    """How to train it."""
    return " ".join(["python -m moe_jax train", _BASE, "--run runs/designed", *_overrides(design)])


def _overrides(design: Design) -> list[str]:
    """The model, and as many steps as its tokens take."""
    steps = round(design.tokens / configs.load(_BASE).tokens_per_step)
    return [*overrides_of(design.model), f"steps={max(steps, 1)}"]


def point_of(run: str) -> Point:
    """What a finished run says of the law: its model, its tokens in the loss, its mean loss over the last steps.

    Raises:
        UserError: no run, or one that has not done its steps, or that did not begin with fresh parameters.
    """
    path = location(run) / "config.json"
    if any(mark in run for mark in "*?[") and not path.exists():
        raise UserError(f"no folder matches {run}; name folders of moe_jax train")
    try:
        cfg = from_dict(RunConfig, json.loads(path.read_text()))
    except (OSError, ValueError, UserError) as error:
        raise UserError(f"{run} is no run of this version ({error}); name a folder of moe_jax train") from None
    lines = read_metrics(run)
    done = lines[-1]["step"] if lines else 0
    if done < cfg.steps or cfg.init_from:
        why = f"has done {done} of {cfg.steps} steps" if done < cfg.steps else f"went on from {cfg.init_from}"
        raise UserError(f"{run} {why}, so its loss is not that of its tokens; leave it out")
    last = [line["loss"] for line in lines if line["step"] > done * (1 - _LAST)]
    tokens = sum(line["tokens"] for line in lines)
    return Point(count_parameters(cfg.model).active, tokens, expansion(cfg.model), sum(last) / len(last))


def add_design_command(commands: Any) -> None:
    """Add `design` to the subparsers of `python -m launch`."""
    sub = add_command(
        commands,
        "design",
        _command,
        "find the architecture of least loss for a phone's memory and compute, by the scaling law",
        "--memory 1.1 --active 0.3",
        "--memory 0.2 --active 0.05 --tokens 2e9 --runs runs/sweep/*   # a law of your own",
    )
    number = at_least(0, float)
    sub.add_argument("--memory", type=number, required=True, metavar="GB", help="weights and cache on the phone")
    sub.add_argument(
        "--active", type=number, required=True, metavar="B", help="most active parameters, in billions"
    )
    budget = sub.add_mutually_exclusive_group()
    budget.add_argument(
        "--tokens", type=at_least(1, float), metavar="N", help="tokens to train on (default: 500e9)"
    )
    budget.add_argument(
        "--flops", type=at_least(1, float), metavar="N", help="training compute, 6 N D, that sets the tokens"
    )
    sub.add_argument(
        "--context", type=at_least(1), default=2048, metavar="N", help="tokens of cache (default: 2048)"
    )
    sub.add_argument("--vocab-size", type=at_least(1), default=ModelConfig().vocab_size, metavar="N")
    sub.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="finished runs to fit the law to, not the paper's"
    )
    sub.add_argument("--html", metavar="PATH", help="write a picture of loss over memory here")
    add_json(sub)


def _command(arguments: Any) -> int:
    law, error, points = PUBLISHED, None, []
    if arguments.runs:
        points = [point_of(run) for run in arguments.runs]
        law, error = fit_law(points)
    tokens = 500e9 if arguments.tokens is None and arguments.flops is None else arguments.tokens
    memory = arguments.memory * 1e9
    budget = Budget(memory, arguments.active * 1e9, arguments.context, tokens, arguments.flops)
    found = best_designs(law, budget, arguments.vocab_size)
    if not found:
        raise UserError(
            f"no model of the family has at most {arguments.active:g} B active parameters and "
            f"{arguments.memory:g} GB; give more of either, or a smaller --vocab-size"
        )
    print(render(law, found, error), end="")
    record = {
        "law": law._asdict(),
        "rmse": error,
        "points": [point._asdict() for point in points],
        "designs": [_record(design) for design in found],
        "best": _record(best_of(law, found)),
    }
    if arguments.json:
        write_json(arguments.json, record)
    if arguments.html:
        from launch.design_report import page

        write_bytes(Path(arguments.html), page(law, budget, arguments.vocab_size, found).encode())
    return 0


def _record(design: Design) -> dict[str, Any]:
    numbers = {name: getattr(design, name) for name in ("active", "total", "bytes", "tokens", "loss")}
    return numbers | {"expansion": expansion(design.model), "overrides": _overrides(design)}


def render(law: Law, found: Sequence[Design], error: float | None) -> str:
    """The table, what to make of it, and how to go on with the best."""
    best = best_of(law, found)
    lines = [
        f"{'E':>3} {'layers':>6} {'d_model':>7} {'experts':>12} {'active B':>9} {'total B':>8} {'GB':>6} "
        f"{'tokens B':>9} {'loss':>8}"
    ]
    outside = False
    for d in found:
        far = not law.covers(d.active, d.tokens, expansion(d.model))
        outside |= far
        marks = ("*" if far else " ") + (" <- least" if d is best else "")
        lines.append(
            f"{expansion(d.model):3.0f} {d.model.num_layers:6} {d.model.d_model:7} {experts_of(d.model):>12} "
            f"{d.active / 1e9:9.3f} {d.total / 1e9:8.3f} {d.bytes / 1e9:6.2f} {d.tokens / 1e9:9.4g} "
            f"{d.loss:8.4f}{marks}"
        )
    source = "the paper's" if error is None else f"fitted to your runs, which it misses by {error:.4f}"
    (least_n, most_n), (least_d, most_d), (least_e, most_e) = law.spans
    lines += [
        "",
        "E: width of all feed-forwards over what a token passes. GB: INT4 weights and cache, without the engine's "
        "own.",
        f"The law is {source}: "
        f"{least_n / 1e9:.3g} to {most_n / 1e9:.3g} B active, {least_d / 1e9:.3g} to {most_d / 1e9:.3g} B tokens, "
        f"E {least_e:.3g} to {most_e:.3g}.",
    ]
    lines += ["* lies outside of that: an extrapolation, which this form is known to get wrong."] if outside else []
    return "\n".join([*lines, "", command_of(best)]) + "\n"


def experts_of(model: ModelConfig) -> str:
    """In words, as in 60+1 top-4."""
    if model.moe is None:
        return "dense"
    return f"{model.moe.num_experts}+1 top-{model.moe.num_experts_per_tok}"
