"""The ceiling of a step equals the one worked out by hand on round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.hlo import Collective, Kernel, Program
from launch.roofline import collective_seconds, roofline
from moe_jax.chips import chip_named

# 100 FLOP/s, 10 bytes/s of HBM, 1 byte/s per link and direction, 0.5 bytes/s to other slices, 5 cycles a second.
CHIP = replace(
    chip_named("v5e"), bf16_flops=100.0, hbm_bandwidth=10.0, ici_link_bandwidth=1.0, dcn_bandwidth=0.5, clock_hz=5.0
)
EMPTY = Program(4, 0, 0.0, 0.0, {}, (), 0.0, (), ())


def test_the_slowest_resource_sets_the_step():
    program = replace(
        EMPTY, issued_flops=500.0, flops=400.0, hbm_bytes=20.0, kernels={"gmm": Kernel(2, 100.0, 300.0)}
    )
    line = roofline(program, CHIP, (2, 2), model_flops=200.0, tokens=16.0)
    assert line.seconds == {"compute": 8.0, "memory": 2.0, "interconnect": 0.0}
    assert (line.bound_by, line.step_seconds) == ("compute", 8.0)
    assert (line.mfu_ceiling, line.hfu, line.tokens_per_second_per_chip) == (0.25, 1.0, 2.0)
    assert roofline(replace(program, hbm_bytes=100.0), CHIP, (2, 2), 200.0, 16.0).bound_by == "memory"
    gather = Collective("all-gather", 4, 1, 1, 32)
    assert roofline(replace(program, collectives=(gather,)), CHIP, (2, 2), 200.0, 16.0).bound_by == "interconnect"


def test_the_compilers_figure_is_its_cycles_and_then_the_kernels():
    program = replace(EMPTY, estimated_cycles=30, kernels={"gmm": Kernel(1, 100.0, 300.0)})
    line = roofline(program, CHIP, (2, 2), model_flops=90.0, tokens=1.0)
    assert line.compiler_seconds == 30 / 5 + 300 / 100
    assert line.compiler_mfu == pytest.approx(90 / (9 * 100))
    unknown = roofline(program, replace(CHIP, clock_hz=None), (2, 2), 90.0, 1.0)
    assert unknown.compiler_seconds is None and unknown.compiler_mfu is None


def test_kernels_without_flops_are_named():
    program = replace(EMPTY, flops=1.0, issued_flops=1.0, kernels={"mine": Kernel(3, None, None)})
    assert roofline(program, CHIP, (2, 2), 1.0, 1.0).uncounted == ("mine",)


def test_a_device_that_is_half_a_chip_has_half_of_everything():
    program = replace(EMPTY, flops=100.0, issued_flops=100.0, hbm_bytes=40.0)
    line = roofline(program, replace(CHIP, devices_per_chip=2), (2, 2), 50.0, 8.0)
    assert line.seconds == {"compute": 2.0, "memory": 8.0, "interconnect": 0.0}
    assert line.mfu_ceiling == 50 / (8 * 50) and line.tokens_per_second_per_chip == 2.0


@pytest.mark.parametrize(
    ("collective", "topology", "seconds"),
    [
        (Collective("all-gather", 16, 1, 1, 64), (4, 4), 60 / 2),  # 15/16 of 64 over a link in each of two axes
        (Collective("reduce-scatter", 16, 1, 1, 64), (4, 4), 60 / 2),
        (Collective("all-reduce", 16, 1, 1, 64), (4, 4), 2 * 60 / 2),
        (Collective("all-gather", 4, 1, 1, 64), (4, 4), 48 / 1),  # lies along one axis
        (Collective("all-gather", 256, 1, 1, 256), (16, 16), 255 / 4),  # both axes close to rings
        (Collective("collective-permute", 2, 1, 1, 8), (4, 4), 8.0),
        (Collective("collective-permute", 2, 2, 1, 8), (4, 4), 16.0),
        # Two slices of 4: each slice gathers 3/4, and a quarter of the array's other half crosses.
        (Collective("all-gather", 8, 2, 1, 64), (2, 2), 48 / 2 + 64 / 4 / 2 / 0.5),
        (Collective("all-reduce", 2, 2, 1, 8), (2, 2), 2 * 8 / 2 / 0.5),
    ],
)
def test_a_ring_sends_all_but_its_own_part(collective, topology, seconds):
    assert collective_seconds(collective, CHIP, topology) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("collective", "seconds"),
    [
        # Eight devices are four chips, which lie along one axis; half of its link each.
        (Collective("all-gather", 8, 1, 1, 64), 56 / (1 / 2)),
        (Collective("collective-permute", 2, 1, 1, 8), 8 / (1 / 2)),
        (Collective("collective-permute", 2, 2, 1, 8), 8 / (0.5 / 2)),
        # No link is left of a device's own chip, and half of the network.
        (Collective("all-reduce", 2, 2, 1, 8), 2 * 8 / 2 / (0.5 / 2)),
    ],
)
def test_devices_of_one_chip_share_its_links_and_its_network(collective, seconds):
    assert collective_seconds(collective, replace(CHIP, devices_per_chip=2), (4, 4)) == pytest.approx(seconds)
