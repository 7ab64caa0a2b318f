"""The model against an independent NumPy implementation, and what its parameter tree promises."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import QuantConfig
from moe_jax.generate import Generator, sample
from moe_jax.model.attention import Tokens
from moe_jax.model.describe import build, describe
from moe_jax.model.layers import Compute
from moe_jax.model.rope import rope_frequencies
from moe_jax.ops.fake_quant import int4_codes, int4_dequantize, int4_scales
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.paths import flatten_paths, unflatten_paths
from moe_jax.train.state import assemble, disassemble
from tests.model import reference
from tests.tiny import DENSE, MOE, batch, quick, with_moe


@cache
def _initial(cfg, seed):
    return quick(lambda key: disassemble(build(cfg, key)))(jax.random.key(seed))


def parameters(cfg, seed=0):
    """Random parameters by path; the selection bias is not zero, so that it matters."""
    params, biases = _initial(cfg, seed)
    flat = {k: np.array(v) for k, v in flatten_paths(params).items()}
    rng = np.random.default_rng(seed)
    for path, value in flatten_paths(biases).items():
        flat[path] = rng.normal(0, 0.1, value.shape).astype(np.float32)
    return flat


@partial(quick, static_argnums=(0, 1))
def _forward(cfg, quant, flat, ids, tokens):
    model = assemble(cfg, unflatten_paths(flat), {})
    compute = Compute(single_device_mesh(), quant=quant)
    hidden, stats, _ = model(ids, tokens, compute)
    return model.logits(hidden, compute), stats


def forward(cfg, flat, data, quant=None):
    tokens = Tokens(data["positions"], data["segment_ids"])
    return _forward(cfg, quant, flat, data["tokens"], tokens)


VARIANTS = {
    "mobilemoe": MOE,
    "dense": DENSE,
    "softmax_unnormalised": with_moe(score_func="softmax", norm_topk_prob=False),
    "no_shared_no_bias": with_moe(shared_expert_width=0, use_expert_bias=False),
    "gelu_top1_no_qk_norm": replace(with_moe(num_experts_per_tok=1), activation="gelu_tanh", qk_norm=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_an_independent_implementation(name):
    cfg, data = VARIANTS[name], batch(1)
    flat = parameters(cfg)
    got, _ = forward(cfg, flat, data)
    real = data["segment_ids"][0] > 0
    row = (data[k][0] for k in ("tokens", "positions", "segment_ids"))
    want = reference.logits(flat, cfg, *row)
    np.testing.assert_allclose(np.asarray(got)[0][real], want[real], rtol=2e-4, atol=2e-4)


def test_packed_documents_do_not_see_each_other():
    flat, data = parameters(MOE), batch(1)
    before, _ = forward(MOE, flat, data)
    changed = data | {"tokens": data["tokens"].copy()}
    changed["tokens"][:, :5] = (changed["tokens"][:, :5] + 1) % 96
    after, _ = forward(MOE, flat, changed)
    np.testing.assert_allclose(before[:, 5:14], after[:, 5:14], atol=1e-5)
    assert not np.allclose(before[:, :5], after[:, :5], atol=1e-3)


def test_router_counts_leave_padding_out():
    data = batch(1)
    _, stats = forward(MOE, parameters(MOE), data)
    assert (np.asarray(stats.counts_E).sum(-1) == (data["segment_ids"] > 0).sum() * 2).all()
    assert (np.asarray(stats.dropped) == 0).all()


def test_ties_go_to_the_lower_expert():
    flat = parameters(MOE)
    flat["layers/ffn/router/kernel"] = np.zeros_like(flat["layers/ffn/router/kernel"])
    flat["layers/ffn/router/bias"] = np.zeros_like(flat["layers/ffn/router/bias"])
    _, stats = forward(MOE, flat, batch(1))
    counts = np.asarray(stats.counts_E)
    assert (counts[:, :2] == 14).all() and (counts[:, 2:] == 0).all()


def test_the_bias_moves_the_selection_and_never_the_weights():
    cfg = with_moe(num_experts=2, num_experts_per_tok=2)  # every expert is chosen whatever the bias
    flat, data = parameters(cfg), batch(1)
    shifted = flat | {"layers/ffn/router/bias": flat["layers/ffn/router/bias"] + [[0.0, 3.0]] * 2}
    np.testing.assert_allclose(forward(cfg, flat, data)[0], forward(cfg, shifted, data)[0], atol=1e-5)
    biased = parameters(MOE)
    biased["layers/ffn/router/bias"][:, 3] = 10.0
    _, stats = forward(MOE, biased, data)
    assert (np.asarray(stats.counts_E)[:, 3] == 14).all()


def test_drop_and_pad_counts_what_it_drops():
    data = batch(1)
    flat = parameters(MOE)
    flat["layers/ffn/router/bias"][:, 0] = 10.0  # every token wants expert 0
    tight = with_moe(dispatch="drop_and_pad", capacity_factor=1.0)
    _, stats = forward(tight, flat, data)
    capacity = -(-16 * 2 // 6)
    kept = np.minimum(np.asarray(stats.counts_E), capacity).sum(-1)
    assert (np.asarray(stats.dropped) == np.asarray(stats.counts_E).sum(-1) - kept).all()
    assert (np.asarray(stats.dropped) > 0).all()


def test_drop_and_pad_with_room_for_all_equals_dropless():
    roomy = with_moe(dispatch="drop_and_pad", capacity_factor=6.0)
    flat, data = parameters(MOE), batch(1)
    np.testing.assert_allclose(forward(MOE, flat, data)[0], forward(roomy, flat, data)[0], atol=1e-5)


@pytest.mark.parametrize("cfg", [MOE, DENSE], ids=["moe", "dense"])
def test_every_quantisable_leaf_is_fake_quantised(cfg):
    """Weights on the grid give the same result with and without QAT, so none escapes it, none is hit twice."""
    flat, data = parameters(cfg), batch(1)
    weights_only = QuantConfig(quantize_activations=False)
    on_grid = dict(flat)
    for path, leaf in describe(cfg).items():
        if leaf.quant_axis is not None:
            scales = int4_scales(flat[path], leaf.quant_axis)
            codes = int4_codes(flat[path], scales, leaf.quant_axis)
            on_grid[path] = int4_dequantize(codes, scales, leaf.quant_axis)
    expected, _ = forward(cfg, on_grid, data)
    got, _ = forward(cfg, flat, data, weights_only)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for path, leaf in describe(cfg).items():
        if leaf.quant_axis is not None:  # leaving any one of them in float would show
            escaped, _ = forward(cfg, on_grid | {path: flat[path]}, data)
            assert np.abs(np.asarray(escaped) - np.asarray(expected)).max() > 1e-3, path


def test_only_router_norms_and_bias_stay_in_float():
    floats = {path for path, leaf in describe(MOE).items() if leaf.quant_axis is None}
    assert floats == {
        "final_norm/scale",
        "layers/attention_norm/scale",
        "layers/ffn_norm/scale",
        "layers/ffn/router/kernel",
        "layers/ffn/router/bias",
    }


def test_rope_scaling_selects_by_wavelength():
    cfg = replace(MOE.rope, theta=500_000.0, original_max_position_embeddings=8192)
    unscaled = 500_000.0 ** (-np.arange(32) / 32)
    ratio = unscaled / rope_frequencies(cfg, 64)
    np.testing.assert_allclose(ratio[:18], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[18:], 16, rtol=1e-6)


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["float", "qat"])
def test_cached_generation_equals_the_uncached_forward(quant):
    generator = Generator(MOE, parameters(MOE), quant)
    prompt = [5, 17, 3, 80, 41]
    answer = generator.generate(prompt, 6)
    uncached = generator.logits([*prompt, *answer])
    for n in range(6):
        seen = uncached[len(prompt) + n - 1]
        assert seen[answer[n]] >= seen.max() - 1e-4


def test_no_token_is_dropped_in_use_however_full_an_expert_is():
    """Trained with a capacity of half the mean, a model still answers a prefix alike whatever follows it."""
    full = with_moe(dispatch="drop_and_pad", capacity_factor=0.5)
    ids = list(np.random.default_rng(0).integers(0, MOE.vocab_size, 48))
    logits = Generator(full, parameters(full)).logits(ids)
    np.testing.assert_array_equal(logits, Generator(MOE, parameters(MOE)).logits(ids))
    np.testing.assert_allclose(Generator(full, parameters(full)).logits(ids[:24]), logits[:24], rtol=0, atol=1e-4)


def test_generation_stops_at_a_stop_token():
    generator = Generator(MOE, parameters(MOE))
    answer = generator.generate([5, 17, 3], 8)
    assert generator.generate([5, 17, 3], 8, stop_ids=[answer[2]]) == answer[: answer.index(answer[2]) + 1]


def test_sampling_is_seeded_and_top_p_keeps_the_head_of_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    draws = [int(sample(logits, jax.random.key(i), 1.0, 0.7)) for i in range(200)]
    assert set(draws) == {0, 1}
    assert int(sample(logits, jax.random.key(0), 0.0, 1.0)) == 0
