"""Attention that reads no more of the cache than is in use: IFs on the position, over lengths of cache.

The shapes of a file are fixed, so products over the cache cost what its whole length costs, however short the text.
An IF hands its inputs to a branch by reference, so a branch may take a beginning of the whole cache and attend to
that; positions beyond it would be masked, and add exact zeros. Branches hold no weights: all layers share them.
T tokens of a call, C cache length, n level, N query heads, G key/value heads, R = N/G*T rows of a group, H head
width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from conversion.litert.flatbuffer import Graph, Kind

_SHORTEST = 128  # the next one down would save 1 % of a token of size S
# Steps between levels grow with the root of the length: one token pays 0.28 us a layer for each level that it does
# not use and 0.14 to 0.24 us for each position that is not in use, and a text passes each octave alike. That gives
# sqrt(12 n); twice as much under the root, because the levels cost most of a token where the text is short.
_SPREAD = 24
_ALIGN = 32  # positions that XNNPACK packs at once
# XNNPACK packs what it multiplies by anew in each call. A long cache's packed copy leaves the processor's cache, a
# chunk's does not: one token over 8,320 positions took 2.03 ms a layer in place of 2.67 (2 threads: 1.35 and 1.60),
# alike in chunks of 1,024 to 2,048, and over 2,048 the same. Many tokens' scores are larger than their keys, and
# to join them costs more than that saves: 512 tokens over 8,320 positions took 122 ms in place of 87.
_CHUNK = 2048
_MOST = 5  # inputs of a CONCATENATION for XNNPACK: one more is left to another kernel, and all took twice as long


def levels(length: int, tokens: int) -> list[int]:
    """Lengths of cache that a call of `tokens` tokens attends to, rising up to the whole `length`."""
    found, n = [], max(_SHORTEST, _up(tokens))
    while n < length:
        found.append(n)
        n += _up(math.isqrt(_SPREAD * n))
    return [*found, length]


def chunks(n: int) -> list[tuple[int, int]]:
    """Starts and sizes of the about equal parts that one token attends to n positions in."""
    size = _up(math.ceil(n / max(round(n / _CHUNK), 1)))
    return [(start, min(size, n - start)) for start in range(0, n, size)]


def _up(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


class Attention:
    """The attention of all layers of one call."""

    def __init__(self, g: Graph, positions: int, length: int, name: str) -> None:
        """`positions` int32 [T] are those of the call's tokens in a cache of `length`."""
        self._g, self._positions, self._name = g, positions, name
        (self._tokens,) = g.shape(positions)
        self._levels = levels(length, self._tokens)
        self._leaves: list[Graph] = []
        self._halves: tuple[int, Graph, Graph] | None = None

    @cached_property
    def used(self) -> int:
        """Positions in use [], the new ones included."""
        g = self._g
        # Not the last one's: a call that is partly filled may leave the others at 0.
        last = g.add("REDUCE_MAX", [self._positions, g.const([0])], ((), "int32"))
        return g.add("ADD", [last, g.const(np.int32(1))], ((), "int32"))

    @cached_property
    def _chosen(self) -> Sequence[int]:
        """For each level whether [] it is the shortest that holds all positions in use."""
        g, kind = self._g, ((len(self._levels),), "bool")
        needed = g.add("GREATER", [self.used, g.const([0, *self._levels[:-1]])], kind)
        enough = g.add("LESS_EQUAL", [self.used, g.const(self._levels)], kind)
        outs = [((), "bool")] * len(self._levels)
        return g.add("UNPACK", [g.add("LOGICAL_AND", [needed, enough], kind)], *outs, num=len(outs), axis=0)

    def expand(self, inputs: Sequence[int], out: int | None = None) -> int:
        """Append softmax(q k^T + mask) v.

        `inputs` are q [1, G, R, H], k and v [1, G, C, H] with the new positions, mask [1, 1, T, C], all float32;
        `out` is an existing tensor for the result, which has q's shape.
        """
        g, kinds = self._g, [self._g.like(i) for i in inputs]
        out = g.tensor(*kinds[0]) if out is None else out
        if len(self._levels) == 1:
            return attend(g, inputs, self._levels[0], out)
        if self._tokens == 1:
            return self._chain(inputs, kinds, out)
        if self._halves is None:
            self._halves = self._fork(g, self.used, self._levels, [((), "int32"), *kinds])
        enough, short, long = self._halves
        return g.branch(enough, [self.used, *inputs], short, long, out)

    def _chain(self, inputs: Sequence[int], kinds: Sequence[Kind], out: int) -> int:
        """Append an IF for each level, which sets or hands on the value.

        For one token, whose value is short. To enter a branch prepares all IFs in it: a tree of 13 levels
        took 10 us a layer more (42 in place of 32 on one thread).
        """
        if not self._leaves:
            for n in (*self._levels, None):
                leaf, (y, *given) = self._graph(n or "skip", [kinds[0], *kinds])
                leaf.outputs = [attend(leaf, given, n) if n else y]
                self._leaves.append(leaf)
        *leaves, skip = self._leaves
        start = inputs[0]  # of the right shape; one of the levels is chosen
        return self._g.chain(self._chosen, leaves, skip, [start, *inputs], out)

    def _fork(self, g: Graph, used: int, lengths: Sequence[int], kinds: Sequence[Kind]) -> tuple[int, Graph, Graph]:
        """Append whether the first half of `lengths` will do, and make the subgraphs of both halves: a tree.

        For many tokens, whose values are long and copied at each level not taken: with a chain, 128 tokens over
        150 positions took 0.76 ms a layer in place of 0.51, 512 over 600 took 12.7 in place of 12.0.
        """
        half = len(lengths) // 2
        enough = g.add("LESS_EQUAL", [used, g.const(np.int32(lengths[half - 1]))], ((), "bool"))
        return enough, self._half(lengths[:half], kinds), self._half(lengths[half:], kinds)

    def _half(self, lengths: Sequence[int], kinds: Sequence[Kind]) -> Graph:
        ends = dict.fromkeys((lengths[0], lengths[-1]))
        g, (used, *inputs) = self._graph("_".join(map(str, ends)), kinds)
        if len(lengths) == 1:
            g.outputs = [attend(g, inputs, lengths[0])]
        else:
            enough, short, long = self._fork(g, used, lengths, kinds)
            g.outputs = [g.branch(enough, [used, *inputs], short, long, kinds[1])]
        return g

    def _graph(self, name: object, kinds: Sequence[Kind]) -> tuple[Graph, list[int]]:
        """A new subgraph and its inputs."""
        g = self._g.model.graph(f"{self._name}/attention_{name}")
        return g, [g.input(*kind) for kind in kinds]


def attend(g: Graph, inputs: Sequence[int], n: int, out: int | None = None) -> int:
    """Append `Attention.expand` on the first n positions of the cache."""
    q, k, v, mask = inputs
    (_, groups, rows, _), (_, _, tokens, _), like_q = g.shape(q), g.shape(mask), g.like(q)
    parts = chunks(n) if tokens == 1 else [(0, n)]
    mask = _part(g, mask, 3, 0, n)
    if tokens > 1:  # here and not once for all layers, because this copy is short
        mask = _join(g, [mask] * (rows // tokens), 2)
    products = []
    for start, size in parts:
        pair, kind = [q, _part(g, k, 2, start, size)], ((1, groups, rows, size), "float32")
        products.append(g.add("BATCH_MATMUL", pair, kind, adjX=False, adjY=True))
    scores = (1, groups, rows, n), "float32"
    weights = g.add("ADD", [_join(g, products, 3), mask], scores)
    weights = g.add("SOFTMAX", [weights], scores, beta=1.0)
    sums = []
    for start, size in parts:
        pair = [_part(g, weights, 3, start, size), _part(g, v, 2, start, size)]
        end = out if len(parts) == 1 and out is not None else like_q
        sums.append(g.add("BATCH_MATMUL", pair, end, adjX=False, adjY=False))
    y, *others = sums
    for i, term in enumerate(others, 2):
        y = g.add("ADD", [y, term], out if i == len(parts) and out is not None else like_q)
    return y


def _part(g: Graph, tensor: int, axis: int, start: int, size: int) -> int:
    """Append `size` places of an axis from `start` on; all of them are the tensor itself."""
    shape, kind = g.like(tensor)
    if size == shape[axis]:
        return tensor
    begin, shape = [0] * len(shape), list(shape)
    begin[axis], shape[axis] = start, size
    return g.add("SLICE", [tensor, g.const(begin), g.const(shape)], (shape, kind))


def _join(g: Graph, parts: Sequence[int], axis: int) -> int:
    """Append what holds all parts side by side; one is itself."""
    while len(parts) > 1:
        parts = [_concatenated(g, parts[i : i + _MOST], axis) for i in range(0, len(parts), _MOST)]
    return parts[0]


def _concatenated(g: Graph, parts: Sequence[int], axis: int) -> int:
    if len(parts) == 1:
        return parts[0]
    shape, kind = g.like(parts[0])
    shape = [*shape[:axis], sum(g.shape(p)[axis] for p in parts), *shape[axis + 1 :]]
    return g.add("CONCATENATION", parts, (shape, kind), axis=axis)
