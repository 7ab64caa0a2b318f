"""Symmetric INT4 tensors as files hold them: two's-complement nibbles, low nibble first, float16 scales.

The grid itself lives in `moe_jax.ops.fake_quant`; here are only the container, the packing and its inverse.
Legend: the last axis is always the input axis, in groups that share one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_jax.ops import fake_quant


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Pack int8 codes in [-8, 7], [..., in] with `in` even, to uint8 [..., in/2], even index in the low nibble."""
    low, high = codes[..., 0::2], codes[..., 1::2]
    return (low & 0xF).astype(np.uint8) | ((high & 0xF).astype(np.uint8) << 4)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Inverse of `pack_nibbles`: uint8 [..., in/2] to int8 codes [..., in]."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    # Shifting left and then right as int8 extends the sign of the four bits.
    codes[..., 0::2] = (packed << 4).view(np.int8) >> 4
    codes[..., 1::2] = packed.view(np.int8) >> 4
    return codes


@dataclass(frozen=True)
class Int4:
    """One weight: `codes` int8 [..., out, in] in [-8, 7] and `scales` float16 [..., out, in/group]."""

    codes: np.ndarray
    scales: np.ndarray

    @property
    def group(self) -> int:
        """Input weights that share one scale."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    @property
    def packed(self) -> np.ndarray:
        """The codes as uint8 [..., out, in/2]."""
        return pack_nibbles(self.codes)

    def dequantize(self) -> np.ndarray:
        """The float32 weights [..., out, in] that codes and scales stand for."""
        return fake_quant.int4_dequantize(self.codes, self.scales, -1, self.group)

    @staticmethod
    def from_float(weight: np.ndarray, group: int) -> Int4:
        """Quantise float32 master weights [..., out, in] on the grid that QAT trained with.

        The float16 cast is exact: the grid rounds scales to values that bfloat16 and float16 share.
        """
        scales = fake_quant.int4_scales(weight, -1, group)
        codes = fake_quant.int4_codes(weight, scales, -1, group)
        return Int4(codes, scales.astype(np.float16))
