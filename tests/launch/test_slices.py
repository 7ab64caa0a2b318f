"""Slice names: Google's tables, and messages for names that are in none."""

from __future__ import annotations

import pytest

from launch.slices import FAMILIES, Slice, _by_chips, parse_slice
from moe_jax.errors import UserError


# Published: TPU configurations in Google Cloud's documentation, and xpk's system characteristics.
@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts", "machine"),
    [
        ("v4-32", "2x2x4", 16, 4, "ct4p-hightpu-4t"),
        ("v4-4096", "8x16x16", 2048, 512, "ct4p-hightpu-4t"),
        ("v5e-1", "1x1", 1, 1, "ct5lp-hightpu-1t"),
        ("v5e-4", "2x2", 4, 1, "ct5lp-hightpu-4t"),
        ("v5e-256", "16x16", 256, 64, "ct5lp-hightpu-4t"),
        ("v5litepod-32", "4x8", 32, 8, "ct5lp-hightpu-4t"),
        ("v5p-8", "2x2x1", 4, 1, "ct5p-hightpu-4t"),
        ("v5p-128", "4x4x4", 64, 16, "ct5p-hightpu-4t"),
        ("v5p-384", "4x4x12", 192, 48, "ct5p-hightpu-4t"),
        ("v5p-12288", "16x16x24", 6144, 1536, "ct5p-hightpu-4t"),
        ("v6e-8", "2x4", 8, 2, "ct6e-standard-4t"),
        ("v6e-256", "16x16", 256, 64, "ct6e-standard-4t"),
        ("tpu7x-128", "4x4x4", 64, 16, "tpu7x-standard-4t"),
        ("tpu7x:4x4x8", "4x4x8", 128, 32, "tpu7x-standard-4t"),
    ],
)
def test_a_name_means_the_published_shape_and_machines(name, topology, chips, hosts, machine):
    kind = parse_slice(name)
    assert (kind.topology, kind.chips, kind.hosts, kind.machine_type) == (topology, chips, hosts, machine)


def test_size_and_shape_name_the_same_slice_and_only_one_shape_is_a_sizes_default():
    assert parse_slice("V5E-256") == parse_slice("v5e:16x16") == Slice("v5e", (16, 16))
    assert parse_slice("v5p:4x4x16").size == parse_slice("v5p:4x8x8").size == "512"
    assert [parse_slice(f"v5p:{shape}").is_default for shape in ("4x4x16", "4x8x8")] == [False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_slice_of_a_family_is_found_by_its_own_names(family):
    for shapes in _by_chips(family).values():
        for shape in shapes:
            kind = Slice(family, shape)
            assert parse_slice(f"{family}:{kind.topology}") == kind
            assert (parse_slice(f"{family}-{kind.size}") == kind) == kind.is_default
            assert kind.hosts * kind.chips_per_host == kind.chips


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-100", "v5e-64, v5e-128"),
        ("v5p-130", "v5p-128"),
        ("v5p-9", "v5p-8"),
        ("v5e:4x5", "v5e:4x4"),
        ("v5e:16x32", "v5e:16x16"),
        ("v5p:4x4x6", "v5p:"),
        ("v5e:8x4", "v5e:4x8"),
        ("v5e-0", "v5e-1"),
        ("h100-8", "v5e-256"),
        ("v5e", "v5e-256"),
    ],
)
def test_a_name_of_no_slice_is_answered_with_one_that_is(name, words):
    with pytest.raises(UserError, match="--topology") as caught:
        parse_slice(name)
    assert words in str(caught.value)
