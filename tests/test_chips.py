"""The table of chips agrees with itself and with jax's names."""

from __future__ import annotations

import pytest
from jax._src.pallas.mosaic import tpu_info

from moe_jax.chips import CHIPS, chip_named, chip_of
from moe_jax.errors import UserError


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_peaks_are_within_a_tenth_of_those_that_jax_knows(chip):
    version = tpu_info.chip_version_from_device_kind(chip.device_kinds[0])
    assert version is not None
    known = tpu_info._get_tpu_info_impl(version, 1)
    cores = version.num_physical_tensor_cores_per_chip
    assert chip.bf16_flops == pytest.approx(known.bf16_ops_per_second * cores, rel=0.1)
    assert chip.hbm_bytes == pytest.approx(known.hbm_capacity_bytes * cores, rel=0.1)
    assert chip.hbm_bandwidth == pytest.approx(known.mem_bw_bytes_per_second * cores, rel=0.15)
    assert chip.devices_per_chip == (1 if version.supports_megacore else cores)


def test_every_device_kind_names_one_chip():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))
    assert all(chip_of(kind) is chip for chip in CHIPS for kind in chip.device_kinds)
    assert chip_of("TPU v5 lite") is chip_named("v5e") and chip_of("cpu") is None


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match="v5e"):
        chip_named("v9")


def test_the_link_bandwidths_add_up_to_the_published_sums():
    # The pages give all links, two in each dimension, in both directions.
    published = {"v5e": 400e9, "v5p": 1200e9, "v6e": 800e9, "tpu7x": 1200e9}
    chips = {name: chip_named(name) for name in published}
    assert {n: 2 * 2 * chip.torus_dims * chip.ici_link_bandwidth for n, chip in chips.items()} == published


@pytest.mark.parametrize(
    ("name", "topology", "group", "links"),
    [
        ("v5e", (4, 4), None, 2),
        ("v5e", (8, 16), None, 3),
        ("v5e", (16, 16), None, 4),
        ("v5e", (16, 16), 16, 2),
        ("v5e", (1, 1), None, 1),
        ("v5p", (2, 2, 4), None, 3),
        ("v5p", (4, 4, 8), None, 6),
        ("v5p", (4, 4, 8), 8, 2),
    ],
)
def test_an_axis_gives_two_links_where_it_closes_to_a_ring(name, topology, group, links):
    assert chip_named(name).links(topology, group) == links
