"""One layer's INT4 experts in a file: weights stored once, and the branches that run one expert on a tile of rows.

An expert is one subgraph per tile size; all of them share its weights. `routed.py` and `prefill.py` say which
branches a call takes. T tokens, D model, F expert width, E experts, C rows of a tile.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from conversion.int4 import Int4
from conversion.litert.flatbuffer import F32, I32, Graph, Kind, Model, Stored
from conversion.litert.moving import equal, reshape, split, take

Bank = Int4 | Sequence[Stored]  # one matrix of each expert, at hand or in the file already


class Experts:
    """One layer's experts in a file: weights stored once, subgraphs made once per tile size."""

    def __init__(self, model: Model, gate_up: Bank, down: Bank, activation: str, name: str = "experts") -> None:
        """Codes of `gate_up` are [E, 2F, D], gate rows first, of `down` [E, D, F]."""
        if activation not in ("silu", "gelu_tanh"):
            raise ValueError(f"activation {activation!r} is neither silu nor gelu_tanh")
        self.model, self.activation, self.name = model, activation, name
        count = len(gate_up.codes if isinstance(gate_up, Int4) else gate_up)
        # One expert's weights lie side by side in the file: one that nobody asks for is never read.
        self._weights = [(_one(model, gate_up, e), _one(model, down, e)) for e in range(count)]
        self.width = self._weights[0][1].shape[0]
        self._leaves: dict[int, tuple[list[Graph], Graph]] = {}
        self._groups: dict[int, tuple[list[Graph], Graph]] = {}

    def __len__(self) -> int:
        return len(self._weights)

    def graph(self, name: str, *inputs: Kind) -> tuple[Graph, list[int]]:
        """A new subgraph and its inputs."""
        g = self.model.graph(f"{self.name}/{name}")
        return g, [g.input(*i) for i in inputs]

    def skip(self, name: str, kinds: Sequence[Kind]) -> Graph:
        """A subgraph that gives its first input."""
        g, inputs = self.graph(name, *kinds)
        g.outputs = inputs[:1]
        return g

    def add_chosen(self, g: Graph, chosen: Sequence[int], total: int, x: int, scales: int, out: int | None) -> int:
        """Append: total + sum of scales[e] * expert e(x) over the chosen[e]; x [1, D], scales [E, 1]."""
        leaves, skip = self._branches(1, [g.like(t) for t in (total, x, scales)])
        return g.chain(chosen, leaves, skip, [total, x, scales], g.like(x) if out is None else out)

    def fill(self, g: Graph, used: Sequence[int], x: int, at: int, rows: Sequence[int]) -> list[int]:
        """Append every expert's tiles, one expert after the other: expert e(x[rows of the tile]) if in use, else 0.

        x [T, D]; at int32 [E, C] are the rows of x that each expert's tiles of these `rows` take; used [] by tile.
        """
        inputs = self._of_single_rows(g, x, at) if rows[0] == 1 else self._of_tiles(g, x, at, rows)
        done = []
        for i, (cond, given) in enumerate(zip(used, inputs, strict=True)):
            leaves, skip = self._branches(g.shape(given[0])[0], [g.like(t) for t in given])
            done.append(g.branch(cond, given, leaves[i // len(rows)], skip, g.like(given[0])))
        return done

    def _of_single_rows(self, g: Graph, x: int, at: int) -> list[list[int]]:
        """What `fill` hands to the branch of each tile of one row."""
        count, row = math.prod(g.shape(at)), ((1, self.width), F32)
        zero, ones = g.const(np.zeros(row[0], np.float32)), g.const(np.ones((len(self), 1), np.float32))
        xs = take(g, x, reshape(g, at, count))
        xs = g.add("SPLIT", [g.const(np.int32(0)), xs], *[row] * count, numSplits=count)
        return [[zero, x_, ones] for x_ in xs]

    def _of_tiles(self, g: Graph, x: int, at: int, rows: Sequence[int]) -> list[list[int]]:
        """What `fill` hands to the branch of each tile: all rows of x, and where in a table its own are listed.

        A tensor for each tile's list would make thousands, and loading takes a time that grows with their square.
        """
        counts = Counter(rows)
        columns = split(g, at, [r * count for r, count in counts.items()], axis=1)
        tables = {r: reshape(g, c, len(self) * counts[r], r) for r, c in zip(counts, columns, strict=True)}
        zeros = {r: g.const(np.zeros((r, self.width), np.float32)) for r in counts}
        places = {r: itertools.count() for r in counts}
        return [
            [zeros[r], x, tables[r], g.const(np.int32(next(places[r])))] for _ in range(len(self)) for r in rows
        ]

    def run(self, g: Graph, e: int, x: int, rows: int) -> int:
        """Append: expert(x[rows]) for an id [] known at run time; x [T, D], rows int32 [C], C > 1.

        An IF per group of experts, then one per expert of the group: 16 that hand a tile on, and not 60. A binary
        tree was no faster, because entering a branch prepares all IFs inside it anew.
        """
        size = math.isqrt(len(self) - 1) + 1
        parts = [range(len(self))[i : i + size] for i in range(0, len(self), size)]
        zeros = g.const(np.zeros((*g.shape(rows), self.width), np.float32))
        inputs = [zeros, e, x, reshape(g, rows, 1, *g.shape(rows)), g.const(np.int32(0))]  # a table of one tile
        kinds, count = [g.like(i) for i in inputs], g.shape(rows)[0]
        if count not in self._groups:
            none = self.skip(f"no_group_x{count}", kinds)
            self._groups[count] = [self._group(kinds, part) for part in parts], none
        groups, skip = self._groups[count]
        number = g.add("FLOOR_DIV", [e, g.const(np.int32(size))], ((), I32))
        return g.chain(equal(g, number, range(len(parts))), groups, skip, inputs, kinds[0])

    def _group(self, kinds: Sequence[Kind], part: range) -> Graph:
        """A subgraph for a few experts, with the inputs of `run`."""
        count = kinds[0][0][0]
        g, (total, e, x, *rows) = self.graph(f"from_{part.start}_x{count}", *kinds)
        leaves, skip = self._branches(count, [kinds[0], *kinds[2:]])
        g.outputs = [g.chain(equal(g, e, part), leaves[part.start : part.stop], skip, [total, x, *rows], kinds[0])]
        return g

    def _branches(self, rows: int, kinds: Sequence[Kind]) -> tuple[Sequence[Graph], Graph]:
        """The subgraphs that an IF on each expert takes, and the one that it skips to, for a tile of `rows`.

        Single rows add up in decode's chain, and find their scale themselves: 60 tensors of one scale each would
        cost 12 us a token. Prefill weighs its tiles where it combines them, and a branch takes its rows of x
        itself, since not all tiles are in use. `kinds` are those of the first call's inputs; the runtime gives a
        branch the shapes of its caller.
        """
        if rows not in self._leaves:
            leaves = [self.graph(f"{i}_x{rows}", *kinds) for i in range(len(self))]
            for i, (g, (total, x, *last)) in enumerate(leaves):
                tile = x if rows == 1 else take(g, x, take(g, *last))
                y = feed_forward(g, tile, self._weights[i], self.activation)
                if rows == 1:
                    scale = g.add("SLICE", [*last, g.const([i, 0]), g.const([1, 1])], ((1, 1), F32))
                    y = g.add("ADD", [total, g.add("MUL", [y, scale], kinds[0])], kinds[0])
                g.outputs = [y]
            self._leaves[rows] = [g for g, _ in leaves], self.skip(f"skip_x{rows}", kinds)
        return self._leaves[rows]


def _one(model: Model, bank: Bank, e: int) -> Stored:
    return model.store(Int4(bank.codes[e], bank.scales[e])) if isinstance(bank, Int4) else bank[e]


def feed_forward(g: Graph, x: int, weights: tuple[Stored, Stored], activation: str) -> int:
    """x [T, D] through one gated feed-forward, weights gate|up [2F, D] and down [D, F]: [T, D]."""
    gate_up, down = weights
    h = gated(g, g.fully_connected(x, g.int4(gate_up, "gate_up")), activation)
    return g.fully_connected(h, g.int4(down, "down"))


def gated(g: Graph, gate_up: int, activation: str) -> int:
    """act(gate) * up of [..., 2F], the first F columns being the gate: [..., F]."""
    *rows, double = g.shape(gate_up)
    half = ((*rows, double // 2), F32)
    gate, up = g.add("SPLIT", [g.const(np.int32(len(rows))), gate_up], half, half, numSplits=2)
    return activated(g, gate, up, activation)


def activated(g: Graph, gate: int, up: int, activation: str) -> int:
    """act(gate) * up."""
    kind = g.like(gate)
    if activation == "silu":
        gate = g.add("MUL", [gate, g.add("LOGISTIC", [gate], kind)], kind)
    else:
        gate = g.add("GELU", [gate], kind, approximate=True)
    return g.add("MUL", [gate, up], kind)
