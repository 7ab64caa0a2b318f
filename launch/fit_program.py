"""What the shapes of a compiled step do not say of its costs: grouped products, and traffic between slices.

The buffers of grouped products have room for the worst case, but only the row tiles of a group are visited. Columns
and reduction are cut into tiles too, and their last tile runs whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import ceil, prod

from launch.hlo import Collective, Kernel, Program, kernel_name
from launch.hlo_text import parse, schedule
from moe_jax.config import RunConfig
from moe_jax.ops.grouped_matmul import ROW_TILE, tile_sizes
from moe_jax.parallel.dispatch import number_of_passes


def visited_rows(pairs: int, experts: int, tile: int) -> float:
    """Rows in the tiles that are visited for `pairs` over `experts`, each of which starts on a tile.

    Whatever the routing, an expert's last tile is half empty on average; and it has one.
    """
    return experts * max(tile, pairs / experts + (tile - 1) / 2)


def pairs_per_call(cfg: RunConfig, mesh: dict[str, int]) -> int:
    """Token-expert pairs of a device in one grouped product of a microbatch, at balanced routing."""
    assert cfg.model.moe is not None
    tokens = cfg.tokens_per_step // cfg.gradient_accumulation // prod(mesh.values())
    per_token = cfg.model.moe.num_experts_per_tok
    return tokens * per_token // number_of_passes(tokens * mesh["expert"], per_token)


def count_grouped(
    program: Program, text: str, cfg: RunConfig, mesh: dict[str, int]
) -> tuple[Program, float | None]:
    """(the program with the FLOPs of `gmm` and `tgmm` as issued at balanced routing, those over the ideal).

    The ideal is 2 * pairs * K * N per call; None where there is no such kernel.
    """
    moe = cfg.model.moe
    if moe is None:
        return program, None
    pairs = pairs_per_call(cfg, mesh)
    visited = visited_rows(pairs, moe.num_experts // mesh["expert"], ROW_TILE)
    ideal, issued = dict.fromkeys(("gmm", "tgmm"), 0.0), dict.fromkeys(("gmm", "tgmm"), 0.0)
    for instruction, inside, times, _ in schedule(parse(text)):
        if "tpu_custom_call" not in instruction.attributes or (name := kernel_name(instruction)) not in ideal:
            continue
        operands = [a for operand in instruction.operands for a in inside[operand].out if a.dtype[0] != "s"]
        out = instruction.out[-1].dims
        k, n = (operands[0].dims[1], out[1]) if name == "gmm" else out[-2:]
        _, tile_k, tile_n = tile_sizes(ROW_TILE, k, n)
        ideal[name] += times * 2.0 * pairs * k * n
        issued[name] += times * 2.0 * visited * ceil(k / tile_k) * tile_k * ceil(n / tile_n) * tile_n
    if not sum(ideal.values()):
        return program, None
    kernels = {
        name: Kernel(kernel.count, ideal[name], issued[name]) if name in ideal else kernel
        for name, kernel in program.kernels.items()
    }
    return replace(program, kernels=kernels), sum(issued.values()) / sum(ideal.values())


def count_between_slices(program: Program, text: str, slices: int) -> Program:
    """The program with what slices exchange: the compiler turns it into sends to each host's own runtime.

    What is sent has been reduced within the slice: each device's part of it.
    """
    counts: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for instruction, _, times, _ in schedule(parse(text)):
        kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
        if instruction.opcode == "send" and kind:
            name = {"ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
                    "ALL_TO_ALL": "all-to-all"}.get(kind, "collective-permute")  # fmt: skip
            counts[name] += times
            moved[name] += times * instruction.out[0].bytes
    across = tuple(Collective(name, slices, slices, counts[name], moved[name]) for name in sorted(counts))
    return replace(program, collectives=program.collectives + across)
