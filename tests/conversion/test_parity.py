"""The PyTorch model against the JAX model that was trained, through the key map."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from conversion import keymap, weights
from conversion.torch_model import MobileMoE, Reference
from moe_jax.config import ModelConfig, QuantConfig
from moe_jax.model.attention import Tokens
from moe_jax.model.layers import Compute
from moe_jax.model.transformer import Transformer
from moe_jax.parallel.mesh import single_device_mesh
from tests.conversion.conftest import DENSE, MOE, ROUTED

SOFTMAX = dataclasses.replace(
    MOE,
    activation="gelu_tanh",
    qk_norm=False,
    moe=dataclasses.replace(ROUTED, score_func="softmax", norm_topk_prob=False, shared_expert_width=0),
)
IDS = np.random.default_rng(2).integers(0, 300, (2, 40)).astype(np.int32)


def pair(config: ModelConfig) -> tuple[Transformer, weights.Weights]:
    """A JAX model with random parameters and its INT4 weights on the other side of the key map."""
    model = nnx.eval_shape(lambda: Transformer(nnx.Rngs(0), config))
    source = weights.random(config, seed=4)
    dense = {
        name: source.int4(name).dequantize() if name in source.int4_names() else source.float(name)
        for name in source.names()
    }
    # Values on the grid give a scale of their own, so the master weights are what decides the codes.
    rng = np.random.default_rng(5)
    parameters = keymap.to_jax(dense, config)
    parameters = {
        path: (value * rng.uniform(0.9, 1.1, value.shape)).astype(np.float32) for path, value in parameters.items()
    }
    state = nnx.state(model)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    assert flat.keys() == parameters.keys()
    for path, leaf in flat.items():
        assert leaf.shape == parameters[path].shape, path
        leaf.set_value(jnp.asarray(parameters[path]))
    nnx.update(model, state)
    return model, weights.from_parameters(parameters, config)


def jax_logits(model: Transformer, quant: QuantConfig) -> np.ndarray:
    compute = Compute(single_device_mesh(), jnp.float32, quant)
    ids = jnp.asarray(IDS)
    tokens = Tokens(jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), jnp.ones_like(ids))

    @nnx.jit
    def forward(model: Transformer) -> jax.Array:
        hidden, _, _ = model(ids, tokens, compute)
        return model.logits(hidden, compute)

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(model))


@pytest.mark.parametrize("config", [MOE, DENSE, SOFTMAX], ids=["moe", "dense", "softmax_gelu"])
def test_logits_equal_those_of_the_jax_model(config):
    model, source = pair(config)
    want = jax_logits(model, QuantConfig(quantize_activations=False))
    ops = Reference(source, int8_activations=False)
    got = MobileMoE(source, ops, 64)(torch.from_numpy(IDS)).numpy()
    assert np.abs(got - want).max() < 1e-4


def test_emulated_int8_activations_round_as_in_training():
    model, source = pair(MOE)
    want = jax_logits(model, QuantConfig())
    got = MobileMoE(source, Reference(source), 64)(torch.from_numpy(IDS)).numpy()
    difference = np.abs(got - want).max(axis=-1)
    # A last-bit difference now and then rounds to the next step, and later positions see that one.
    assert np.median(difference) < 1e-4 and difference.max() < 0.1
