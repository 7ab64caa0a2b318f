"""The quantisation grid: the only definition of INT4 weights and INT8 activations in the project.

Every function takes NumPy or JAX arrays and answers in kind, so QAT, the exporter and the verifier share it.
Weights: symmetric INT4 in groups along the input axis, scale 2*max|w|/15 (paper eq. 6) rounded to a value
that bfloat16 and float16 both hold exactly, since LiteRT stores float16 and XNNPACK packs bfloat16.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16; XNNPACK refuses smaller block scales
LARGEST_SCALE = 65280.0  # the largest bfloat16 below float16's maximum
INT4_MIN, INT4_MAX = -8, 7
_BLOCK = 8


def _xp(array: Any) -> Any:
    return array.__array_namespace__()


def _grouped(w: Any, axis: int, group: int) -> Any:
    """Split `axis` (negative) into (groups, group)."""
    shape = list(w.shape)
    position = len(shape) + axis
    if shape[position] % group:
        raise ValueError(f"axis of {shape[position]} does not divide into groups of {group}")
    return w.reshape(*shape[:position], shape[position] // group, group, *shape[position + 1 :])


def _block(group: int) -> int:
    """Weights of a group that are looked at together.

    A mesh may cut groups (768 over fsdp=16 is 48 each), and what is split into groups is then gathered by the
    compiler: that shall be the peaks of blocks, an eighth of the weights.
    """
    return math.gcd(group, _BLOCK)


def _spread(scales: Any, axis: int, group: int) -> Any:
    """The scale of each block along `axis`, with an axis of 1 behind for its weights."""
    xp = _xp(scales)
    return xp.expand_dims(xp.repeat(scales, group // _block(group), axis=axis), axis)


def _round_to_bfloat16(x: Any) -> Any:
    # On the bits, because XLA may drop a pair of casts to bfloat16 and back (excess precision is allowed).
    bits = x.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32)


def int4_scales(w: Any, axis: int, group: int = 32) -> Any:
    """Scales of `w` (float32) for groups of `group` along `axis` (negative): float32, `axis` shrunk by `group`."""
    xp = _xp(w)
    of_blocks = xp.max(xp.abs(_grouped(w, axis, _block(group))), axis=axis)
    peak = xp.max(_grouped(of_blocks, axis, group // _block(group)), axis=axis)
    rounded = _round_to_bfloat16(peak * np.float32(2.0 / 15.0))
    return xp.clip(rounded, np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE))


def int4_codes(w: Any, scales: Any, axis: int, group: int = 32) -> Any:
    """Codes in [-8, 7] (int8, shape of `w`): w/scale rounded half to even, clamped.

    Exact on every platform: compilers divide by multiplying with a rounded reciprocal, which moves a code
    in some millions. A code plus a half has 5 bits and a scale 8, so their product has no rounding, and
    comparing `w` with it settles what an inexact quotient guessed.
    """
    xp = _xp(w)
    blocks, scale = _grouped(w, axis, _block(group)), _spread(scales, axis, group)
    guess = xp.round(xp.clip(blocks / scale, np.float32(INT4_MIN), np.float32(INT4_MAX)))
    odd = xp.abs(guess) % np.float32(2) == 1
    above, below = (guess + np.float32(0.5)) * scale, (guess - np.float32(0.5)) * scale
    up = (blocks > above) | (odd & (blocks == above))
    down = (blocks < below) | (odd & (blocks == below))
    codes = xp.clip(guess + up - down, np.float32(INT4_MIN), np.float32(INT4_MAX))
    return codes.astype(np.int8).reshape(w.shape)


def int4_dequantize(codes: Any, scales: Any, axis: int, group: int = 32) -> Any:
    """The float32 weights that `codes` and `scales` stand for."""
    blocks = _grouped(codes, axis, _block(group)).astype(np.float32)
    return (blocks * _spread(scales.astype(np.float32), axis, group)).reshape(codes.shape)


def _straight_through(value: jax.Array, gradient_to: jax.Array) -> jax.Array:
    # x - x is exactly zero, so the forward value is `value` to the last bit; x + (value - x) would not be.
    return jax.lax.stop_gradient(value) + (gradient_to - jax.lax.stop_gradient(gradient_to))


def fake_quant(w: jax.Array, axis: int, group: int = 32) -> jax.Array:
    """`w` rounded to the INT4 grid in the forward pass; the gradient passes straight through."""
    scales = int4_scales(w, axis, group)
    return _straight_through(int4_dequantize(int4_codes(w, scales, axis, group), scales, axis, group), w)


def quantize_rows_int8(x: Any) -> tuple[Any, Any, Any]:
    """XNNPACK's dynamic INT8 (qd8) of each row (last axis) of float32 `x`: asymmetric, zero always representable.

    Returns codes int8, scale float32 and zero point float32, the last two with a trailing axis of 1, so that
    x is about scale * (codes - zero_point). Arithmetic follows `xnn_qd8_asymmetric_quantization_params`.
    """
    xp = _xp(x)
    one = np.float32(1.0)
    low = xp.minimum(xp.min(x, axis=-1, keepdims=True), np.float32(0.0))
    high = xp.maximum(xp.max(x, axis=-1, keepdims=True), np.float32(0.0))
    flat = high - low < np.float32(1e-30)  # 255 over less could overflow; such a row is zeros
    inverse = xp.where(flat, one, np.float32(255.0) / xp.where(flat, one, high - low))
    low_scaled, high_scaled = low * inverse, high * inverse
    below, above = np.float32(-128.0), np.float32(127.0)
    nearer_low = (below + low_scaled) + (above + high_scaled) > 0
    zero = xp.where(nearer_low, below - low_scaled, above - high_scaled)
    zero = xp.round(xp.clip(zero, below, above))
    codes = xp.clip(xp.round(x * inverse) + zero, below, above)
    return codes.astype(np.int8), one / inverse, zero


def fake_quant_rows(x: jax.Array) -> jax.Array:
    """`x` rounded per row as XNNPACK does before a quantised product; the gradient passes straight through."""
    exact = x.astype(np.float32)
    codes, scale, zero = quantize_rows_int8(jax.lax.stop_gradient(exact))
    return _straight_through((codes.astype(np.float32) - zero) * scale, exact).astype(x.dtype)
