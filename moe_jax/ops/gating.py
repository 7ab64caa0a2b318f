"""act(gate) * up * weight on rows of gate|up: one pass forward, one backward.

On TPU a Pallas kernel: XLA would split the product, concatenate its gradient and move each row's weight from
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


def gate_rows(gate_up_R2F: jax.Array, routing_R: jax.Array, activation: str) -> jax.Array:
    """act(gate) * up * routing weight, in float32, [R, F] in the type of `gate_up`."""
    gate, up = jnp.split(gate_up_R2F.astype(jnp.float32), 2, axis=-1)
    return (activate(activation, gate) * up * routing_R[:, None]).astype(gate_up_R2F.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def gate_rows_fused(
    gate_up_R2F: jax.Array, routing_R: jax.Array, activation: str, interpret: bool = False
) -> jax.Array:
    """`gate_rows` by kernel; R must be a multiple of 128."""
    rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    return pl.pallas_call(
        partial(_forward_kernel, activation),
        grid=(pl.cdiv(rows, BLOCK * LANES),),
        in_specs=[_rows(2 * width), _lanes()],
        out_specs=_rows(width),
        out_shape=jax.ShapeDtypeStruct((rows, width), gate_up_R2F.dtype),
        interpret=interpret,
        name="gate",
    )(gate_up_R2F, routing_R.reshape(-1, 1, LANES))


def _rows(width: int) -> pl.BlockSpec:
    return pl.BlockSpec((BLOCK * LANES, width), lambda i: (i, 0))


def _lanes() -> pl.BlockSpec:
    """A value per row, dense in memory: [R / 128, 1, 128]."""
    return pl.BlockSpec((BLOCK, 1, LANES), lambda i: (i, 0, 0))


def _transposed(values: jax.Array) -> jax.Array:
    """[1, 128] along lanes -> [128, 1] along rows, or back, by way of a diagonal."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return jnp.where(row == lane, values, 0).sum(values.shape.index(1) ^ 1, keepdims=True)


def _forward_kernel(activation: str, gate_up, routing, out):
    width = out.shape[1]
    for block in range(BLOCK):
        rows = pl.ds(block * LANES, LANES)
        gate, up = gate_up[rows, :width].astype(jnp.float32), gate_up[rows, width:].astype(jnp.float32)
        out[rows, :] = (activate(activation, gate) * up * _transposed(routing[block])).astype(out.dtype)


def _backward_kernel(activation: str, gate_up, routing, grad, grad_gate_up, grad_routing):
    width = grad.shape[1]
    for block in range(BLOCK):
        rows = pl.ds(block * LANES, LANES)
        gate, up = gate_up[rows, :width].astype(jnp.float32), gate_up[rows, width:].astype(jnp.float32)
        upstream = grad[rows, :].astype(jnp.float32)
        acted, derivative = jax.jvp(partial(activate, activation), (gate,), (jnp.ones_like(gate),))
        grad_routing[block] = _transposed((upstream * acted * up).sum(1, keepdims=True))
        upstream *= _transposed(routing[block])
        grad_gate_up[rows, :width] = (upstream * up * derivative).astype(grad_gate_up.dtype)
        grad_gate_up[rows, width:] = (upstream * acted).astype(grad_gate_up.dtype)


def _fused_forward(gate_up_R2F, routing_R, activation, interpret):
    return gate_rows_fused(gate_up_R2F, routing_R, activation, interpret), (gate_up_R2F, routing_R)


def _fused_backward(activation, interpret, residuals, grad_RF):
    gate_up_R2F, routing_R = residuals
    rows, width = grad_RF.shape
    grad_gate_up, grad_routing = pl.pallas_call(
        partial(_backward_kernel, activation),
        grid=(pl.cdiv(rows, BLOCK * LANES),),
        in_specs=[_rows(2 * width), _lanes(), _rows(width)],
        out_specs=[_rows(2 * width), _lanes()],
        out_shape=[
            jax.ShapeDtypeStruct(gate_up_R2F.shape, gate_up_R2F.dtype),
            jax.ShapeDtypeStruct((rows // LANES, 1, LANES), jnp.float32),
        ],
        input_output_aliases={0: 0},
        interpret=interpret,
        name="gate_gradient",
    )(gate_up_R2F, routing_R.reshape(-1, 1, LANES), grad_RF)
    return grad_gate_up, grad_routing.reshape(-1).astype(routing_R.dtype)


gate_rows_fused.defvjp(_fused_forward, _fused_backward)
