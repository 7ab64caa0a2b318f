"""Parameter counts and FLOPs against published figures and hand-computed cases."""

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from configs import get
from configs.mobilemoe import LARGE, MEDIUM, SMALL
from moe_jax.flops import cache_bytes, count_parameters, deployed_bytes, peak_flops, train_flops_per_token
from tests.tiny import DENSE, MOE


@pytest.mark.parametrize(
    ("model", "active", "total"),
    [(SMALL, 272e6, 1.3e9), (MEDIUM, 528e6, 2.8e9), (LARGE, 922e6, 5.3e9)],
    ids=["S", "M", "L"],
)
def test_counts_match_the_published_sizes(model, active, total):
    counts = count_parameters(model)
    assert round(counts.active / 1e6) == active / 1e6
    assert round(counts.total / 1e9, 1) == total / 1e9


def test_the_dense_twin_has_mobilellm_pros_size():
    counts = count_parameters(get("dense_twin").model)
    assert counts.active == counts.total
    assert 1.0e9 < counts.total < 1.1e9


def test_counts_equal_a_sum_by_hand():
    attention = 2 * 64 * 64 + 2 * 64 * 32
    routed, shared, router = 3 * 64 * 32, 3 * 64 * 64, 64 * 6
    norms, embedding = 5 * 64, 96 * 64
    assert count_parameters(MOE).total == 2 * (attention + 6 * routed + shared + router) + norms + embedding
    assert count_parameters(MOE).active == 2 * (attention + 2 * routed + shared + router) + norms + embedding
    assert count_parameters(DENSE).total == 2 * (attention + 3 * 64 * 96) + norms + embedding


def test_training_flops_are_six_per_active_weight_and_half_the_attention_square():
    weights = count_parameters(DENSE).active - 5 * 64
    scores_and_sum = 2 * (2 * 2 * 16 / 2 * 4 * 16)  # layers, products, FLOPs, mean keys, heads, width
    assert train_flops_per_token(DENSE, 16) == 6 * weights + 3 * scores_and_sum


def test_training_flops_of_experts_are_of_those_that_a_token_meets():
    attention, expert, shared, router = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 32, 3 * 64 * 64, 64 * 6
    weights = 2 * (attention + 2 * expert + shared + router) + 96 * 64
    assert train_flops_per_token(MOE, 16) == 6 * weights + 3 * 2 * (2 * 2 * 16 / 2 * 4 * 16)


@pytest.mark.parametrize(
    ("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU7x", 2307e12 / 2)], ids=["a chip", "half a chip"]
)
def test_a_devices_peak_is_its_part_of_the_chips(kind, peak):
    device: Any = SimpleNamespace(platform="tpu", device_kind=kind)
    assert peak_flops(device) == peak


def test_the_cpus_peak_is_measured():
    assert 1e8 < peak_flops(jax.devices()[0]) < 1e14


def test_bytes_on_a_phone_are_nine_sixteenths_a_weight_with_its_scale_and_four_a_float():
    codes, floats = count_parameters(DENSE).total - 5 * 64, 5 * 64
    assert deployed_bytes(DENSE) == (codes * 9 / 16 + floats * 4,) * 2
    assert deployed_bytes(SMALL).total == pytest.approx(0.715e9, rel=0.01)  # its .litertlm has 0.732
    assert deployed_bytes(MOE).active < deployed_bytes(MOE).total


def test_a_cache_holds_keys_and_values_of_all_layers_in_float32():
    assert cache_bytes(SMALL, 8192) == 20 * 2 * 8192 * 4 * 64 * 4
