"""Published INT4 codes against the grid: what goes into a checkpoint comes out again bit for bit."""

import numpy as np
import pytest

from conversion import hf_int4
from conversion.hf_int4 import Loss, masters, on_grid, recovered
from conversion.int4 import Int4, unpack_nibbles
from moe_jax.ops.fake_quant import int4_codes, int4_scales

GROUP = 32


def rounded(seed=0, rows=256, columns=256) -> Int4:
    """Codes as published training makes them: the largest of a group over 7.5, as float16."""
    weights = np.random.default_rng(seed).standard_normal((rows, columns // GROUP, GROUP)).astype(np.float32)
    scales = (np.abs(weights).max(-1) / 7.5).astype(np.float16)
    codes = np.clip(np.round(weights / scales.astype(np.float32)[..., None]), -8, 7).astype(np.int8)
    return Int4(codes.reshape(rows, columns), scales)


def any_codes(seed=0, rows=256, columns=256) -> Int4:
    """Codes that no rounding made: some groups stay below the end of the grid."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(1e-3, 1e-1, (rows, columns // GROUP)).astype(np.float16)
    return Int4(rng.integers(-8, 8, (rows, columns)).astype(np.int8), scales)


def test_the_grid_takes_masters_back_to_every_code():
    weight = rounded()
    values = masters(weight)
    scales = int4_scales(values, -1, GROUP)
    assert np.array_equal(int4_codes(values, scales, -1, GROUP), weight.codes)
    assert np.abs(scales / weight.scales.astype(np.float32) - 1).max() <= 2**-8  # bfloat16 has 8 bits


def test_scales_that_bfloat16_holds_lose_nothing():
    weight = rounded()
    bits = weight.scales.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    weight = Int4(weight.codes, bits.view(np.float32).astype(np.float16))
    assert np.array_equal(on_grid(masters(weight), -1, GROUP), weight.dequantize())


def test_masters_of_a_scale_too_small_for_the_grid_are_the_weights_as_they_are():
    weight = any_codes(rows=2, columns=64)
    weight.codes[:, ::GROUP] = 7  # an end of the grid, which a larger scale would move
    weight = Int4(weight.codes, np.full_like(weight.scales, 2.0**-20))
    assert np.array_equal(masters(weight), weight.dequantize())


@pytest.mark.parametrize("make", [rounded, any_codes])
@pytest.mark.parametrize("placed", [True, False], ids=["masters", "dequantised"])
def test_codes_and_float16_scales_come_back_bit_for_bit(make, placed):
    weight = make()
    found, exact = recovered(masters(weight) if placed else weight.dequantize(), GROUP, placed)
    assert exact
    assert np.array_equal(found.codes, weight.codes)
    assert np.array_equal(found.scales, weight.scales)


def test_only_codes_that_four_bits_hold_are_found():
    codes = np.zeros((1, GROUP), np.int8)
    codes[0, :2] = 4  # half the scale would do as well, were there a code of 8
    weight = Int4(codes, np.ones((1, 1), np.float16))
    found, exact = recovered(weight.dequantize(), GROUP, False)
    assert exact and found.codes.max() <= 7
    assert np.array_equal(Int4(unpack_nibbles(found.packed), found.scales).dequantize(), weight.dequantize())


def test_weights_that_were_trained_since_are_known_as_such():
    values = masters(rounded())
    values[17, 40] *= np.float32(1.01)
    assert not recovered(values, GROUP, True)[1]


def test_a_group_of_zeros_stays_zero():
    weight = rounded()
    weight.codes[3, 32:64] = 0
    found, exact = recovered(masters(weight), GROUP, True)
    assert exact and not found.codes[3, 32:64].any()


@pytest.mark.parametrize("rows", range(1, 9))
def test_blocks_of_rows_and_experts_leave_no_weight_out(rows, monkeypatch):
    monkeypatch.setattr(hf_int4, "_AT_ONCE", 3 * GROUP)
    values = np.arange(rows * GROUP).reshape(rows, GROUP)
    blocks = [values[index] for index in hf_int4.parts(values.shape)]
    assert np.array_equal(np.concatenate(blocks), values) and len(blocks) == -(-rows // 3)
    experts = values.reshape(rows, 4, -1)
    assert np.array_equal(np.stack([experts[index] for index in hf_int4.parts(experts.shape)]), experts)


def test_loss_is_told_per_tensor_and_in_sum():
    loss, ones = Loss(), np.ones((2, 8), np.float32)
    loss.note("a", ones, ones)
    loss.note("b", ones[:1], 1.5 * ones[:1])
    loss.note("b", ones[1:], ones[1:])
    assert loss.tensors == {"b": {"relative_rms": pytest.approx(0.125**0.5), "max_abs": 0.5}}
    assert loss.report()["relative_rms"] == pytest.approx(0.25)
