"""The router's scores, choice and losses against a few lines of NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.model.layers import ExpertBias
from moe_jax.model.moe import Router, normalised
from moe_jax.parallel.mesh import single_device_mesh
from tests.tiny import quick, with_moe

WIDTH, TOP, SCALE = 8, 2, 2.5
REAL = np.arange(3 * 20).reshape(3, 20) % 20 < [[20], [12], [4]]


def router(experts: int, score_func: str) -> Any:
    """The function of (x [3, 20, width], kernel, bias) -> (ids, weights, stats), where REAL is not padding."""
    cfg = with_moe(num_experts=experts, num_experts_per_tok=TOP, score_func=score_func, routed_scaling_factor=SCALE)

    def run(x, kernel, bias):
        assert cfg.moe is not None
        layer = Router(nnx.Rngs(0), cfg, cfg.moe)
        layer.kernel, layer.bias = nnx.Param(kernel), ExpertBias(bias)
        return layer(x, jnp.asarray(REAL), single_device_mesh())

    return run


def test_logits_are_products_of_float32_and_not_of_its_upper_half():
    """A TPU multiplies float32 as bfloat16 unless told otherwise, which no test on a CPU sees."""
    x, kernel, bias = drawn(8)
    program = str(jax.make_jaxpr(jax.grad(lambda k: router(8, "sigmoid")(x, k, bias)[1].sum()))(kernel))
    products = [line for line in program.splitlines() if "dot_general[" in line]
    assert len(products) >= 2 and "bf16" not in program
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == program.count("dot_general[")


def drawn(experts: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x, kernel, bias) from normal distributions."""
    rng = np.random.default_rng(seed)
    x, kernel = rng.normal(size=(3, 20, WIDTH)), 0.5 * rng.normal(size=(WIDTH, experts))
    return x.astype(np.float32), kernel.astype(np.float32), rng.normal(size=experts).astype(np.float32)


def expected(x, kernel, bias, score_func: str) -> dict[str, np.ndarray]:
    """What the router should say of the real tokens."""
    logits = x[REAL].astype(np.float64) @ kernel.astype(np.float64)
    exponentials, experts = np.exp(logits), logits.shape[-1]
    scores = 1 / (1 + 1 / exponentials)
    if score_func == "softmax":
        scores = exponentials / exponentials.sum(-1, keepdims=True)
    ids = np.argsort(-(scores + bias), axis=-1)[:, :TOP]
    weights = np.take_along_axis(scores, ids, -1)
    counts = np.bincount(ids.ravel(), minlength=experts)
    probability = (scores / scores.sum(-1, keepdims=True)).mean(0)
    return {
        "ids": ids,
        "weights": SCALE * weights / weights.sum(-1, keepdims=True),
        "counts": counts,
        "z_loss": (np.log(exponentials.sum(-1)) ** 2).mean(),
        "aux_loss": experts * (counts / ids.size * probability).sum(),
    }


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("experts", [6, 200])  # more than an int8 can name
def test_choice_weights_counts_and_losses_are_of_exact_scores_of_the_real_tokens(experts, score_func):
    x, kernel, bias = drawn(experts)
    ids, weights, stats = quick(router(experts, score_func))(x, kernel, bias)
    want = expected(x, kernel, bias, score_func)
    np.testing.assert_array_equal(np.asarray(ids)[REAL], want["ids"])
    assert (np.asarray(ids)[~REAL] == experts).all()
    np.testing.assert_allclose(np.asarray(weights)[REAL], want["weights"], rtol=1e-5)
    np.testing.assert_array_equal(stats.counts_E, want["counts"])
    assert stats.z_loss == pytest.approx(want["z_loss"], rel=1e-5)
    assert stats.aux_loss == pytest.approx(want["aux_loss"], rel=1e-5)


@pytest.mark.parametrize("experts", [128, 129, 256, 257])  # the last one at the ends of int8 and of uint8
def test_the_last_of_many_experts_can_be_chosen(experts):
    x, kernel, bias = drawn(experts)
    bias[-1] = 99
    ids, _, stats = quick(router(experts, "sigmoid"))(x, kernel, bias)
    assert (np.asarray(ids)[REAL][:, 0] == experts - 1).all() and stats.counts_E[-1] == REAL.sum()


def test_the_balance_loss_is_one_where_tokens_and_scores_are_spread_evenly():
    x = np.zeros((3, 20, WIDTH), np.float32)
    x[REAL, :6] = [np.roll([3.0, 2, 1, 0, -1, -2], n) for n in range(36)]
    _, _, stats = quick(router(6, "sigmoid"))(x, np.eye(WIDTH, 6, dtype=np.float32), np.zeros(6, np.float32))
    assert (np.asarray(stats.counts_E) == 12).all()
    assert stats.aux_loss == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("loss", ["aux_loss", "z_loss"])
def test_both_losses_move_the_scores_as_their_definitions_say(loss, score_func):
    x, kernel, bias = drawn(6)
    run = router(6, score_func)
    slope = quick(jax.grad(lambda kernel: getattr(run(x, kernel, bias)[2], loss)))(kernel)
    way = np.random.default_rng(1).normal(size=kernel.shape)
    ends = [expected(x, kernel + step * way, bias, score_func)[loss] for step in (1e-6, -1e-6)]
    numeric = (ends[0] - ends[1]) / 2e-6
    assert np.vdot(slope, way) == pytest.approx(numeric, rel=1e-3) and abs(numeric) > 1e-3


def test_scores_of_bfloat16_activations_are_taken_in_float32():
    x, kernel, bias = drawn(6)
    rounded = jnp.asarray(x, jnp.bfloat16)
    _, weights, stats = quick(router(6, "sigmoid"))(rounded, kernel, bias)
    want = expected(np.asarray(rounded, np.float32), kernel, bias, "sigmoid")
    np.testing.assert_allclose(np.asarray(weights)[REAL], want["weights"], rtol=1e-5)
    assert stats.z_loss == pytest.approx(want["z_loss"], rel=1e-5)


@pytest.mark.parametrize("level", [0, -10, -44, -50, -85])
def test_a_token_that_no_expert_wants_has_sound_weights_and_gradients(level):
    logits = np.array([level, level + 0.5, level - 2.0])

    def first(logits):
        return normalised(jax.nn.sigmoid(logits))[0]

    weight, slopes = jax.value_and_grad(first)(jnp.asarray(logits, jnp.float32))
    scores = 1 / (1 + np.exp(-logits))
    shares = scores / (scores.sum() + 1e-20)
    np.testing.assert_allclose(weight, shares[0], rtol=1e-4)
    np.testing.assert_allclose(slopes, shares[0] * (np.eye(3)[0] - shares) * (1 - scores), rtol=1e-3)


def test_scores_that_are_all_nothing_have_no_weights_and_no_gradients():
    weights, slopes = jax.vjp(normalised, jnp.zeros(3))
    assert not weights.any() and np.isfinite(slopes(jnp.ones(3))[0]).all()


def test_at_usual_scores_the_quotient_has_the_bits_of_the_plain_one():
    scores = jax.nn.sigmoid(3 * jax.random.normal(jax.random.key(0), (500, 4)))
    np.testing.assert_array_equal(normalised(scores), scores / scores.sum(-1, keepdims=True))
