"""`python -m launch fit --search`: which mesh, remat policy and batch get most out of some slices.

Each candidate has an estimate of its memory and a bound of its speed, both from a few products of shapes; those
that cannot be are put aside uncompiled. Then the most promising one is compiled, what it really takes corrects the
estimates of the others with its remat policy, and so on. A step keeps the config's tokens: what does not fit a
device at one time goes through gradient accumulation.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

from launch.fit_compile import Compiled, compile_kept, device_count, say
from launch.fit_estimate import estimated_bytes, least_seconds
from launch.fit_report import GB, available_bytes, fit_record, mesh_words
from launch.slices import Slice
from moe_jax.config import REMAT_POLICIES, MeshConfig, RunConfig
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import check_divisible
from moe_jax.progress import time_left

# (expert, context, tensor) beside the data and fsdp of all sizes; 1, 1, 1 is the likely optimum at these sizes.
_OTHER_AXES = ((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 2))
_ROWS = 8  # of a tile in HBM: other parts of d_model are padded, and copied when they are gathered
_ROOM = 0.97  # of the HBM that a program can use: estimates are no better than that

Measure = Callable[[RunConfig], dict[str, Any]]


class Candidate(NamedTuple):
    """One way to run a step, estimated: bytes per device, tokens per second and chip at best.

    `next_bound` are the seconds of the second busiest resource, which decides between candidates equally fast.
    """

    cfg: RunConfig
    args: float
    temp: float
    tokens_per_second: float
    next_bound: float


class Planned(NamedTuple):
    """Candidates, the fastest first, and how many are put aside for what reason."""

    candidates: list[Candidate]
    pruned: dict[str, int]


def plan(
    cfg: RunConfig, kind: Slice, slices: int, per_device_batch: float | None = None, plain: bool = False
) -> Planned:
    """What could be compiled for `cfg`, without compiling; `plain` leaves out expert, context and tensor."""
    devices, available = device_count(kind, slices), available_bytes(kind)
    alone = AbstractMesh((1,) * len(AXES), AXES)
    check_divisible(replace(cfg, mesh=MeshConfig(fsdp=1)), alone)  # what no mesh could mend
    found: list[Candidate] = []
    pruned: Counter[str] = Counter()
    for mesh in _meshes(devices // slices, slices, _OTHER_AXES[:1] if plain else _OTHER_AXES):
        for batched in _batches(cfg, devices, per_device_batch):
            for policy in REMAT_POLICIES:
                tried = replace(batched, mesh=mesh, remat=policy)
                sizes = {axis: getattr(mesh, axis) for axis in AXES}
                shapes = AbstractMesh(tuple(sizes.values()), AXES)
                try:
                    check_divisible(tried, shapes)
                except UserError:
                    pruned["the mesh does not divide the model or the batch"] += 1
                    continue
                if cfg.model.d_model // mesh.fsdp % _ROWS:
                    pruned[f"fsdp cuts d_model into less than tiles of {_ROWS} rows"] += 1
                    continue
                args, temp = estimated_bytes(tried, sizes)
                if args + temp / 2 > available:
                    pruned["not even half of the estimated temporaries fit"] += 1
                    continue
                seconds = least_seconds(tried, sizes, kind)
                per_chip = tried.tokens_per_step / (kind.chips * slices) / max(seconds)
                found.append(Candidate(tried, args, temp, per_chip, sorted(seconds)[-2]))
    return Planned(sorted(found, key=lambda c: (-c.tokens_per_second, c.next_bound)), dict(pruned))


def _meshes(devices: int, slices: int, others: tuple[tuple[int, int, int], ...]) -> Iterator[MeshConfig]:
    for expert, context, tensor in others:
        left, odd = divmod(devices, expert * context * tensor)
        for fsdp in (n for n in range(1, left + 1) if left % n == 0 and not odd):
            yield MeshConfig(
                data=left // fsdp, fsdp=fsdp, expert=expert, context=context, tensor=tensor, slices=slices
            )


def _batches(cfg: RunConfig, devices: int, only: float | None) -> Iterator[RunConfig]:
    """`cfg` with microbatches of 1/4, 1/2, 1, 2, ... sequences per device that make up its global batch.

    Where `only` so many are asked for and they do not, a step is one microbatch of them.
    """
    sequences = cfg.data.global_batch_size
    for each in [only] if only else [2.0**n for n in range(-2, 8)]:
        microbatch = each * devices
        if microbatch >= 1 and microbatch == int(microbatch) and sequences % int(microbatch) == 0:
            yield replace(cfg, gradient_accumulation=sequences // int(microbatch))
        elif only:
            data = replace(cfg.data, global_batch_size=max(1, int(microbatch)))
            yield replace(cfg, data=data, gradient_accumulation=1)


def measure_kept(name: str, kind: Slice, slices: int, stage_tokens: float) -> Measure:
    """Config -> record, compiled in a child process unless a result is kept."""

    def measure(cfg: RunConfig) -> dict[str, Any]:
        compiled: Compiled = compile_kept(cfg, kind, slices)
        return fit_record(name, cfg, kind, slices, compiled, stage_tokens)

    return measure


def search(
    candidates: list[Candidate], available: int, measure: Measure, *, max_compiles: int, first_fit: bool = False
) -> list[dict[str, Any]]:
    """Records of what was compiled: those that fit first, the fastest first.

    It ends after `max_compiles`, when no candidate promises more than the best one found, or with `first_fit` at
    the first that fits. A compiler that dies counts as a compile.
    """
    left, records = list(candidates), []
    speed: dict[str, float] = {}  # policy -> measured over estimated
    room: dict[str, float] = {}
    spent: list[float] = []
    while left and len(spent) < max_compiles:

        def promise(c: Candidate) -> float:
            return c.tokens_per_second * speed.get(c.cfg.remat, 1.0)

        def fits(c: Candidate) -> bool:
            grown = room.get(c.cfg.remat, max(room.values(), default=1.0))
            return c.args + grown * c.temp <= _ROOM * available

        best = max((r["roofline"]["tokens_per_second_per_chip"] for r in records if r["fits"]), default=0.0)
        hopeful = [c for c in left if fits(c) and promise(c) > best]
        if not hopeful and best:
            break
        # Until something fits, data and fsdp alone: at these sizes the best is among them, or close to it.
        plain = [c for c in hopeful if not best and c.cfg.mesh.expert * c.cfg.mesh.context * c.cfg.mesh.tensor == 1]
        pool = plain or hopeful
        chosen = max(pool, key=promise) if pool else min(left, key=lambda c: c.args + c.temp)
        left.remove(chosen)
        rest = f", about {time_left(sum(spent) / len(spent) * (max_compiles - len(spent)))}" if spent else ""
        say(f"compile {len(spent) + 1} of at most {max_compiles}{rest}: {in_words(chosen.cfg)}")
        start = time.monotonic()
        try:
            record = measure(chosen.cfg)
        except UserError as error:
            say(f"not compiled: {str(error)[:200]}")
            spent.append(time.monotonic() - start)
            continue
        spent.append(time.monotonic() - start)
        records.append(record)
        room[chosen.cfg.remat] = record["temp_gb"] * GB / chosen.temp
        if record["fits"]:
            reached = record["roofline"]["tokens_per_second_per_chip"]
            speed[chosen.cfg.remat] = reached / chosen.tokens_per_second
            if first_fit:
                break
    return sorted(records, key=lambda r: -r["roofline"]["tokens_per_second_per_chip"] if r["fits"] else 0.0)


def in_words(cfg: RunConfig) -> str:
    """What a candidate is, in a line."""
    mesh = {axis: getattr(cfg.mesh, axis) for axis in AXES}
    each = cfg.data.global_batch_size / cfg.gradient_accumulation / math.prod(mesh.values())
    return f"{mesh_words(mesh)}, {each:g} sequences per device, remat {cfg.remat}"


def render_search(records: list[dict[str, Any]], planned: Planned) -> str:
    """The ranking of what was compiled, and what was not."""
    lines = [
        f"{'mesh':28} {'batch':>5} {'accum':>5} {'remat':14} {'GB':>6} {'spare':>6} {'tokens/s/chip':>13} "
        f"{'MFU':>6}  bound by"
    ]
    for r in records:
        speed = f"{'does not fit':>13}"
        if line := r["roofline"]:
            per_chip, mfu = line["tokens_per_second_per_chip"], line["mfu_ceiling"]
            speed = f"{per_chip:13,.0f} {mfu:6.1%}  {line['bound_by']}"
        lines.append(
            f"{mesh_words(r['mesh']):28} {r['per_device_batch']:5g} {r['gradient_accumulation']:5} {r['remat']:14} "
            f"{r['peak_gb']:6.2f} {r['hbm_headroom_gb']:6.2f} {speed}"
        )
    lines += [
        "",
        f"{len(planned.candidates)} candidates, {len(records)} compiled; the others promise less or need more. "
        "Put aside before:",
    ]
    lines += [f"  {count:5}  {reason}" for reason, count in planned.pruned.items()]
    return "\n".join(lines) + "\n"
