"""The key map: one table, both directions."""

import dataclasses

import numpy as np
import pytest

from conversion import keymap
from moe_jax.errors import UserError
from moe_jax.model.describe import describe
from tests.conversion.conftest import DENSE, MOE, ROUTED

NO_SHARED = dataclasses.replace(MOE, moe=dataclasses.replace(ROUTED, shared_expert_width=0))


def parameters(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = keymap.jax_shapes(config)
    return {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.mark.parametrize("config", [MOE, DENSE, NO_SHARED], ids=["moe", "dense", "no_shared"])
def test_the_way_there_and_back_changes_nothing(config):
    there = parameters(config)
    tensors = {tensor.name: value for tensor, value in keymap.to_torch(there, config)}
    back = keymap.to_jax(tensors, config)
    assert back.keys() == there.keys()
    assert all(np.array_equal(back[path], there[path]) for path in there)


def test_shapes_and_names_are_those_of_the_published_layout():
    shapes = {tensor.name: tensor.shape for tensor in keymap.torch_tensors(MOE)}
    assert shapes["model.embed_tokens"] == (300, 64)
    assert shapes["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert shapes["model.layers.0.feed_forward.router.weight"] == (5, 64)
    assert shapes["model.layers.0.feed_forward.experts.gate_up_proj"] == (5, 64, 64)
    assert shapes["model.layers.0.feed_forward.experts.down_proj"] == (5, 64, 32)
    assert shapes["model.layers.1.feed_forward.shared_expert.up_proj"] == (64, 64)
    assert not any("shared" in tensor.name for tensor in keymap.torch_tensors(NO_SHARED))


@pytest.mark.parametrize("config", [MOE, DENSE, NO_SHARED], ids=["moe", "dense", "no_shared"])
def test_every_parameter_of_a_model_has_its_row(config):
    assert keymap.jax_shapes(config) == {path: leaf.shape for path, leaf in describe(config).items()}


def test_gate_and_up_come_apart_in_order():
    there = parameters(DENSE)
    tensors = {tensor.name: value for tensor, value in keymap.to_torch(there, DENSE)}
    gate_up = there["layers/ffn/gate_up"]
    assert np.array_equal(tensors["model.layers.1.feed_forward.gate_proj"], gate_up[1, :, 0].T)
    assert np.array_equal(tensors["model.layers.1.feed_forward.up_proj"], gate_up[1, :, 1].T)


def test_every_product_and_the_embedding_are_int4_and_nothing_else():
    names = {tensor.name for tensor in keymap.torch_tensors(MOE) if not tensor.int4}
    assert all(name.endswith((".weight", ".expert_bias")) for name in names)
    assert len(names) == 1 + 4 * MOE.num_layers


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_foreign_checkpoint_is_refused_by_the_name_that_is_wrong(change):
    there = parameters(MOE)
    if change == "missing":
        del there["final_norm/scale"]
    elif change == "extra":
        there["layers/ffn/down"] = np.zeros(3, np.float32)
    else:
        there["layers/ffn/router/bias"] = np.zeros((2, 4), np.float32)
    named = {"missing": "final_norm/scale", "extra": "layers/ffn/down", "shape": "router/bias"}
    with pytest.raises(UserError, match=named[change]):
        list(keymap.to_torch(there, MOE))
