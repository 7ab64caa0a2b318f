"""How INT4 weights lie in a file for the kernel, which reads them where the file is mapped.

Rows go in groups of 16, as many as the kernel multiplies at once; a group of a weight with `in` inputs is

    sums    float32 [16]               minus the sum over inputs of scale * code, which the zero point multiplies
    scales  bfloat16 [in/32, 16]
    codes   uint8 [in/32, 4, 16, 4]    of 32 inputs: run of 8, row, place i; input i in the low and 4 + i in the
                                       high nibble, two's complement

A layer's experts are one after the other, so that what a token does not select is never read; an expert is gate|up
[2F, D] and then down [D, F].
"""

from __future__ import annotations

import numpy as np

from conversion.int4 import Int4, pack_nibbles

ROWS, BLOCK = 16, 32


def fits(outputs: int, inputs: int) -> bool:
    """Whether the kernel takes a weight [outputs, inputs]."""
    return outputs % ROWS == 0 and inputs % BLOCK == 0


def matrix_bytes(outputs: int, inputs: int) -> int:
    """Bytes of one weight [outputs, inputs]."""
    return outputs // ROWS * (ROWS * 4 + inputs // BLOCK * (ROWS * 2 + ROWS * BLOCK // 2))


def expert_bytes(width: int, hidden: int) -> int:
    """Bytes of one expert, D and F."""
    return matrix_bytes(2 * hidden, width) + matrix_bytes(width, hidden)


def pack_experts(gate_up: Int4, down: Int4) -> np.ndarray:
    """gate_up [E, 2F, D] and down [E, D, F] of a layer: uint8 [E, bytes of an expert]."""
    experts, double, width = gate_up.codes.shape
    if width % BLOCK or double % (2 * BLOCK) or down.codes.shape != (experts, width, double // 2):
        raise ValueError(
            f"shapes {gate_up.codes.shape} and {down.codes.shape} are no [E, 2F, D] and [E, D, F] of 32s"
        )
    return np.concatenate([pack(gate_up), pack(down)], axis=1)


def pack(weight: Int4) -> np.ndarray:
    """Weights [E, out, in] (E may be left out): uint8 [E, bytes of one]."""
    weight = weight if weight.codes.ndim == 3 else Int4(weight.codes[None], weight.scales[None])
    experts, rows, inputs = weight.codes.shape
    groups, blocks = rows // ROWS, inputs // BLOCK
    scales = np.repeat(weight.scales.astype(np.float32), weight.group // BLOCK, axis=-1)
    # In the order in which XNNPACK adds them up when it packs, so that the sums have its bits.
    sums = np.zeros((experts, rows), np.float32)
    for i in range(2 * blocks):
        part = weight.codes[..., 16 * i : 16 * i + 16].sum(-1, dtype=np.int32).astype(np.float32)
        sums -= part * scales[..., i // 2]
    halves = (scales.view(np.uint32) >> 16).astype(np.uint16)
    halves = halves.reshape(experts, groups, ROWS, blocks).swapaxes(2, 3)
    # axes: expert, group, row, block, run, nibble, place
    codes = weight.codes.reshape(experts, groups, ROWS, blocks, 4, 2, 4).transpose(0, 1, 3, 4, 2, 6, 5)
    parts = (sums.reshape(experts, groups, ROWS), halves, pack_nibbles(codes))
    flat = [np.ascontiguousarray(p).reshape(experts, groups, -1).view(np.uint8) for p in parts]
    return np.concatenate(flat, axis=2).reshape(experts, -1)
