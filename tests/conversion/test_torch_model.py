"""The PyTorch model against definitions written here independently."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from conversion import torch_ops, weights
from conversion.torch_model import MobileMoE, Reference, StaticCache, rotary_tables
from moe_jax.model.moe import normalised
from tests.conversion.conftest import DENSE, MOE, ROUTED

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12)).astype(np.int32)


def build(config, **options):
    model = weights.random(config)
    return model, MobileMoE(model, Reference(model, **options), 32)


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_a_prefilled_cache_and_single_steps_equal_the_full_forward(config):
    _, model = build(config)
    full = model(torch.from_numpy(TOKENS[:1]))
    shape = (config.num_kv_heads, 16, config.head_dim)
    keys, values = ([torch.zeros(1, *shape)] * config.num_layers for _ in range(2))
    for start, end in ((0, 7), *((i, i + 1) for i in range(7, 12))):
        positions = torch.arange(start, end, dtype=torch.int32)
        mask = torch.where(torch.arange(16)[None] <= positions[:, None], 0.0, -1e30)
        cache = StaticCache(keys, values, StaticCache.start_of(positions))
        tokens = torch.from_numpy(TOKENS[:1, start:end])
        logits = model.head(model.hidden(tokens, positions, mask[None, None], cache))
        keys, values = cache.k, cache.v
        assert torch.allclose(logits, full[:, start:end], atol=1e-4)


def test_a_later_token_changes_no_earlier_logits():
    _, model = build(MOE)
    changed = TOKENS.copy()
    changed[:, 8:] = 5
    a, b = model(torch.from_numpy(TOKENS)), model(torch.from_numpy(changed))
    assert torch.allclose(a[:, :8], b[:, :8], atol=1e-5)


def test_rotation_turns_adjacent_pairs_and_slows_long_waves():
    width = 64
    config = dataclasses.replace(MOE, head_dim=width)
    cos, sin = rotary_tables(config, 100)
    assert np.array_equal(cos[:, 0::2], cos[:, 1::2])
    plain = 500_000.0 ** (-np.arange(32) / 32)
    angle = np.arctan2(sin[1, ::2], cos[1, ::2])
    np.testing.assert_allclose(angle[:18], plain[:18], rtol=1e-5)
    np.testing.assert_allclose(angle[18:], plain[18:] / 16, rtol=1e-5)
    model = weights.random(config)
    x = torch.randn(1, width)
    turned = x @ MobileMoE(model, Reference(model), 4).turn
    assert torch.equal(turned[0, 0::2], -x[0, 1::2]) and torch.equal(turned[0, 1::2], x[0, 0::2])


def test_the_bias_chooses_experts_and_never_weighs_them():
    source, model = build(MOE)
    name, h = "model.layers.0.feed_forward", torch.randn(6, 64)
    scores = torch.sigmoid(h @ torch.from_numpy(source.float(f"{name}.router.weight")).T)
    bias = torch.zeros(5)
    bias[3] = 10.0
    dict(model.named_buffers())["model_layers_0_feed_forward_expert_bias"].copy_(bias)
    ops, given = Reference(source), model.expert_bias(0, ROUTED)
    ids, routing = ops.route(h, ROUTED, f"{name}.router.weight", given)
    assert torch.all(ids[:, 0] == 3)
    chosen = scores.gather(1, ids.long())
    assert torch.allclose(routing, 2.5 * chosen / chosen.sum(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("level", [0, -20, -44, -50, -80])
def test_a_token_that_no_expert_wants_has_the_weights_that_it_has_in_training(level):
    logits = level + torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    class Given(Reference):
        def router(self, h, name):
            return logits

    _, routing = Given(weights.random(MOE)).route(torch.zeros(6, 64), ROUTED, "", torch.zeros(5))
    chosen = torch.sigmoid(logits).sort(descending=True).values[:, :2].numpy()
    np.testing.assert_allclose(routing, 2.5 * normalised(jnp.asarray(chosen)), rtol=1e-5)


def test_equal_scores_go_to_the_lower_index():
    scores = torch.tensor([[0.5, 0.7, 0.5, 0.7, 0.1]])
    assert torch_ops.top_k(scores, 3).tolist() == [[1, 3, 0]]


def test_every_expert_runs_on_its_own_tokens_only():
    source, _ = build(MOE, int8_activations=False)
    ops, name = Reference(source, int8_activations=False), "model.layers.1.feed_forward.experts"
    h = torch.randn(4, 64)
    ids = torch.tensor([[0, 4], [4, 1], [2, 2], [3, 0]], dtype=torch.int32)
    routing = torch.rand(4, 2)
    got = ops.experts(h, ids, routing, name)
    gate_up, down = (source.int4(f"{name}.{p}_proj").dequantize() for p in ("gate_up", "down"))
    for token in range(4):
        want = torch.zeros(64)
        for slot in range(2):
            expert = int(ids[token, slot])
            gate, up = (torch.from_numpy(gate_up[expert]) @ h[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            want += routing[token, slot] * (torch.from_numpy(down[expert]) @ inner)
        assert torch.allclose(got[token], want, atol=1e-5)
