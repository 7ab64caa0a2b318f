"""The quantisation grid: one definition, exact in every format that carries it."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe_jax.config import MeshConfig
from moe_jax.ops.fake_quant import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    _round_to_bfloat16,
    fake_quant,
    fake_quant_rows,
    int4_codes,
    int4_dequantize,
    int4_scales,
    quantize_rows_int8,
)
from moe_jax.parallel.rules import sharding
from tests.tiny import mesh_of

matrices = arrays(np.float32, (64, 6), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False))
activations = st.floats(-1e3, 1e3, width=32).map(lambda x: x if abs(x) > 1e-20 else 0.0)
rows = arrays(np.float32, (5, 33), elements=activations)


@given(matrices)
def test_scales_are_exact_in_bfloat16_and_in_normal_float16(w):
    scales = int4_scales(w, -2)
    assert (scales == scales.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    assert (scales == scales.astype(np.float16).astype(np.float32)).all()
    assert (scales >= SMALLEST_SCALE).all()


def test_the_scale_of_huge_weights_is_the_largest_that_both_formats_hold():
    (scale,) = int4_scales(np.full((32, 1), 1e6, np.float32), -2).ravel()
    above = np.nextafter(ml_dtypes.bfloat16(scale), ml_dtypes.bfloat16(np.inf)).astype(np.float32)
    assert scale == LARGEST_SCALE == ml_dtypes.bfloat16(scale) == np.float16(scale)
    assert above > np.finfo(np.float16).max


def test_rounding_to_bfloat16_is_to_the_nearest_and_of_two_to_the_even_one():
    """Of each finite bfloat16 and the next: the first, just before, at and just after the middle of both."""
    finite = np.arange(1 << 16, dtype=np.uint32) << 16
    finite = finite[np.isfinite(finite.view(np.float32))]
    x = (finite[:, None] + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)).view(np.float32)
    with np.errstate(over="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for rounded in (_round_to_bfloat16(x), np.asarray(jax.jit(_round_to_bfloat16)(x))):
        np.testing.assert_array_equal(rounded.view(np.uint32), expected.view(np.uint32))


@given(matrices)
def test_scale_is_two_fifteenths_of_the_groups_peak(w):
    peak = np.abs(w.reshape(2, 32, 6)).max(1)
    expected = np.maximum(peak * (2 / 15), SMALLEST_SCALE)
    np.testing.assert_allclose(int4_scales(w, -2), expected, rtol=2**-8)


@given(matrices)
def test_codes_fill_four_bits_and_are_the_nearest(w):
    scales = int4_scales(w, -2)
    codes = int4_codes(w, scales, -2)
    assert codes.min() >= -8 and codes.max() <= 7
    error = np.abs(int4_dequantize(codes, scales, -2) - w)
    limit = np.repeat(scales, 32, axis=0)
    inside = (w / limit > -8.5) & (w / limit < 7.5)
    assert (error <= limit * 0.5000001)[inside].all()


def test_of_groups_that_a_mesh_cuts_only_peaks_travel():
    """A device has 24 rows, of groups of 32: an eighth of the weights is exchanged, and the bits are the same."""
    mesh = mesh_of(MeshConfig(fsdp=8))
    w = np.random.default_rng(0).normal(size=(192, 512)).astype(np.float32)
    where = sharding(mesh, ("embed", "mlp"))
    run = jax.jit(lambda a: fake_quant(a, -2), in_shardings=where, out_shardings=where)
    moved = re.findall(r"= f32\[(\d+),512\]\S* all-gather\(", run.lower(w).compile().as_text() or "")
    assert moved and sum(map(int, moved)) <= 192 / 8
    assert (np.asarray(run(w)) == np.asarray(fake_quant(jnp.asarray(w), -2))).all()


@given(matrices)
@settings(max_examples=25)
def test_numpy_and_compiled_jax_give_the_same_bits(w):
    scales = int4_scales(w, -2)
    expected = int4_dequantize(int4_codes(w, scales, -2), scales, -2)
    assert (np.asarray(jax.jit(lambda a: int4_scales(a, -2))(w)) == scales).all()
    assert (np.asarray(jax.jit(lambda a: fake_quant(a, -2))(w)) == expected).all()


@given(st.integers(0, 2**31), st.integers(-14, 5))
@settings(max_examples=50)
def test_codes_next_to_a_boundary_are_exact_in_numpy_and_in_a_compiled_scan(seed, exponent):
    """Weights one ulp around every (code + 1/2) * scale, where a quotient by reciprocal goes wrong."""
    rng = np.random.default_rng(seed)
    scales = np.ldexp(rng.integers(128, 256, (1, 8)), exponent - 7).astype(np.float32)
    boundary = (np.arange(-9, 9, dtype=np.float32)[:, None] + np.float32(0.5)) * scales
    w = np.concatenate([boundary, np.nextafter(boundary, np.float32(np.inf))])[:32]
    w[rng.integers(0, 2, w.shape) == 1] *= -1
    exact = w.astype(np.float64) / scales
    expected = np.clip(np.round(exact), -8, 7)
    assert (int4_codes(w, scales, -2) == expected).all()
    assert (np.asarray(_codes_in_a_scan(w, scales)) == expected).all()


@jax.jit
def _codes_in_a_scan(w, scales):
    body = lambda _, w: (None, int4_codes(w, scales, -2))  # noqa: E731
    return jax.lax.scan(body, None, w[None])[1][0]


def test_groups_run_along_the_named_axis_only():
    w = np.ones((2, 64, 3), np.float32)
    w[1, 32:, 2] = 100
    scales = int4_scales(w, -2)
    assert scales.shape == (2, 2, 3)
    assert (scales[1, 1, 2] > scales).sum() == scales.size - 1


def test_quantising_one_expert_ignores_the_others():
    w = np.random.default_rng(0).standard_normal((4, 64, 8)).astype(np.float32)
    louder = w.copy()
    louder[0] *= 100
    a, b = (np.asarray(fake_quant(jnp.asarray(x), -2)) for x in (w, louder))
    assert (a[1:] == b[1:]).all()
    assert (a[0] != b[0]).any()


def test_gradients_pass_straight_through():
    w = jnp.linspace(-1, 1, 64).reshape(32, 2)
    weights = jnp.arange(64.0).reshape(32, 2)
    gradient = jax.grad(lambda a: (fake_quant(a, -2) * weights).sum())(w)
    assert (gradient == weights).all()
    gradient = jax.grad(lambda a: (fake_quant_rows(a) * weights).sum())(w)
    assert (gradient == weights).all()


def _xnnpack_row(x: np.ndarray) -> tuple[np.ndarray, np.floating, int]:
    """A scalar transcription of what the delegate computes for one row."""
    low, high = np.float32(min(0.0, x.min())), np.float32(max(0.0, x.max()))
    if low == high:
        scale = np.float32(1)
    else:
        scale = np.float32(255) / (high - low)
    from_low, from_high = np.float32(-128) + low * scale, np.float32(127) + high * scale
    zero = np.float32(-128) - low * scale if from_low + from_high > 0 else np.float32(127) - high * scale
    zero = int(np.rint(np.clip(zero, -128, 127)))
    codes = np.clip(np.rint(x * scale) + zero, -128, 127).astype(np.int8)
    return codes, np.float32(1) / scale, zero


@given(rows)
def test_activation_rows_are_quantised_as_xnnpack_does(x):
    codes, scale, zero = quantize_rows_int8(x)
    for i, row in enumerate(x):
        expected_codes, expected_scale, expected_zero = _xnnpack_row(row)
        assert (codes[i] == expected_codes).all()
        assert scale[i, 0] == expected_scale and zero[i, 0] == expected_zero


def test_rows_next_to_zero_are_zeros():
    codes, scale, zero = quantize_rows_int8(np.full((1, 32), 1.2e-38, np.float32))
    assert np.isfinite(scale).all() and ((codes - zero) * scale == 0).all()


@given(rows)
def test_zero_is_exact_and_the_error_is_at_most_one_step(x):
    x[:, 3] = 0
    codes, scale, zero = quantize_rows_int8(x)
    back = (codes.astype(np.float32) - zero) * scale
    assert (back[:, 3] == 0).all()
    assert (np.abs(back - x) <= scale * 1.01 + 1e-30).all()
