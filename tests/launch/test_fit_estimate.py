"""What is worked out from shapes before anything is compiled, and the order in which a search compiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch.fit_estimate import estimated_bytes, least_seconds
from launch.fit_program import count_grouped, pairs_per_call, visited_rows
from launch.fit_search import Candidate, search
from launch.hlo import read_program
from launch.slices import parse_slice
from moe_jax.chips import chip_named
from tests.launch.programs import saved
from tests.launch.test_fit import GB, candidate, small

ONE = {"slices": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
KIND = parse_slice("v5e:2x2")


# ---- memory and traffic -----------------------------------------------------------------------------


def test_moments_in_the_hosts_memory_leave_the_parameters_alone_on_the_device():
    state, temp = estimated_bytes(small(), ONE | {"fsdp": 4})
    assert estimated_bytes(small("optimizer.offload=true"), ONE | {"fsdp": 4}) == (state / 3, temp)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_axis_that_cuts_the_vocabulary_cuts_the_logits_of_a_chunk(tensor):
    sizes = ONE | {"fsdp": 4 // tensor, "tensor": tensor}
    few, many = (estimated_bytes(small(f"loss_chunk={chunk}"), sizes)[1] for chunk in (1024, 2048))
    assert many - few == pytest.approx(2 * 1024 * 2048 / tensor)


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_larger_vocabulary_takes_logits_and_the_gathered_table_with_its_gradient(tensor):
    cfg, sizes = small(), ONE | {"fsdp": 4 // tensor, "tensor": tensor}
    larger = replace(cfg, model=replace(cfg.model, vocab_size=2 * cfg.model.vocab_size))
    few, many = (estimated_bytes(each, sizes) for each in (cfg, larger))
    added = cfg.model.vocab_size / tensor
    gradient = 4 * (many[0] - few[0]) / 12  # of a parameter's 12 bytes of state
    assert many[1] - few[1] == pytest.approx(gradient + (2 * cfg.loss_chunk + 6 * cfg.model.d_model) * added)


@pytest.mark.parametrize("axis", ["fsdp", "data"])
def test_every_microbatch_gathers_the_parameters_and_reduces_their_gradients_anew(axis):
    cfg, sizes = small("data.global_batch_size=16"), ONE | {axis: 4}
    once = least_seconds(cfg, sizes, KIND)[2]
    assert once > 0
    assert least_seconds(replace(cfg, gradient_accumulation=4), sizes, KIND)[2] == pytest.approx(4 * once)


def test_gradients_take_longer_between_slices_than_within_one():
    cfg = small()
    within, between = (least_seconds(cfg, ONE | {axis: 2, "fsdp": 2}, KIND)[2] for axis in ("data", "slices"))
    assert between > within


@pytest.mark.parametrize(("remat", "times"), [("full", 6), ("nothing", 4)])
def test_experts_on_several_devices_gather_the_tokens_of_all_of_them_in_every_layer(remat, times):
    cfg = small(f"remat={remat}")
    # Forward, again where the forward pass is repeated, and backward: each time once in and once out.
    tokens = cfg.tokens_per_step  # of the group's four devices
    sent = times * cfg.model.num_layers * 2 * tokens * cfg.model.d_model
    links = 2 * chip_named("v5e").ici_link_bandwidth  # of a 2x2, one along each axis
    assert least_seconds(cfg, ONE | {"expert": 4}, KIND)[2] == pytest.approx(sent * 3 / 4 / links)


# ---- grouped products -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "accumulation", "sizes", "pairs"),
    [
        (64, 1, {"fsdp": 4}, 512 * 64 // 4 * 4),
        (64, 4, {"fsdp": 4}, 512 * 64 // 4 // 4 * 4),
        # 16384 tokens on a device: alone they are one pass of 65536 pairs, those of two devices are two.
        (128, 1, {"fsdp": 4}, 65536),
        (128, 1, {"fsdp": 2, "expert": 2}, 65536 // 2),
    ],
)
def test_a_grouped_product_has_the_pairs_of_one_pass_of_one_microbatch(batch, accumulation, sizes, pairs):
    cfg = small(f"data.global_batch_size={batch}", f"gradient_accumulation={accumulation}")
    assert pairs_per_call(cfg, ONE | sizes) == pairs


def test_an_expert_of_few_pairs_has_a_tile_all_the_same():
    assert visited_rows(60, 60, 128) == 60 * 128


@pytest.mark.parametrize("expert", [1, 2])
def test_a_device_visits_the_tiles_of_its_own_experts_alone(expert):
    text, sizes = saved("experts"), ONE | {"fsdp": 4 // expert, "expert": expert}
    _, over = count_grouped(read_program(text), text, small(), sizes)
    # 256 by 256 are whole tiles: only the rows are more than the 512 tokens' 4 pairs each.
    assert over == pytest.approx(visited_rows(2048, 60 // expert, 128) / 2048)


# ---- the order of a search --------------------------------------------------------------------------


def searched(candidates: list[Candidate], available: int, growth: float) -> list[float]:
    """Speeds promised by what is compiled, in turn, where all take `growth` of their estimated temporaries."""
    tried: list[float] = []

    def measure(cfg) -> dict[str, Any]:
        chosen = next(c for c in candidates if c.cfg is cfg)
        tried.append(chosen.tokens_per_second)
        temp, line = growth * chosen.temp, {"tokens_per_second_per_chip": 0.6 * chosen.tokens_per_second}
        return {"fits": chosen.args + temp <= available, "temp_gb": temp / GB, "roofline": line}

    search(candidates, available, measure, max_compiles=6)
    return tried


def test_a_policy_that_was_not_compiled_yet_is_taken_to_grow_like_the_one_that_grew_most():
    many = [candidate(100, "nothing", 9e9), candidate(90, "full", 8e9), candidate(80, "full", 4e9)]
    # 9 GB proves to be 18: 8 GB of another policy are not tried either.
    assert searched(many, 12 * GB, growth=2) == [100, 80]


def test_an_estimate_that_takes_the_last_of_the_memory_is_not_trusted():
    assert searched([candidate(100, "full", 10.8e9), candidate(90, "full", 4e9)], 12 * GB, growth=1) == [90]
