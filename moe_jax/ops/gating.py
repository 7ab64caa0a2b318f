"""act(gate) * up * weight on rows of gate|up: one pass forward, one backward.

On TPU a Pallas kernel: XLA would split the pair, concatenate its gradient and move each row's weight from
lanes to rows, in several passes over the largest arrays of the layer.
Legend: R rows, F width of one half.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax.chips import LANES

BLOCK = 4  # times 128 rows: one step of a kernel


def activate(name: str, x: jax.Array) -> jax.Array:
    """silu or gelu_tanh."""
    return jax.nn.silu(x) if name == "silu" else jax.nn.gelu(x, approximate=True)


def gate_rows(pair_R2F: jax.Array, mix_R: jax.Array, activation: str) -> jax.Array:
    """act(first half) * second half * mix, in float32, [R, F] in the type of `pair`."""
    gate, up = jnp.split(pair_R2F.astype(jnp.float32), 2, axis=-1)
    return (activate(activation, gate) * up * mix_R[:, None]).astype(pair_R2F.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gate_rows_fused(pair_R2F: jax.Array, mix_R: jax.Array, activation: str, interpret: bool = False) -> jax.Array:
    """`gate_rows` by kernel; R must be a multiple of 128."""
    rows, width = pair_R2F.shape[0], pair_R2F.shape[1] // 2
    return pl.pallas_call(
        partial(_forward_kernel, activation),
        grid=(pl.cdiv(rows, BLOCK * LANES),),
        in_specs=[_rows(2 * width), _lanes()],
        out_specs=_rows(width),
        out_shape=jax.ShapeDtypeStruct((rows, width), pair_R2F.dtype),
        interpret=interpret,
        name="gate",
    )(pair_R2F, mix_R.reshape(-1, 1, LANES))


def _rows(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((BLOCK * LANES, width), lambda i: (i, 0))


def _lanes() -> pl.BlockSpec:
    """A value per row, dense in memory: [R / 128, 1, 128]."""
    return pl.BlockSpec((BLOCK, 1, LANES), lambda i: (i, 0, 0))


def _transposed(values: jax.Array) -> jax.Array:
    """[1, 128] along lanes -> [128, 1] along rows, or back, by way of a diagonal."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return jnp.where(row == lane, values, 0).sum(values.shape.index(1) ^ 1, keepdims=True)


def _forward_kernel(activation: str, pair, mix, out):
    width = out.shape[1]
    for block in range(BLOCK):
        rows = pl.ds(block * LANES, LANES)
        gate, up = pair[rows, :width].astype(jnp.float32), pair[rows, width:].astype(jnp.float32)
        out[rows, :] = (activate(activation, gate) * up * _transposed(mix[block])).astype(out.dtype)


def _backward_kernel(activation: str, pair, mix, grad, grad_pair, grad_mix):
    width = grad.shape[1]
    for block in range(BLOCK):
        rows = pl.ds(block * LANES, LANES)
        gate, up = pair[rows, :width].astype(jnp.float32), pair[rows, width:].astype(jnp.float32)
        upstream = grad[rows, :].astype(jnp.float32)
        acted, derivative = jax.jvp(partial(activate, activation), (gate,), (jnp.ones_like(gate),))
        grad_mix[block] = _transposed((upstream * acted * up).sum(1, keepdims=True))
        upstream *= _transposed(mix[block])
        grad_pair[rows, :width] = (upstream * up * derivative).astype(grad_pair.dtype)
        grad_pair[rows, width:] = (upstream * acted).astype(grad_pair.dtype)


def _fused_forward(pair_R2F, mix_R, activation, interpret):
    return gate_rows_fused(pair_R2F, mix_R, activation, interpret), (pair_R2F, mix_R)


def _fused_backward(activation, interpret, residuals, grad_RF):
    pair_R2F, mix_R = residuals
    rows, width = grad_RF.shape
    grad_pair, grad_mix = pl.pallas_call(
        partial(_backward_kernel, activation),
        grid=(pl.cdiv(rows, BLOCK * LANES),),
        in_specs=[_rows(2 * width), _lanes(), _rows(width)],
        out_specs=[_rows(2 * width), _lanes()],
        out_shape=[
            jax.ShapeDtypeStruct(pair_R2F.shape, pair_R2F.dtype),
            jax.ShapeDtypeStruct((rows // LANES, 1, LANES), jnp.float32),
        ],
        input_output_aliases={0: 0},
        interpret=interpret,
        name="gate_gradient",
    )(pair_R2F, mix_R.reshape(-1, 1, LANES), grad_RF)
    return grad_pair, grad_mix.reshape(-1).astype(mix_R.dtype)


gate_rows_fused.defvjp(_fused_forward, _fused_backward)
