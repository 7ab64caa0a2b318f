"""What stays in float32 while products are in bfloat16, and what INT4 and INT8 are emulated on."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_jax.config import ModelConfig, QuantConfig
from moe_jax.model.attention import Tokens
from moe_jax.model.describe import build
from moe_jax.model.layers import Compute, RMSNorm, parameter
from moe_jax.ops.fake_quant import int4_codes, int4_dequantize, int4_scales
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.paths import flatten_paths, unflatten_paths
from moe_jax.train.state import assemble, disassemble
from tests.tiny import DENSE, MOE, batch, quick

MESH = single_device_mesh()
REAL = 14  # tokens of a row of `batch`


@cache
def initial(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Fresh parameters and biases by path."""
    trees = quick(lambda key: disassemble(build(cfg, key)))(jax.random.key(0))
    return {path: np.array(value) for tree in trees for path, value in flatten_paths(tree).items()}


@quick
def counts_in_bfloat16(flat: dict[str, Any], data: dict[str, Any]) -> Any:
    """Tokens by layer and expert."""
    tokens, compute = Tokens(data["positions"], data["segment_ids"]), Compute(MESH, jnp.dtype("bfloat16"))
    _, stats, _ = assemble(MOE, unflatten_paths(flat), {})(data["tokens"], tokens, compute)
    return stats and stats.counts_E


def test_biases_that_differ_by_less_than_bfloat16_shows_still_choose():
    flat = dict(initial(MOE))
    kernel, bias = (f"layers/ffn/router/{name}" for name in ("kernel", "bias"))
    flat[kernel] = np.zeros_like(flat[kernel])  # all scores are equal
    flat[bias] = (1 + 1e-4 * np.array([[0, 5, 1, 2, 3, 4], [4, 3, 2, 1, 5, 0]])).astype(np.float32)
    assert counts_in_bfloat16(flat, batch(1)).tolist() == [[0, REAL, 0, 0, 0, REAL], [REAL, 0, 0, 0, REAL, 0]]


def test_router_weights_that_differ_by_less_than_bfloat16_shows_still_choose():
    flat = dict(initial(MOE))
    column = np.random.default_rng(0).normal(0, 0.1, (2, MOE.d_model, 1))
    # The longer an expert's column, the better half of the tokens like it, and the less the others.
    flat["layers/ffn/router/kernel"] = (column * (1 + 1e-4 * np.arange(6))).astype(np.float32)
    counts = counts_in_bfloat16(flat, batch(1))
    assert (counts[:, 2:4] == 0).all() and (counts[:, [0, 5]] > 0).all()
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 4] == counts[:, 5]).all()


def test_a_norm_of_bfloat16_is_that_of_float32_rounded_once():
    norm = RMSNorm(64, 1e-5)
    norm.scale[...] = jnp.asarray(np.random.default_rng(0).normal(1, 0.3, 64), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(0, 3, (5, 7, 64)), jnp.bfloat16)
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("quant", [None, QuantConfig()], ids=["float", "qat"])
def test_the_loss_is_the_cross_entropy_of_the_logits(quant):
    model = assemble(DENSE, unflatten_paths(initial(DENSE)), {})
    compute, rng = Compute(MESH, quant=quant), np.random.default_rng(0)
    hidden, targets = rng.normal(size=(2, 10, 64)).astype(np.float32), rng.integers(0, 96, (2, 10))
    weight = rng.integers(0, 2, (2, 10)).astype(np.float32)

    @quick
    def both(hidden, targets, weight):
        return model.loss(hidden, targets, weight, compute, 8), model.logits(hidden, compute)

    loss, logits = both(hidden, targets, weight)
    logits = np.asarray(logits, np.float64)
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert loss == pytest.approx((weight * nats).sum(), rel=1e-5)
    if quant is not None:  # leaving the input of the head in float would show
        plain = hidden @ np.asarray(compute.cut(model.embed.embedding)).T
        assert np.abs(plain - logits).max() > 1e-2


@pytest.mark.parametrize("group", [32, 64])
def test_weights_are_rounded_in_groups_of_the_size_that_is_asked_for(group):
    w = initial(DENSE)["layers/attention/q/kernel"]
    param = parameter(nnx.Rngs(0), w.shape, ("layers", "embed", "heads"), scale=1.0, quant_axis=-2)
    param[...] = jnp.asarray(w)
    cut = Compute(MESH, quant=QuantConfig(group)).cut(param)
    scales = int4_scales(w, -2, group)
    np.testing.assert_array_equal(cut, int4_dequantize(int4_codes(w, scales, -2, group), scales, -2, group))


@pytest.mark.parametrize("cfg", [MOE, DENSE], ids=["moe", "dense"])
def test_matrices_that_write_to_the_residual_start_smaller_by_the_root_of_their_number(cfg):
    for path, value in initial(cfg).items():
        if path.endswith(("scale", "bias")):
            continue
        writes = path.endswith(("down", "attention/o/kernel"))
        # Cut at three deviations, a normal distribution has 0.987 of its deviation.
        assert value.std() == pytest.approx(0.987 * (0.2 / 2 if writes else 0.2), rel=0.05), path
