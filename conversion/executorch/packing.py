"""INT4 weights as `llama::quantized_moe_ffn` reads them: torchao's universal layout for 8-bit activations.

The layout follows torchao 0.18, `csrc/cpu/torch_free_kernels/weight_packing/weight_packing.h`, whose packing
operator is in its Arm builds only: a header, then for each 8 rows and each group of inputs the codes, 8 scales and
8 sums of codes. Codes go 16 inputs at a time, the first 8 of all rows before the last 8; of each 32 in this order
the first 16 are the low nibbles of 16 bytes, the others the high ones, with 8 added to all.
Legend: E experts, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import numpy as np

from conversion.int4 import Int4

ROWS, STEP, HALVES = 8, 16, 2  # nr, kr, sr
_MAGIC, _UNIVERSAL, _BITS = 6712, 1, 4
_HEADER = np.zeros(16, np.int32)
_HEADER[:8] = _MAGIC, _UNIVERSAL, _BITS, 0, 0, ROWS, STEP, HALVES  # between them: no zero points, no bias


def pack(weight: Int4) -> np.ndarray:
    """Weights [E, N, K] as uint8 [E, bytes]; N is a multiple of 8 and the group of 32."""
    experts, outputs, inputs = weight.codes.shape
    group = weight.group
    blocks = (experts, outputs // ROWS, ROWS, inputs // group)
    codes = weight.codes.reshape(*blocks, group // STEP, HALVES, STEP // HALVES)
    nibbles = codes.transpose(0, 1, 3, 4, 5, 2, 6).reshape(experts, outputs // ROWS, inputs // group, -1, 2, 16) + 8
    packed = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).astype(np.uint8)
    scales = weight.scales.astype(np.float32).reshape(blocks).swapaxes(2, 3)
    sums = weight.codes.reshape(*blocks, group).sum(-1, dtype=np.int32).swapaxes(2, 3)
    parts = [packed.reshape(*packed.shape[:3], -1), *(_bytes(part) for part in (scales, sums))]
    body = np.concatenate(parts, axis=-1).reshape(experts, -1)
    return np.concatenate([np.broadcast_to(_bytes(_HEADER), (experts, _HEADER.nbytes)), body], axis=1)


def unpack(packed: np.ndarray, shape: tuple[int, ...], group: int) -> Int4 | None:
    """The inverse of `pack` for weights of this shape [E, N, K]; None if header or sums are not as written."""
    experts, outputs, inputs = shape
    header, body = np.split(packed, [_HEADER.nbytes], axis=1)
    blocks = (experts, outputs // ROWS, inputs // group)
    codes, scales, sums = np.split(
        body.reshape(*blocks, -1), [group * ROWS // 2, group * ROWS // 2 + 4 * ROWS], axis=-1
    )
    lines = codes.reshape(*blocks, -1, 16)
    nibbles = np.stack([lines & 15, lines >> 4], axis=-2).astype(np.int8) - 8
    steps = nibbles.reshape(*blocks, group // STEP, HALVES, ROWS, STEP // HALVES)
    rows = steps.transpose(0, 1, 5, 2, 3, 4, 6).reshape(experts, outputs // ROWS, ROWS, -1, group)
    filed = np.ascontiguousarray(sums).view(np.int32)
    if (header != _bytes(_HEADER)).any() or (rows.sum(-1, dtype=np.int32).swapaxes(2, 3) != filed).any():
        return None
    found = np.ascontiguousarray(scales).view(np.float32).swapaxes(2, 3).reshape(experts, outputs, -1)
    return Int4(rows.reshape(shape), found.astype(np.float16))


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
