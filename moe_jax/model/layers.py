"""Parameters and the simple layers: how a weight is declared, normalised, multiplied and quantised.

`parameter` is the only way a weight comes into being; the metadata it attaches (logical axes, the axis that
INT4 groups run along) is read by sharding, QAT coverage, parameter counts and export.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from moe_jax.config import ModelConfig, QuantConfig
from moe_jax.ops.fake_quant import fake_quant, fake_quant_rows
from moe_jax.ops.gating import activate
from moe_jax.parallel.product import product
from moe_jax.parallel.rules import constrain


class ExpertBias(nnx.Variable):
    """The router's selection bias: checkpointed, moved by balancing, never seen by the optimizer."""


@dataclass(frozen=True)
class Compute:
    """How and where products are computed: device mesh, type, and the quantisation to emulate (None: float)."""

    mesh: Mesh
    dtype: jnp.dtype = jnp.float32
    quant: QuantConfig | None = None

    def products(self) -> AbstractContextManager:
        """What to trace products and their gradients in: a TPU takes 8 bits of float32 unless told otherwise."""
        return jax.default_matmul_precision("highest") if self.dtype == jnp.float32 else nullcontext()

    def cut(self, param: nnx.Variable) -> jax.Array:
        """A master weight as a product sees it, fake-quantised along its input and cast; still cut over fsdp."""
        w = param[...]
        if self.quant is not None:
            w = fake_quant(w, param.quant_axis, self.quant.weight_group_size)
        # Inside the layer scan the leading "layers" axis is gone.
        return constrain(w.astype(self.dtype), self.mesh, param.axes[-w.ndim :])

    def activation(self, x: jax.Array) -> jax.Array:
        """The input of a quantised product: rounded to INT8 per row when emulating, and cast."""
        if self.quant is not None and self.quant.quantize_activations:
            x = fake_quant_rows(x)
        return x.astype(self.dtype)

    def hidden(self, x_BSD: jax.Array) -> jax.Array:
        """The residual stream, held where its tokens are."""
        return constrain(x_BSD, self.mesh, ("batch", "sequence", "activation"))


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, scale: float, quant_axis: int | None = None
) -> nnx.Param:
    """A float32 weight, normal of deviation `scale` cut at three of them; `axes` names each dimension for sharding.

    `quant_axis` (negative) is the input dimension, along which INT4 groups run; None keeps it in float.
    """
    assert len(shape) == len(axes), f"{shape} has {len(shape)} dimensions, {axes} names {len(axes)}"
    value = scale * jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32)
    return nnx.Param(value, axes=axes, quant_axis=quant_axis)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32, no mean and no offset; the scales of L layers are stacked."""

    def __init__(self, width: int, eps: float, stack: tuple[int, ...] = ()):
        axes = ("layers",) * len(stack) + ("norm",)
        self.scale = nnx.Param(jnp.ones((*stack, width)), axes=axes, quant_axis=None)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        exact = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.eps)
        return (exact * inverse * self.scale[...]).astype(x.dtype)


class Linear(nnx.Module):
    """The matrix of x @ kernel, without bias: `kernel` is [L, in, out], stacked over layers."""

    def __init__(self, rngs, layers: int, shape: tuple[int, int], axes: tuple[str, str], scale: float):
        self.kernel = parameter(rngs, (layers, *shape), ("layers", *axes), scale=scale, quant_axis=-2)


class GatedFFN(nnx.Module):
    """act(x @ gate) * (x @ up) @ down, gate and up as one product: `gate_up` [L, D, 2, F], `down` [L, F, D].

    The pair is an axis of its own so that F can be sharded without separating a gate from its up.
    """

    def __init__(self, rngs: nnx.Rngs, cfg: ModelConfig, width: int):
        layers, model = cfg.num_layers, cfg.d_model
        self.gate_up = parameter(
            rngs, (layers, model, 2, width), ("layers", "embed", "pair", "mlp"),
            scale=cfg.init_scale, quant_axis=-3,
        )  # fmt: skip
        self.down = parameter(
            rngs, (layers, width, model), ("layers", "mlp", "embed"),
            scale=cfg.output_init_scale, quant_axis=-2,
        )  # fmt: skip
        self.activation = cfg.activation

    def __call__(self, x_BSD: jax.Array, compute: Compute) -> jax.Array:
        pair_BS2F = product(
            "bsd,dcf->bscf", compute.activation(x_BSD), compute.cut(self.gate_up), compute.mesh,
            ("batch", "sequence", "activation"), ("embed", "pair", "mlp"), ("batch", "sequence", "pair", "mlp"),
        )  # fmt: skip
        hidden_BSF = activate(self.activation, pair_BS2F[..., 0, :]) * pair_BS2F[..., 1, :]
        return product(
            "bsf,fd->bsd", compute.activation(hidden_BSF), compute.cut(self.down), compute.mesh,
            ("batch", "sequence", "mlp"), ("mlp", "embed"), ("batch", "sequence", "activation"),
        )  # fmt: skip
