"""What one training step of a compiled TPU program costs, read from its scheduled HLO text (`compiled.as_text()`).

Everything is per device and step: an instruction counts as often as the loops around it run, and of a conditional
the costliest branch. Nothing here compiles. What the figures leave out:

* `estimated_cycles` adds the compiler's own estimates, which Pallas kernels and collectives lack. It is kept
  comparable with a sum over the text's lines: it also lacks the copies that carry a kernel's metadata (whose
  estimate is on a continued line), and a loop counts by the constant it compares with, even if it steps by two.
* `flops` are products (dots, convolutions, kernels), not the vector unit's work.
* `hbm_bytes` adds what each scheduled instruction reads and writes in HBM, once, with the layout's padding. It is
  too low where an operand is read once per tile (kernels too), too high where a scatter touches a part of one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil, prod
from typing import NamedTuple

import numpy as np

from launch.hlo_memory import Buffer, buffers, traffic
from launch.hlo_text import Array, Computation, Instruction, nested, parse, schedule

_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute)(-start)?"
)


class Work(NamedTuple):
    """FLOPs asked for, and FLOPs issued: tiles cut by a boundary run whole, float32 products in passes."""

    flops: float
    issued: float


@dataclass(frozen=True)
class Kernel:
    """One Pallas kernel in a step: its calls and their FLOPs, None where there is no formula or estimate."""

    count: int
    flops: float | None
    issued_flops: float | None


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over groups of one size in a step.

    `bytes` is the whole array per device: what is gathered, reduced, scattered or sent on. `slices` is how many
    slices a group touches (1: it stays on the inter-chip links).
    """

    kind: str
    group: int
    slices: int
    count: int
    bytes: int


@dataclass(frozen=True)
class Program:
    """A step per device. See the module for what each figure leaves out."""

    devices: int
    estimated_cycles: int  # outside kernels
    flops: float  # of products outside kernels
    issued_flops: float
    kernels: dict[str, Kernel]
    collectives: tuple[Collective, ...]
    hbm_bytes: float
    largest: tuple[Buffer, ...]
    unknown_loops: tuple[str, ...]  # counted once


def read_program(text: str, devices_per_slice: int | None = None, rows: int = 10) -> Program:
    """Read a compiled program's text.

    Args:
        text: `compiled.as_text()`.
        devices_per_slice: devices numbered in a row that share inter-chip links; default: all of them.
        rows: how many of the largest buffers to list.
    """
    module, unknown = parse(text), []
    cycles, flops, issued, hbm = 0, 0.0, 0.0, 0.0
    kernels: dict[str, list[tuple[int, Work | None]]] = {}
    moved: Counter[tuple[str, int, int]] = Counter()
    counts: Counter[tuple[str, int, int]] = Counter()
    held: set[Buffer] = set()
    for instruction, inside, times, bounds in schedule(module, unknown):
        cycles += bounds * instruction.cycles
        hbm += times * traffic(instruction, inside, module)
        if "tpu_custom_call" in instruction.attributes:
            kernels.setdefault(kernel_name(instruction), []).append((times, _kernel_work(instruction, inside)))
        for inner, at in [(instruction, inside), *nested(instruction, module)]:
            if inner.opcode in ("convolution", "dot"):
                work = _product(inner, at)
                flops, issued = flops + times * work.flops, issued + times * work.issued
            elif (match := _COLLECTIVE.fullmatch(inner.opcode)) and _starts(inner, at):
                key, size = _collective(match[1], inner, at, instruction, module.devices, devices_per_slice)
                counts[key] += times
                moved[key] += times * size
        held.update(buffers(instruction, module))
    return Program(
        devices=module.devices,
        estimated_cycles=cycles,
        flops=flops,
        issued_flops=issued,
        kernels={name: _sum(calls) for name, calls in sorted(kernels.items())},
        collectives=tuple(Collective(*key, counts[key], moved[key]) for key in sorted(counts)),
        hbm_bytes=hbm,
        largest=tuple(sorted(held, reverse=True)[:rows]),
        unknown_loops=tuple(unknown),
    )


def costliest(text: str, rows: int = 25) -> list[tuple[str, int, int]]:
    """(op_name without its numbers, cycles in a step, calls in a step), costliest first, without kernels."""
    cycles: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for instruction, _, times, bounds in schedule(parse(text)):
        if instruction.cycles:
            name = re.sub(r"\d+", "#", instruction.op_name)
            cycles[name] += bounds * instruction.cycles
            calls[name] += times
    return [(name, count, calls[name]) for name, count in cycles.most_common(rows)]


# ---- products -----------------------------------------------------------------------------------


def _product(instruction: Instruction, inside: Computation) -> Work:
    """2 FLOPs per multiply-add of a dot or convolution; TPU text has most dots as convolutions."""
    lhs, rhs = (inside[name].out[0].dims for name in instruction.operands[:2])
    out = instruction.out[0].dims
    if instruction.opcode == "dot":
        axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        adds = prod(out) * prod(lhs[int(axis)] for axis in axes.split(",") if axis)
    else:
        left, right, result = re.split(r"_|->", instruction.attribute(r"dim_labels=([\w>\-]+)"))
        batch = lhs[left.index("b")] // int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
        adds = batch * out[result.index("f")] * rhs[right.index("i")]
        window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute(r"window=\{([^}]*)\}")))
        for axis in range(len(left) - 2):

            def field(name: str, default: str = "1", axis: int = axis) -> str:
                return window[name].split("x")[axis] if name in window else default

            adds *= _positions(
                lhs[left.index(str(axis))], out[result.index(str(axis))], int(field("size")), int(field("stride")),
                int(field("pad", "0_0").split("_")[0]), int(field("lhs_dilate")), int(field("rhs_dilate")),
            )  # fmt: skip
    passes = {"highest": 6, "high": 3}.get(instruction.attribute(r"operand_precision=\{(\w+)"), 1)
    return Work(2.0 * adds, 2.0 * adds * passes)


@lru_cache(maxsize=4096)
def _positions(size: int, out: int, window: int, stride: int, pad: int, dilate: int, rhs_dilate: int) -> int:
    """(output, window) pairs of one dimension that meet an element: neither padding nor a hole of the dilation."""
    at = np.add.outer(np.arange(out) * stride, np.arange(window) * rhs_dilate) - pad
    return int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())


# ---- kernels ------------------------------------------------------------------------------------


def kernel_name(instruction: Instruction) -> str:
    """A Pallas kernel's kind: its name without counters and without words for what else it returns."""
    return re.sub(r"(_segmented|_no_residuals|_residuals|_*[.\d]+)+$", "", instruction.name)


def _grouped(operands: list[Array], out: tuple[Array, ...], settings: dict[str, int]) -> Work:
    """Grouped product of [M, K] by [G, K, N] (tgmm: [M, K] by [M, N] to [G, K, N]): 2 M K N.

    Issued is the grid's limit: a row tile more for each boundary between groups, since a tile that it cuts is
    visited twice. Groups that start on tiles need none of them.
    """
    lhs = next(a for a in operands if len(a.dims) == 2 and a.dtype[0] != "s")
    flops = 2.0 * prod(lhs.dims) * out[-1].dims[-1]
    offsets, tiles = [a.dims[0] for a in operands if a.dtype == "s32" and len(a.dims) == 1][:2]
    return Work(flops, flops * tiles / (tiles - (offsets - 2)))


def _splash(
    products: int, suffix: str, operands: list[Array], out: tuple[Array, ...], settings: dict[str, int]
) -> Work:
    """`products` of scores and a head's width under a causal mask; blocks on or below the diagonal run whole.

    Fewer queries than keys are taken as the last ones: of a cut sequence, the device with the most to do.
    """
    query, key = [a.dims for a in operands if len(a.dims) >= 3 and a.dtype[0] != "s"][:2]
    # [..., sequence, width], or with layout 2 [..., width, sequence].
    length, width = query[-2:] if settings["q_layout"] == 1 else query[:-3:-1]
    keys = key[-2] if settings["k_layout"] == 1 else key[-1]
    rows, columns = settings["block_q" + suffix], settings["block_kv" + suffix]
    # The fused backward kernel makes dq too, one per block of keys, to be summed outside.
    products += any(len(a.dims) > len(query) for a in out)
    reach = [ceil((keys - length + (block + 1) * rows) / columns) for block in range(ceil(length / rows))]
    blocks = sum(min(n, ceil(keys / columns)) for n in reach)
    each = 2.0 * products * prod(query[:-2]) * width
    return Work(each * length * (keys - (length - 1) / 2), each * blocks * rows * columns)


# Kind of kernel -> its formula. Splash counts: forward QK, PV; dq: QK, dO V, dS K; dkv: QK, dO V, P dO, dS Q.
_FORMULAS: dict[str, Callable[[list[Array], tuple[Array, ...], dict[str, int]], Work]] = {
    "gmm": _grouped,
    "tgmm": _grouped,
    "splash_mha_fwd": partial(_splash, 2, ""),
    "splash_mqa_fwd": partial(_splash, 2, ""),
    "splash_mha_dq": partial(_splash, 3, "_dq"),
    "splash_mqa_dq": partial(_splash, 3, "_dq"),
    "splash_mha_dkv": partial(_splash, 4, "_dkv"),
    "splash_mqa_dkv": partial(_splash, 4, "_dkv"),
}


def _kernel_work(instruction: Instruction, inside: Computation) -> Work | None:
    """By the formula of its kind, else by the CostEstimate that its author gave, else unknown."""
    settings = {k: int(v) for k, v in re.findall(r'\\"(\w+)\\": (\d+)', instruction.attributes)}
    formula = _FORMULAS.get(kernel_name(instruction))
    if formula is not None and (settings or formula is _grouped):
        return formula([a for name in instruction.operands for a in inside[name].out], instruction.out, settings)
    estimate = instruction.attribute(r'"cost_estimate":\{"flops":"(\d+)"')
    return Work(float(estimate), float(estimate)) if estimate else None


def _sum(calls: list[tuple[int, Work | None]]) -> Kernel:
    count = sum(times for times, _ in calls)
    known = [(times, work) for times, work in calls if work is not None]
    if len(known) < len(calls):
        return Kernel(count, None, None)
    return Kernel(count, sum(n * w.flops for n, w in known), sum(n * w.issued for n, w in known))


# ---- collectives --------------------------------------------------------------------------------


def _starts(instruction: Instruction, at: Computation) -> bool:
    """False for the repetitions of a collective that runs beside several fusions: they share a chain."""
    if "chain_id=" not in instruction.attributes:
        return True
    return any('"AsyncCollectiveStart"' in other.attributes for other in at.values())


def _collective(
    kind: str, instruction: Instruction, at: Computation, outer: Instruction, devices: int, per_slice: int | None
) -> tuple[tuple[str, int, int], int]:
    """((kind, devices in a group, slices that it touches), bytes)."""
    groups = replica_groups(instruction.attributes, devices)
    slices = max(len({device // (per_slice or devices) for device in group}) for group in groups)
    size = sum(array.bytes for name in instruction.operands for array in at[name].out)
    if kind == "all-reduce" and "reduce-scatter" in outer.attribute(r"\bcalls=%?([\w.\-]+)"):
        kind = "reduce-scatter"  # an all-reduce fused with the slice that keeps a part
    return (kind, len(groups[0]), slices), size * (len(groups[0]) if kind == "all-gather" else 1)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of a collective in any of HLO's spellings; source and target of each pair for a permute."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)+)\}", attributes)
    if listed:
        return [[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? ?\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        grid = (_iota(mesh[2], prod(sizes.values())) if mesh[2] else np.arange(prod(sizes.values()))).ravel()
        shape: list[int] = []
        picked: list[int] = []
        for name, size in sizes.items():
            part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", mesh[3])
            before, width = (int(part[1]), int(part[2])) if part and part[1] else (1, size if part else 1)
            shape += [before, width, size // before // width]
            picked += [len(shape) - 2] if part else []
        rest = [axis for axis in range(len(shape)) if axis not in picked]
        grid = grid.reshape(shape).transpose(rest + picked)
        return grid.reshape(-1, prod(shape[axis] for axis in picked)).tolist()
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    return _iota(iota[1], devices).tolist() if iota else [list(range(devices))]


def _iota(text: str, devices: int) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): 0, 1, 2 ... shaped [4,2], transposed, then shaped [2,4]."""
    shapes = [[int(n) for n in shape.split(",")] for shape in re.findall(r"\[([\d,]+)\]", text)]
    order = re.search(r"T\(([\d,]+)\)", text)
    grid = np.arange(devices).reshape(shapes[-1])
    grid = grid.transpose([int(n) for n in order[1].split(",")]) if order else grid
    return grid.reshape(shapes[0]) if len(shapes) > 1 else grid
