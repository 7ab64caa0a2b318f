"""The predicted speed of phones against what was published, and the shapes that a bundle shows."""

from __future__ import annotations

import dataclasses
from statistics import mean

import pytest

import configs
from conversion import roofline, weights
from conversion.phones import PHONES, find
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from tests.conversion.conftest import MOE, ROUTED

PUBLISHED = [phone for phone in PHONES if phone.measured]


def load(name: str) -> ModelConfig:
    return configs.load(name).model


def test_a_token_of_s_touches_its_own_share_of_the_weights():
    cost = roofline.work(load("mobilemoe_s"))
    assert cost.bytes == pytest.approx(0.157e9, rel=0.01) and cost.products == pytest.approx(0.173e9, rel=0.01)
    assert cost.bytes < 0.3 * roofline.work(load("dense_twin")).bytes


@pytest.mark.parametrize("phone", PUBLISHED, ids=lambda phone: phone.name)
def test_the_law_fitted_to_the_dense_model_holds_for_the_sparse_ones(phone):
    check = roofline.roofline("mobilemoe_s", phone.name, load)["check"][phone.name]
    dense = [value for values in check.pop("dense_twin").values() for value in values.values()]
    assert all(0.9 < value < 1.12 for value in dense)
    assert set(check) == {"mobilemoe_s", "mobilemoe_m", "mobilemoe_l"}
    assert all(
        0.55 < value < 1.2 for kinds in check.values() for found in kinds.values() for value in found.values()
    )


def test_speed_falls_with_the_context_and_with_the_model():
    small, large = (roofline.roofline(f"mobilemoe_{size}", "pixel 9", load) for size in "sl")
    speeds = list(small["decode_tok_s"].values())
    assert speeds == sorted(speeds, reverse=True)
    assert all(small["decode_tok_s"][n] > v for n, v in large["decode_tok_s"].items())
    assert "published over predicted" in roofline.table(small)


def test_a_phone_that_nobody_measured_gets_the_share_of_bandwidth_that_others_reach():
    slow, others = find("redmi note 14 pro+"), [(phone, roofline.rates(phone, load)) for phone in PUBLISHED]
    got = roofline.rates(slow, load)
    assert got.stream / slow.bandwidth == pytest.approx(mean(rate.stream / o.bandwidth for o, rate in others))
    for name in ("looks", "products", "attention"):
        shares = [getattr(rate, name) / phone.peak for phone, rate in others]
        assert getattr(got, name) / slow.peak == pytest.approx(mean(shares)) and len(set(shares)) == len(shares)


def test_a_peak_counts_the_pairs_of_every_cores_pipes():
    assert find("Galaxy S25").peak == pytest.approx((2 * 4.47 + 2 * 3.53) * 4 * 32e9)
    assert find("Galaxy S24").peak == pytest.approx((3.3 * 4 + 3 * 3.2 * 2) * 32e9)


def test_tokens_a_second_of_a_prompt_are_its_tokens_over_the_seconds_until_the_first():
    found = roofline.roofline("mobilemoe_s", "Galaxy S25", load)
    assert list(found["prefill_tok_s"]) == list(found["first_token_s"]) == [512, 1024, 4096]
    for tokens, speed in found["prefill_tok_s"].items():
        assert speed * found["first_token_s"][tokens] == pytest.approx(tokens)


def test_an_unknown_phone_is_answered_with_those_known():
    with pytest.raises(UserError, match="take one of Galaxy S25, "):
        roofline.roofline("mobilemoe_s", "Communicator", load)


def test_a_bundle_shows_the_shapes_of_its_model(exported):
    want, got = exported.weights.config, roofline.config_of(exported.bundle)
    same = ["num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "vocab_size"]
    for name in same:
        assert getattr(got, name) == getattr(want, name)
    assert roofline.work(got) == roofline.work(want)
    if want.moe and got.moe:
        for name in ("num_experts", "num_experts_per_tok", "expert_width", "shared_expert_width"):
            assert getattr(got.moe, name) == getattr(want.moe, name)
    assert (want.moe is None) == (got.moe is None)


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_one_routed_expert_in_the_kernels_form_is_told_from_a_shared_one(exported, tmp_path):
    alone = dataclasses.replace(ROUTED, num_experts=1, num_experts_per_tok=1)
    config = dataclasses.replace(MOE, num_layers=1, moe=alone)
    one = dataclasses.replace(exported, weights=weights.random(config))
    assert roofline.work(roofline.config_of(one.again(tmp_path, "kernel"))) == roofline.work(config)


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_a_bundle_that_computes_all_experts_is_not_predicted_as_if_it_had_none(exported, tmp_path):
    with pytest.raises(UserError, match="computes all experts on every token; name the sparse bundle"):
        roofline.roofline(exported.again(tmp_path, "dense"), "Galaxy S25", load)
