"""One op for a layer's routed experts: how its weights lie in the file, and how it is written into a graph.

The op is `conversion/kernel`'s; no stock runtime knows it. All weights of a layer are one uint8 tensor, expert
after expert, so that what a token does not select is never read, and a kernel reads them where they are mapped.

An expert is gate|up [2F, D] and then down [D, F]. Rows go in groups of 16; a group of a weight with `in` inputs is

    sums    float32 [16]               minus the sum over inputs of scale * code, which the zero point multiplies
    scales  bfloat16 [in/32, 16]
    codes   uint8 [in/32, 4, 16, 4]    of 32 inputs: run of 8, row, place i; input i in the low and 4 + i in the
                                       high nibble, two's complement
"""

from __future__ import annotations

import struct

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from conversion.int4 import Int4, pack_nibbles
from conversion.kernel import NAME
from conversion.litert.flatbuffer import Graph

ACTIVATIONS = ("silu", "gelu_tanh")
_ROWS, _BLOCK = 16, 32


class KernelExperts:
    """One layer's experts as the kernel reads them."""

    def __init__(self, bank: int, shape: tuple[int, int, int], activation: str, name: str = "experts") -> None:
        """`bank` is the buffer with what `pack` gives, `shape` is E, D, F."""
        self._bank, self.shape, self.name = bank, shape, name
        self.activation = ACTIVATIONS.index(activation)

    def expand(self, g: Graph, x: int, ids: int, weights: int, out: int | None = None) -> int:
        """Append y [T, D] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]) to `g`.

        x [T, D] float32, ids [T, K] int32 in [0, E), weights [T, K] float32; `out` is an existing tensor for y.
        """
        experts, *widths = self.shape
        bank = g.tensor((experts, expert_bytes(*widths)), "uint8", self.name, self._bank)
        out = g.tensor(*g.like(x)) if out is None else out
        options = struct.pack("<5I", experts, g.shape(ids)[-1], *widths, self.activation)
        op = schema.OperatorT(opcodeIndex=g.model.opcode("CUSTOM", 1, NAME))
        op.inputs, op.outputs = (np.array(v, np.int32) for v in ([x, ids, weights, bank], [out]))
        op.customOptions = np.frombuffer(options, np.uint8)
        g.ops.append(op)
        return out


def pack(gate_up: Int4, down: Int4) -> np.ndarray:
    """The bank of a layer: uint8 [E, bytes of an expert]."""
    experts, double, width = gate_up.codes.shape
    if width % _BLOCK or double % (2 * _BLOCK) or down.codes.shape != (experts, width, double // 2):
        raise ValueError(
            f"shapes {gate_up.codes.shape} and {down.codes.shape} are no [E, 2F, D] and [E, D, F] of 32s"
        )
    return np.concatenate([_pack(gate_up), _pack(down)], axis=1)


def unpack(bank: np.ndarray, width: int, hidden: int) -> tuple[Int4, Int4]:
    """gate_up [E, 2F, D] and down [E, D, F] of a bank, bit for bit; scales are one per 32 inputs."""
    bank = bank.reshape(-1, expert_bytes(width, hidden))
    cut = 2 * hidden // _ROWS * _group_bytes(width)
    return _unpack(bank[:, :cut], 2 * hidden, width), _unpack(bank[:, cut:], width, hidden)


def expert_bytes(width: int, hidden: int) -> int:
    """Bytes of one expert in the bank."""
    return (2 * hidden * _group_bytes(width) + width * _group_bytes(hidden)) // _ROWS


def _group_bytes(inputs: int) -> int:
    return _ROWS * 4 + inputs // _BLOCK * (_ROWS * 2 + _ROWS * _BLOCK // 2)


def _pack(weight: Int4) -> np.ndarray:
    experts, rows, inputs = weight.codes.shape
    groups, blocks = rows // _ROWS, inputs // _BLOCK
    scales = np.repeat(weight.scales.astype(np.float32), weight.group // _BLOCK, axis=-1)
    # In the order in which XNNPACK adds them up when it packs, so that the sums have its bits.
    sums = np.zeros((experts, rows), np.float32)
    for i in range(2 * blocks):
        part = weight.codes[..., 16 * i : 16 * i + 16].sum(-1, dtype=np.int32).astype(np.float32)
        sums -= part * scales[..., i // 2]
    halves = (scales.view(np.uint32) >> 16).astype(np.uint16)
    halves = halves.reshape(experts, groups, _ROWS, blocks).swapaxes(2, 3)
    # axes: expert, group, row, block, run, nibble, place
    codes = weight.codes.reshape(experts, groups, _ROWS, blocks, 4, 2, 4).transpose(0, 1, 3, 4, 2, 6, 5)
    parts = (sums.reshape(experts, groups, _ROWS), halves, pack_nibbles(codes))
    flat = [np.ascontiguousarray(p).reshape(experts, groups, -1).view(np.uint8) for p in parts]
    return np.concatenate(flat, axis=2).reshape(experts, -1)


def _unpack(bank: np.ndarray, rows: int, inputs: int) -> Int4:
    experts, groups, blocks = len(bank), rows // _ROWS, inputs // _BLOCK
    bank = bank.reshape(experts, groups, _group_bytes(inputs))[..., _ROWS * 4 :]
    halves, pairs = np.split(bank, [blocks * _ROWS * 2], axis=2)
    halves = np.ascontiguousarray(halves).view(np.uint16).reshape(experts, groups, blocks, _ROWS).swapaxes(2, 3)
    scales = (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float16)
    pairs = np.ascontiguousarray(pairs).reshape(experts, groups, blocks, 4, _ROWS, 4)
    low, high = (pairs << 4).view(np.int8) >> 4, pairs.view(np.int8) >> 4
    codes = np.stack([low, high], axis=-2).transpose(0, 1, 4, 2, 3, 5, 6)  # group, row, block, run, nibble, place
    return Int4(codes.reshape(experts, rows, inputs), scales.reshape(experts, rows, blocks))
