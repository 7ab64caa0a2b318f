"""Packing of INT4 codes and the container that carries them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.int4 import Int4, pack_nibbles, unpack_nibbles


@settings(deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_unpacking_gives_back_the_packed_codes(codes):
    array = np.array([codes, codes[::-1]], np.int8)
    assert np.array_equal(unpack_nibbles(pack_nibbles(array)), array)


def test_the_even_index_lies_in_the_low_nibble():
    assert pack_nibbles(np.array([1, -8, 7, -1], np.int8)).tolist() == [0x81, 0xF7]


def test_scales_are_exact_in_float16_and_bfloat16_and_codes_stay_in_range():
    import ml_dtypes

    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32) * 1e-3
    made = Int4.from_float(weight, 32)
    assert made.group == 32 and made.scales.dtype == np.float16
    exact = made.scales.astype(np.float32)
    assert np.array_equal(exact.astype(ml_dtypes.bfloat16).astype(np.float32), exact)
    assert made.codes.min() >= -8 and made.codes.max() <= 7
    # The peak of a group clamps by up to half a step, and bfloat16 rounding moves the scale by 0.4 %.
    steps = np.abs(made.dequantize() - weight) / np.repeat(exact, 32, axis=1)
    assert steps.max() < 0.6


def test_one_groups_scale_does_not_depend_on_another():
    weight = np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)
    changed = weight.copy()
    changed[:, 32:64] *= 100
    a, b = Int4.from_float(weight, 32), Int4.from_float(changed, 32)
    assert np.array_equal(a.scales[:, [0, 2]], b.scales[:, [0, 2]])
    assert np.array_equal(a.codes[:, :32], b.codes[:, :32])
