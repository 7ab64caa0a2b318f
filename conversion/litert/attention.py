"""Attention that reads no more of the cache than is in use: a tree of IFs on the position, over lengths of cache.

The shapes of a file are fixed, so products over the cache cost what its whole length costs, however short the text.
An IF hands its inputs to a branch by reference, so a branch may take a beginning of the whole cache and attend to
that; positions beyond it would be masked, and add exact zeros. Branches hold no weights: all layers share them.
T tokens of a call, C cache length, n level, N query heads, G key/value heads, R = N/G*T rows of a group, H head
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from conversion.litert.flatbuffer import Graph, Kind

_SHORTEST = 128  # the next one down would save 1 % of a token of size S
# Taking the beginning out is a copy, which costs one token over half of what its products do: of 8,320 positions
# 5,000 took 0.75 of the whole's time and 6,144 all of it. More tokens share one copy.
_WORTH, _WORTH_SHARED = 0.65, 0.9


def levels(length: int, tokens: int) -> list[int]:
    """Lengths of cache that a call of `tokens` tokens attends to, rising up to the whole `length`.

    Two to an octave, so that on average a fifth of what is read is not in use.
    """
    steps = (step << i for i in range(length.bit_length()) for step in (_SHORTEST, _SHORTEST * 3 // 2))
    longest = length * (_WORTH if tokens == 1 else _WORTH_SHARED)
    return [*(n for n in steps if tokens <= n <= longest), length]


class Attention:
    """The attention of all layers of one call."""

    def __init__(self, g: Graph, positions: int, name: str) -> None:
        """Append what finds out how much of the cache is in use; `positions` int32 [T] are those of the tokens."""
        self._g, self._positions, self._name = g, positions, name
        self._branches: tuple[int, Graph, Graph] | None = None

    @cached_property
    def used(self) -> int:
        """Positions in use [], the new ones included."""
        g = self._g
        # Not the last one's: a call that is partly filled may leave the others at 0.
        last = g.add("REDUCE_MAX", [self._positions, g.const([0])], ((), "int32"))
        return g.add("ADD", [last, g.const(np.int32(1))], ((), "int32"))

    def expand(self, inputs: Sequence[int], out: int | None = None) -> int:
        """Append softmax(q k^T + mask) v.

        `inputs` are q [1, G, R, H], k and v [1, G, C, H] with the new positions, mask [1, 1, T, C], all float32;
        `out` is an existing tensor for the result, which has q's shape.
        """
        g, (q, _, _, mask) = self._g, inputs
        out = g.tensor(*g.like(q)) if out is None else out
        lengths = levels(g.shape(mask)[3], g.shape(mask)[2])
        if len(lengths) == 1:
            return attend(g, inputs, lengths[0], out)
        if self._branches is None:
            self._branches = self._fork(g, self.used, lengths, [((), "int32"), *map(g.like, inputs)])
        enough, short, long = self._branches
        return g.branch(enough, [self.used, *inputs], short, long, out)

    def _fork(self, g: Graph, used: int, lengths: Sequence[int], kinds: Sequence[Kind]) -> tuple[int, Graph, Graph]:
        """Append whether the first half of `lengths` will do, and make the subgraphs of both halves."""
        half = len(lengths) // 2
        enough = g.add("LESS_EQUAL", [used, g.const(np.int32(lengths[half - 1]))], ((), "bool"))
        return enough, self._branch(lengths[:half], kinds), self._branch(lengths[half:], kinds)

    def _branch(self, lengths: Sequence[int], kinds: Sequence[Kind]) -> Graph:
        ends = dict.fromkeys((lengths[0], lengths[-1]))
        g = self._g.model.graph(f"{self._name}/attention_{'_'.join(map(str, ends))}")
        used, *inputs = (g.input(*kind) for kind in kinds)
        if len(lengths) == 1:
            g.outputs = [attend(g, inputs, lengths[0])]
        else:
            enough, short, long = self._fork(g, used, lengths, kinds)
            g.outputs = [g.branch(enough, [used, *inputs], short, long, kinds[1])]
        return g


def attend(g: Graph, inputs: Sequence[int], n: int, out: int | None = None) -> int:
    """Append `Attention.expand` on the first n positions of the cache."""
    q, k, v, mask = inputs
    (_, groups, rows, width), (_, _, tokens, length) = g.shape(q), g.shape(mask)
    if n < length:
        beginning = (1, groups, n, width)
        k, v = (_first(g, cache, beginning) for cache in (k, v))
        mask = _first(g, mask, (1, 1, tokens, n))
    if rows > tokens:  # here and not once for all layers, because this copy is short
        mask = g.add("CONCATENATION", [mask] * (rows // tokens), ((1, 1, rows, n), "float32"), axis=2)
    scores = (1, groups, rows, n), "float32"
    weights = g.add("BATCH_MATMUL", [q, k], scores, adjX=False, adjY=True)
    weights = g.add("SOFTMAX", [g.add("ADD", [weights, mask], scores)], scores, beta=1.0)
    return g.add("BATCH_MATMUL", [weights, v], g.like(q) if out is None else out, adjX=False, adjY=False)


def _first(g: Graph, tensor: int, shape: Sequence[int]) -> int:
    return g.add("SLICE", [tensor, g.const([0] * len(shape)), g.const(shape)], (shape, g.like(tensor)[1]))
