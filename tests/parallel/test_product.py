"""Products with weights that are cut over the mesh: value and gradients of the plain einsum."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import MeshConfig
from moe_jax.parallel.product import product
from moe_jax.parallel.rules import sharding
from tests.tiny import mesh_of, quick

TOKENS = ("batch", "sequence")
HIDDEN, OUT = (*TOKENS, "activation"), (*TOKENS, "mlp")
# formula, shape and axes of x, of w, axes of the output: every way the model multiplies.
CASES = {
    "columns": ("bsd,df->bsf", (8, 8, 16), HIDDEN, (16, 12), ("embed", "mlp"), OUT),
    "heads": (
        "bsd,dnh->bnhs", (8, 8, 16), HIDDEN, (16, 4, 6), ("embed", "heads", "width"),
        ("batch", "heads", "width", "sequence"),
    ),
    "pair": ("bsd,dcf->bscf", (8, 8, 16), HIDDEN, (16, 2, 12), ("embed", "pair", "mlp"), (*TOKENS, "pair", "mlp")),
    "rows": ("bsf,fd->bsd", (8, 8, 12), OUT, (12, 16), ("mlp", "embed"), HIDDEN),
    "heads_out": (
        "bnsh,nhd->bsd", (8, 4, 8, 6), ("batch", "heads", "sequence", "width"), (4, 6, 16),
        ("heads", "width", "embed"), HIDDEN,
    ),
    "router": ("bsd,de->bse", (8, 8, 16), HIDDEN, (16, 5), ("embed", "router"), (*TOKENS, "router")),
}  # fmt: skip
MESHES = [MeshConfig(fsdp=2, context=2, tensor=2), MeshConfig(slices=2, fsdp=2, expert=2)]


@cache
def operands(name):
    formula, x_shape, _, w_shape, _, _ = CASES[name]
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (x_shape, w_shape))
    grad = jnp.asarray(rng.standard_normal(jnp.einsum(formula, x, w).shape), jnp.float32)
    value, transpose = jax.vjp(lambda x, w: jnp.einsum(formula, x, w), x, w)
    return (x, w, grad), (value, *transpose(grad))


@pytest.mark.parametrize("mesh_sizes", MESHES, ids=["fsdp-context-tensor", "slices-fsdp-expert"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_equal_the_plain_product(name, mesh_sizes):
    formula, _, x_axes, _, w_axes, out_axes = CASES[name]
    (x, w, grad), want = operands(name)
    mesh = mesh_of(mesh_sizes)
    x, w = jax.device_put(x, sharding(mesh, x_axes)), jax.device_put(w, sharding(mesh, w_axes))

    def run(x, w, grad):
        value, transpose = jax.vjp(lambda x, w: product(formula, x, w, mesh, x_axes, w_axes, out_axes), x, w)
        return value, *transpose(grad)

    for a, b in zip(quick(run)(x, w, grad), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_one_device_computes_the_plain_product():
    formula, _, x_axes, _, w_axes, out_axes = CASES["rows"]
    (x, w, _), (value, *_) = operands("rows")
    assert (product(formula, x, w, mesh_of(MeshConfig(fsdp=1)), x_axes, w_axes, out_axes) == value).all()


def test_the_gradient_of_a_weight_is_summed_and_cut_by_one_reduce_scatter():
    """Left to the compiler it is an all-reduce of the whole, several times the traffic."""
    mesh = mesh_of(MeshConfig(fsdp=8))
    x = jax.ShapeDtypeStruct((8, 8, 16), jnp.float32, sharding=sharding(mesh, HIDDEN))
    w = jax.ShapeDtypeStruct((16, 12), jnp.float32, sharding=sharding(mesh, ("embed", "mlp")))
    grad = jax.ShapeDtypeStruct((8, 8, 12), jnp.float32, sharding=sharding(mesh, OUT))

    def gradient(w, x, grad):
        return jax.vjp(lambda w: product("bsd,df->bsf", x, w, mesh, HIDDEN, ("embed", "mlp"), OUT), w)[1](grad)

    text = jax.jit(gradient).lower(w, x, grad).compile().as_text() or ""
    assert "reduce-scatter(" in text
    groups = re.findall(r"all-reduce\(.*replica_groups=\{(.*?)\}, ", text)
    assert all("," not in group for of in groups for group in of.split("},{")), "an all-reduce over several devices"
