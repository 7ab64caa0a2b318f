"""The kernel's ops as they are written into a graph; no stock runtime knows them.

`conversion/kernel` implements them, `bank.py` tells how their weights lie in the file. Options are uint32 numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from conversion.kernel import EMBEDDING, EXPERTS, LINEAR, MIXTURE, SELF_ATTENTION
from conversion.litert import bank
from conversion.litert.flatbuffer import Graph, Kind
from moe_jax.config import MoEConfig

ACTIVATIONS = ("silu", "gelu_tanh")
LANES = 16  # of which heads are a multiple
Matrix = tuple[int, tuple[int, int], str]  # a weight's buffer, its shape [out, in] and its label


class KernelExperts:
    """One layer's experts as the kernel reads them."""

    def __init__(self, buffer: int, shape: tuple[int, int, int], activation: str, name: str = "experts") -> None:
        """`buffer` holds what `bank.pack_experts` gives, `shape` is E, D, F."""
        self._buffer, self.shape, self.name = buffer, shape, name
        self.activation = ACTIVATIONS.index(activation)

    def tensor(self, g: Graph) -> int:
        """The bank in a graph."""
        experts, *widths = self.shape
        return g.tensor((experts, bank.expert_bytes(*widths)), "uint8", self.name, self._buffer)

    def options(self, choices: int) -> tuple[int, ...]:
        """What an op is told of these experts and of how many of them a token takes."""
        experts, *widths = self.shape
        return experts, choices, *widths, self.activation

    def expand(self, g: Graph, x: int, ids: int, weights: int, out: int | None = None) -> int:
        """Append y [T, D] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]) to `g`.

        x [T, D] float32, ids [T, K] int32 in [0, E), weights [T, K] float32; `out` is an existing tensor for y.
        """
        inputs, options = [x, ids, weights, self.tensor(g)], self.options(g.shape(ids)[-1])
        return _custom(g, EXPERTS, inputs, g.like(x) if out is None else out, options)

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


def self_attention(
    g: Graph, inputs: Sequence[int], weights: Sequence[Matrix], epsilons: Sequence[float], outs: Sequence[int]
) -> None:
    """Append the first half of a layer for one token.

    `inputs` are x [1, 1, D], its norm [D], cosines and sines [1, 1, H], the mask [1, 1, 1, C], k and v [1, G, C, H]
    and the start int32 [4], whose third number is the position; `weights` those of queries, keys and values
    [(N + 2 G) H, D], and of the output [D, N H]; `epsilons` of the norm, and of queries and keys (0: none); `outs`
    y, k and v.
    """
    x, norm, cos, sin, mask, k, *others = inputs
    (_, groups, _, head), ((_, width), (_, heads)) = g.shape(k), (shape for _, shape, _ in weights)
    options = width, heads // head, groups, head, *map(_bits, epsilons)
    places = (_matrix(g, *weight) for weight in weights)
    _append(g, SELF_ATTENTION, [x, norm, *places, cos, sin, mask, k, *others], outs, options)


def mixture(
    g: Graph,
    inputs: Sequence[int],
    experts: KernelExperts,
    shared: KernelExperts | None,
    moe: MoEConfig,
    epsilon: float,
    out: int,
) -> None:
    """Append the second half of a layer for one token: `out` = x plus its routed experts and a shared one.

    `inputs` are x [1, 1, D], its norm [D], the router [E, D] and its bias [E]; `epsilon` is the norm's.
    """
    routing = int(moe.score_func == "softmax"), int(moe.norm_topk_prob), _bits(moe.routed_scaling_factor)
    options = experts.options(moe.num_experts_per_tok) + routing
    options += shared.shape[2] if shared else 0, _bits(epsilon)
    banks = [bank.tensor(g) for bank in (experts, shared) if bank]
    _append(g, MIXTURE, [*inputs, *banks], [out], options)


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
