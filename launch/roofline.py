"""The least time that a step can take on a chip, and a less rosy figure from the compiler's own estimates.

The ceiling assumes that products, HBM and the interconnect each run at their published peak and hide each other
wholly: seconds = max(compute, memory, interconnect). No step reaches it; one far below has something to gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.hlo import Collective, Program
from moe_jax.chips import Chip

# Bytes that a device sends in a ring of n, per byte of the whole array, over (n - 1) / n: an all-reduce is a
# reduce-scatter and an all-gather. A permute sends its array once; all-to-all's extra hops are left out.
_PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "all-to-all": 1, "ragged-all-to-all": 1}


@dataclass(frozen=True)
class Roofline:
    """One step on one chip.

    Attributes:
        seconds: by resource: compute, memory, interconnect.
        step_seconds: the largest of them.
        bound_by: which one that is.
        mfu_ceiling: model FLOPs over what the chip could do in `step_seconds`.
        hfu: the same with the FLOPs that run, recomputation and the kernels' cut tiles included.
        tokens_per_second_per_chip: at `step_seconds`.
        compiler_seconds: the compiler's cycles at the chip's clock, then the kernels at peak; no collectives. None
            where the clock is not known.
        compiler_mfu: model FLOPs over what the chip could do in `compiler_seconds`.
        uncounted: kernels without known FLOPs; every figure leaves their compute out.
    """

    seconds: dict[str, float]
    step_seconds: float
    bound_by: str
    mfu_ceiling: float
    hfu: float
    tokens_per_second_per_chip: float
    compiler_seconds: float | None
    compiler_mfu: float | None
    uncounted: tuple[str, ...]


def collective_seconds(collective: Collective, chip: Chip, topology: tuple[int, ...]) -> float:
    """Time of all these collectives one after the other.

    A group within a slice is a ring on the links of as few axes as hold it. A group over several slices reduces or
    gathers within each slice first, so that only one device's part crosses the data-centre network.
    """
    within = max(1, collective.group // collective.slices)
    chips = max(1, within // chip.devices_per_chip)
    link = chip.ici_link_bandwidth / chip.devices_per_chip
    if collective.kind == "collective-permute":
        across = chip.dcn_bandwidth / chip.devices_per_chip
        return collective.bytes / (across if collective.slices > 1 else link)
    sent = _PASSES[collective.kind] * collective.bytes
    seconds = sent * (within - 1) / within / (link * chip.links(topology, chips))
    if collective.slices > 1:
        part = sent / within * (collective.slices - 1) / collective.slices
        seconds += part / (chip.dcn_bandwidth / chip.devices_per_chip)
    return seconds


def roofline(
    program: Program, chip: Chip, topology: tuple[int, ...], model_flops: float, tokens: float
) -> Roofline:
    """The ceiling of a step.

    Args:
        program: what it costs per device.
        chip: where it runs.
        topology: chips of one slice along each axis, (4, 4) of "v5e:4x4".
        model_flops: per device and step, without recomputation.
        tokens: per device and step.
    """
    share = chip.devices_per_chip
    peak = chip.bf16_flops / share
    kernel_flops = sum(kernel.issued_flops or 0.0 for kernel in program.kernels.values())
    run = program.issued_flops + kernel_flops
    seconds = {
        "compute": run / peak,
        "memory": program.hbm_bytes / (chip.hbm_bandwidth / share),
        "interconnect": sum(collective_seconds(c, chip, topology) for c in program.collectives),
    }
    bound_by = max(seconds, key=lambda resource: seconds[resource])
    step = seconds[bound_by]
    compiler = program.estimated_cycles / chip.clock_hz + kernel_flops / peak if chip.clock_hz else None
    return Roofline(
        seconds=seconds,
        step_seconds=step,
        bound_by=bound_by,
        mfu_ceiling=model_flops / (step * peak),
        hfu=run / (step * peak),
        tokens_per_second_per_chip=tokens * share / step,
        compiler_seconds=compiler,
        compiler_mfu=model_flops / (compiler * peak) if compiler else None,
        uncounted=tuple(name for name, kernel in program.kernels.items() if kernel.flops is None),
    )
