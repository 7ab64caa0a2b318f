"""The kernel's ops as they are written into a graph; no stock runtime knows them.

`conversion/kernel` implements them, `bank.py` tells how their weights lie in the file. Options are uint32 numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from conversion.kernel import ATTENTION, EMBEDDING, EXPERTS, LINEAR, ROTARY, ROUTE
from conversion.litert import bank
from conversion.litert.flatbuffer import Graph, Kind

ACTIVATIONS = ("silu", "gelu_tanh")
LANES = 16  # of which heads are a multiple


class KernelExperts:
    """One layer's experts as the kernel reads them."""

    def __init__(self, buffer: int, shape: tuple[int, int, int], activation: str, name: str = "experts") -> None:
        """`buffer` holds what `bank.pack_experts` gives, `shape` is E, D, F."""
        self._buffer, self.shape, self.name = buffer, shape, name
        self.activation = ACTIVATIONS.index(activation)

    def expand(self, g: Graph, x: int, ids: int, weights: int, out: int | None = None) -> int:
        """Append y [T, D] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]) to `g`.

        x [T, D] float32, ids [T, K] int32 in [0, E), weights [T, K] float32; `out` is an existing tensor for y.
        """
        experts, *widths = self.shape
        weight = g.tensor((experts, bank.expert_bytes(*widths)), "uint8", self.name, self._buffer)
        options = experts, g.shape(ids)[-1], *widths, self.activation
        return _custom(g, EXPERTS, [x, ids, weights, weight], g.like(x) if out is None else out, options)

    def feed_forward(self, g: Graph, x: int, out: int | None = None) -> int:
        """Append the one expert of a bank of one: x [..., D] to y, alike."""
        tokens = int(np.prod(g.shape(x)[:-1]))
        first, whole = g.const(np.zeros((tokens, 1), np.int32)), g.const(np.ones((tokens, 1), np.float32))
        return self.expand(g, x, first, whole, out)


def linear(g: Graph, x: int, weight: int, shape: tuple[int, int], name: str, out: int | None = None) -> int:
    """Append y [..., out] = x [..., in] times the weight `shape` [out, in] in buffer `weight` (`bank.pack`)."""
    kind = (*g.shape(x)[:-1], shape[0]), "float32"
    return _custom(g, LINEAR, [x, _matrix(g, weight, shape, name)], kind if out is None else out, shape)


def embedding(g: Graph, ids: int, weight: int, shape: tuple[int, int], name: str, out: int | None = None) -> int:
    """Append the rows `ids` int32 [T] of a weight as `linear` takes it: float32 [T, in]."""
    kind = (*g.shape(ids), shape[1]), "float32"
    return _custom(g, EMBEDDING, [ids, _matrix(g, weight, shape, name)], kind if out is None else out, shape)


def attention(g: Graph, inputs: Sequence[int], used: int, out: int | None = None) -> int:
    """Append softmax(q k^T + mask) v over the first `used` int32 [] positions; `inputs` as Attention.expand's."""
    return _custom(g, ATTENTION, [*inputs, used], g.like(inputs[0]) if out is None else out, ())


def rotary(g: Graph, inputs: Sequence[int], epsilon: float, out: int | None = None) -> int:
    """Append x [1, T, heads, H] turned by cosines and sines [T, 1, H], normed before if `epsilon` is not 0."""
    return _custom(g, ROTARY, inputs, g.like(inputs[0]) if out is None else out, (_bits(epsilon),))


def route(g: Graph, inputs: Sequence[int], kinds: Sequence[int], factor: float, outs: Sequence[int]) -> None:
    """Append the choice of experts, ids and shares `outs` [T, K], for `inputs` h [T, D], router [E, D], bias [E].

    `kinds` tells whether scores are a softmax and whether shares are made to sum to 1 before `factor`.
    """
    experts, width = g.shape(inputs[1])
    _append(g, ROUTE, inputs, outs, (width, experts, g.shape(outs[0])[-1], *kinds, _bits(factor)))


def _matrix(g: Graph, buffer: int, shape: tuple[int, int], name: str) -> int:
    return g.tensor((bank.matrix_bytes(*shape),), "uint8", name, buffer)


def _custom(g: Graph, name: str, inputs: Sequence[int], out: int | Kind, options: Sequence[int]) -> int:
    out = out if isinstance(out, int | np.integer) else g.tensor(*out)
    _append(g, name, inputs, [int(out)], options)
    return int(out)


def _append(g: Graph, name: str, inputs: Sequence[int], outs: Sequence[int], options: Sequence[int]) -> None:
    op = schema.OperatorT(opcodeIndex=g.model.opcode("CUSTOM", 1, name))
    op.inputs, op.outputs = (np.array(v, np.int32) for v in (inputs, outs))
    op.customOptions = np.frombuffer(struct.pack(f"<{len(options)}I", *options), np.uint8)
    g.ops.append(op)


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))
