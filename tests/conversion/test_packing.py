"""The layout of ExecuTorch's experts, which needs no ExecuTorch; that its op reads it so is in `executorch/`."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from conversion.executorch.packing import pack, unpack
from conversion.int4 import Int4


def random_int4(experts: int, outputs: int, inputs: int, group: int, seed: int = 0) -> Int4:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-8, 8, (experts, outputs, inputs), np.int8)
    return Int4(codes, rng.uniform(0.01, 1, (experts, outputs, inputs // group)).astype(np.float16))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([32, 64]), st.integers(0, 99))
def test_what_is_packed_comes_out_again(experts, eights, groups, group, seed):
    weight = random_int4(experts, 8 * eights, group * groups, group, seed)
    packed = pack(weight)
    assert packed.shape == (experts, 64 + weight.codes[0].size // 2 + 8 * weight.scales[0].size)
    found = unpack(packed, weight.codes.shape, group)
    assert found is not None
    np.testing.assert_array_equal(found.codes, weight.codes)
    np.testing.assert_array_equal(found.scales, weight.scales)


def test_bytes_are_where_torchao_has_them():
    codes = np.zeros((1, 8, 32), np.int8)
    codes[0, 0, :2], codes[0, 2, 0], codes[0, 7, 31] = (-8, 1), 2, 7
    packed = pack(Int4(codes, np.arange(8, dtype=np.float16).reshape(1, 8, 1)))[0]
    assert packed[:32].view(np.int32).tolist() == [6712, 1, 4, 0, 0, 8, 16, 2]
    body = packed[64 : 64 + 128]
    # 16 bytes hold rows 0 and 1 below rows 2 and 3, 8 inputs of each.
    assert body[0] == 0xA0 and body[1] == 0x89 and body[-1] == 0xF8
    assert set(np.delete(body, [0, 1, 127])) == {0x88}
    assert packed[192:224].view(np.float32).tolist() == list(range(8))
    assert packed[224:].view(np.int32).tolist() == [-7, 0, 2, 0, 0, 0, 0, 7]


def test_a_flipped_bit_shows_in_header_codes_and_sums():
    weight = random_int4(1, 8, 32, 32)
    for place in (0, 4, 70, 230):
        packed = pack(weight)
        packed[0, place] ^= 1
        assert unpack(packed, weight.codes.shape, 32) is None
