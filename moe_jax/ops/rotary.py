"""Weightless head norm and rotary positions of queries or keys, in one pass forward and one backward.

On TPU a Pallas kernel: XLA would make a pass each for norm, rotation, scale and the joining of halves.
Legend: B batch, N heads, H head width (two halves that rotate against each other), P pairs (H / 2), S sequence.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

TOKENS = 512  # of one row, in one step of a kernel


def prepare_heads(x_BNHS, cos_BPS, sin_BPS, eps: float | None, scale: float) -> jax.Array:
    """Normalise over H (unless `eps` is None), rotate pairs (h, h + P), scale; in float32, typed like `x`."""
    exact = x_BNHS.astype(jnp.float32)
    if eps is not None:
        exact *= jax.lax.rsqrt(jnp.mean(exact * exact, axis=-2, keepdims=True) + eps)
    first, second = jnp.split(exact, 2, axis=-2)
    cos, sin = scale * cos_BPS[:, None], scale * sin_BPS[:, None]
    rotated = jnp.concatenate((first * cos - second * sin, first * sin + second * cos), axis=-2)
    return rotated.astype(x_BNHS.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def prepare_heads_fused(x_BNHS, cos_BPS, sin_BPS, eps: float | None, scale: float, interpret: bool = False):
    """`prepare_heads` by kernel; no gradient by the angles."""
    return _call(partial(_forward_kernel, eps, scale), "heads", [x_BNHS], cos_BPS, sin_BPS, interpret)


def _call(kernel, name: str, arrays, cos_BPS, sin_BPS, interpret: bool) -> jax.Array:
    batch, heads, width, length = arrays[0].shape
    tokens = min(TOKENS, length)
    whole = pl.BlockSpec((None, heads, width, tokens), lambda b, s: (b, 0, 0, s))
    angle = pl.BlockSpec((None, width // 2, tokens), lambda b, s: (b, 0, s))
    return pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(length, tokens)),
        in_specs=[whole] * len(arrays) + [angle, angle],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
        interpret=interpret,
        name=name,
    )(*arrays, cos_BPS, sin_BPS)


def _inverse_rms(x, eps: float | None):
    return 1.0 if eps is None else jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + eps)


def _forward_kernel(eps, scale: float, x, cos, sin, out):
    pairs = cos.shape[0]
    for head in range(x.shape[0]):
        exact = x[head].astype(jnp.float32)
        exact *= _inverse_rms(exact, eps) * scale
        first, second = exact[:pairs], exact[pairs:]
        out[head, :pairs] = (first * cos[...] - second * sin[...]).astype(out.dtype)
        out[head, pairs:] = (first * sin[...] + second * cos[...]).astype(out.dtype)


def _backward_kernel(eps, scale: float, x, grad, cos, sin, out):
    pairs = cos.shape[0]
    for head in range(x.shape[0]):
        exact, upstream = x[head].astype(jnp.float32), grad[head].astype(jnp.float32) * scale
        first, second = upstream[:pairs], upstream[pairs:]
        turned = (first * cos[...] + second * sin[...], second * cos[...] - first * sin[...])
        if eps is not None:
            inverse = _inverse_rms(exact, eps)
            normal = exact * inverse
            halves = normal[:pairs], normal[pairs:]
            along = sum((t * h).sum(0, keepdims=True) for t, h in zip(turned, halves, strict=True)) / (2 * pairs)
            turned = tuple(inverse * (t - h * along) for t, h in zip(turned, halves, strict=True))
        out[head, :pairs] = turned[0].astype(out.dtype)
        out[head, pairs:] = turned[1].astype(out.dtype)


def _fused_forward(x_BNHS, cos_BPS, sin_BPS, eps, scale, interpret):
    return prepare_heads_fused(x_BNHS, cos_BPS, sin_BPS, eps, scale, interpret), (x_BNHS, cos_BPS, sin_BPS)


def _fused_backward(eps, scale, interpret, residuals, grad_BNHS):
    x_BNHS, cos_BPS, sin_BPS = residuals
    kernel = partial(_backward_kernel, eps, scale)
    return _call(kernel, "heads_gradient", [x_BNHS, grad_BNHS], cos_BPS, sin_BPS, interpret), None, None


prepare_heads_fused.defvjp(_fused_forward, _fused_backward)
