"""Sparse INT4 experts out of builtin ops: what a token does not select is neither computed nor read.

Decode is a chain of one IF per expert. Prefill sorts the (token, choice) pairs by expert, runs every expert
on tiles of its own tokens, and loops over what is left of overfull experts: no routing drops a token or
computes an expert on all of them. An expert is one subgraph per tile size; all of them share its weights.

T tokens, D model, F expert width, E experts, K choices a token, R = T*K routed pairs, C rows of a tile.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from conversion.int4 import Int4
from conversion.litert.flatbuffer import Graph, Kind, Model, Stored

F32, I32, BOOL = "float32", "int32", "bool"
Bank = Int4 | Sequence[Stored]  # one matrix of each expert, at hand or in the file already
# Rows of a small tile. XNNPACK's kernels take 4 rows at once on Arm (gemm-config.c) and 8 with AVX-512 on AMD:
# 2 rows cost what 8 do, 9 twice as much, and 1 row, which has its own kernel, a fifth. Intel's AVX-512 with GFNI
# takes 14 and would be faster with tiles of 14; AMD took 1.2 times as long with them for 128 tokens of one layer.
_ROWS = 8
_REST = 32  # rows of a tile for what is left of overfull experts
_FEW = 2.5  # mean rows of an expert up to which single rows beat tiles
_MANY = 7  # tiles of an expert above which a larger one comes first


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
        xs = _take(g, x, _reshape(g, at, count))
        xs = g.add("SPLIT", [g.const(np.int32(0)), xs], *[row] * count, numSplits=count)
        return [[zero, x_, ones] for x_ in xs]

    def _of_tiles(self, g: Graph, x: int, at: int, rows: Sequence[int]) -> list[list[int]]:
        """What `fill` hands to the branch of each tile: all rows of x, and where in a table its own are listed.

        A tensor for each tile's list would make thousands, and loading takes a time that grows with their square.
        """
        counts = Counter(rows)
        columns = _split(g, at, [r * count for r, count in counts.items()], axis=1)
        tables = {r: _reshape(g, c, len(self) * counts[r], r) for r, c in zip(counts, columns, strict=True)}
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
        inputs = [zeros, e, x, _reshape(g, rows, 1, *g.shape(rows)), g.const(np.int32(0))]  # a table of one tile
        kinds, count = [g.like(i) for i in inputs], g.shape(rows)[0]
        if count not in self._groups:
            none = self.skip(f"no_group_x{count}", kinds)
            self._groups[count] = [self._group(kinds, part) for part in parts], none
        groups, skip = self._groups[count]
        number = g.add("FLOOR_DIV", [e, g.const(np.int32(size))], ((), I32))
        return g.chain(_equal(g, number, range(len(parts))), groups, skip, inputs, kinds[0])

    def _group(self, kinds: Sequence[Kind], part: range) -> Graph:
        """A subgraph for a few experts, with the inputs of `run`."""
        count = kinds[0][0][0]
        g, (total, e, x, *rows) = self.graph(f"from_{part.start}_x{count}", *kinds)
        leaves, skip = self._branches(count, [kinds[0], *kinds[2:]])
        g.outputs = [g.chain(_equal(g, e, part), leaves[part.start : part.stop], skip, [total, x, *rows], kinds[0])]
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
                tile = x if rows == 1 else _take(g, x, _take(g, *last))
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


def expand(g: Graph, experts: Experts, x: int, ids: int, weights: int, out: int | None = None) -> int:
    """Append y [T, D] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]) to `g`.

    x [T, D] float32, ids [T, K] int32 in [0, E), weights [T, K] float32, T static; `out` is an existing
    tensor for y. An expert that a token chooses twice counts twice.
    """
    form = expand_decode if g.shape(x)[0] == 1 else expand_prefill
    return form(g, experts, x, ids, weights, out)


def expand_decode(g: Graph, experts: Experts, x: int, ids: int, weights: int, out: int | None = None) -> int:
    """`expand` for T = 1: a chain of E IFs that hands the sum on; only the chosen experts run.

    An expert of weight 0 is not run. At E=60, K=4 an IF not taken costs 0.2 us; IFs over groups of experts
    were no faster, because entering a branch makes the runtime prepare the branch's own IFs anew.
    """
    n, k = len(experts), g.shape(ids)[1]
    where, shares = (_reshape(g, tensor, k, 1) for tensor in (ids, weights))
    scales = g.add("SCATTER_ND", [where, shares, g.const([n, 1])], ((n, 1), F32))  # sums up what meets
    chosen = _unpack(g, g.add("NOT_EQUAL", [scales, g.const(np.float32(0))], ((n, 1), BOOL)))
    return experts.add_chosen(g, chosen, g.const(np.zeros((1, experts.width), np.float32)), x, scales, out)


def tiling(tokens: int, choices: int, experts: int) -> tuple[int, ...]:
    """Rows of the tiles that every expert has before it counts as overfull, in the order in which they fill.

    Together they leave 4.5 standard deviations of a uniform routing above the mean load, since routing is not: a
    tile that is not in use costs 2 us, the loop for the overfull 0.5 ms and one of its tiles 0.2. Of very many, a
    larger tile takes the mean, as far as it makes an even number of kernels' rows, since two threads share it. Each
    number of rows is one more subgraph of every expert, 60 KB of memory. For 512 tokens of size S it is the _REST's
    (one layer took 0.96 of the time that tiles of 8 alone take).
    """
    mean = tokens * choices / experts
    need = min(mean + 4.5 * math.sqrt(mean), tokens)
    if mean <= _FEW:
        return (1,) * math.ceil(need)
    large = int(mean) // (2 * _ROWS) * 2 * _ROWS if need > _MANY * _ROWS else 0
    return (large,) * (large > 0) + (_ROWS,) * math.ceil((need - large) / _ROWS)


def expand_prefill(g: Graph, experts: Experts, x: int, ids: int, weights: int, out: int | None = None) -> int:
    """`expand` for T > 1: tiles of its own tokens for every expert, then a loop for the overfull."""
    tokens, choices = g.shape(ids)
    n, width, routed = len(experts), experts.width, tokens * choices
    rows, size = tiling(tokens, choices, n), routed + n
    tiles, capacity = len(rows), sum(rows)
    ids = _reshape(g, ids, routed)

    # Sort the pairs by (expert, token), with a marker in front of every expert: the integer keys are unique,
    # so no tie is left to the runtime. `order` lists pairs and, as numbers from R on, markers; `rank` is
    # its inverse. The pairs of expert e lie at the positions first[e] .. beyond[e] - 1 of the order.
    key = g.add("MUL", [ids, g.const(np.int32(-routed - 1))], ((routed,), I32))
    key = g.add("SUB", [key, g.const(np.arange(1, routed + 1, dtype=np.int32))], ((routed,), I32))
    markers = g.const(-(routed + 1) * np.arange(n, dtype=np.int32))
    order = _argsort_descending(g, g.add("CONCATENATION", [key, markers], ((size,), I32), axis=0))
    rank = _argsort_descending(g, g.add("NEG", [order], ((size,), I32)))
    rank, marker = _split(g, rank, (routed, n))
    first = g.add("ADD", [marker, g.const(np.int32(1))], ((n,), I32))
    beyond = g.add("SLICE", [marker, g.const([1]), g.const([n - 1])], ((n - 1,), I32))
    beyond = g.add("CONCATENATION", [beyond, g.const([size])], ((n,), I32), axis=0)
    count = g.add("SUB", [beyond, first], ((n,), I32))

    # By position: token and weight. A marker repeats the last pair, but is only ever read as padding.
    pair = g.add("MINIMUM", [order, g.const(np.int32(routed - 1))], ((size,), I32))
    token = g.add("FLOOR_DIV", [pair, g.const(np.int32(choices))], ((size,), I32))
    scale = g.add("GATHER", [_reshape(g, weights, routed), pair], ((size,), F32))

    # Tiles. Rows past an expert's last pair repeat other pairs; nothing fetches what becomes of them.
    steps = g.const(np.arange(capacity, dtype=np.int32)[None])
    at = g.add("ADD", [_reshape(g, first, n, 1), steps], ((n, capacity), I32))
    at = g.add("MINIMUM", [at, g.const(np.int32(size - 1))], ((n, capacity), I32))
    at = _take(g, token, at)
    starts = np.cumsum((0, *rows[:-1]), dtype=np.int32)
    used = g.add("GREATER", [_reshape(g, count, n, 1), g.const(starts[None])], ((n, tiles), BOOL))
    used = _unpack(g, _reshape(g, used, n * tiles))
    done = experts.fill(g, used, x, at, rows)

    # Combine: every pair fetches its row; one past the capacity fetches the row of zeros at the end.
    done.append(g.const(np.zeros((1, width), np.float32)))
    end = n * capacity
    table = g.add("CONCATENATION", done, ((end + 1, width), F32), axis=0)
    place = g.add("SUB", [rank, _take(g, first, ids)], ((routed,), I32))
    fits = g.add("LESS", [place, g.const(np.int32(capacity))], ((routed,), BOOL))
    own = g.add("MUL", [ids, g.const(np.int32(capacity))], ((routed,), I32))
    place = g.add("ADD", [place, own], ((routed,), I32))
    place = g.add("SELECT_V2", [fits, place, g.const(np.int32(end))], ((routed,), I32))
    place = _unpack(g, _reshape(g, place, tokens, choices), axis=1)
    shares = _unpack(g, _reshape(g, weights, tokens, choices, 1), axis=1)
    like_y = ((tokens, width), F32)
    terms = [g.add("MUL", [_take(g, table, p), w], like_y) for p, w in zip(place, shares, strict=True)]
    terms += [g.const(np.zeros((1, width), np.float32))] if choices == 1 else []
    never_overfull = routed <= capacity
    y = terms[0]
    for i, term in enumerate(terms[1:], 2):
        last = out if never_overfull and i == len(terms) else None
        y = g.add("ADD", [y, term], like_y if last is None else last)
    if never_overfull:
        return y
    rest = _REST if tokens > _REST else _ROWS
    return _add_rest(g, experts, (y, x, token, scale, first, beyond), (rest, capacity), out)


def _add_rest(g: Graph, experts: Experts, state: Sequence[int], tile: tuple[int, int], out: int | None) -> int:
    """y plus what the pairs past the capacity add, if there are any; state is y, x and the sorted pairs."""
    (rows, capacity), like_n = tile, g.like(state[-1])
    over = g.add("SUB", [state[-1], state[-2]], like_n)
    over = g.add("SUB", [over, g.const(np.int32(capacity - rows + 1))], like_n)
    over = g.add("MAXIMUM", [over, g.const(np.int32(0))], like_n)
    more = g.add("FLOOR_DIV", [over, g.const(np.int32(rows))], like_n)  # tiles past the capacity
    most = g.add("REDUCE_MAX", [more, g.const([0])], ((), I32))
    cond = g.add("GREATER", [most, g.const(np.int32(0))], ((), BOOL))
    state = [*state, more]
    skip = experts.skip("no_rest", [*map(g.like, state)])
    rest, inputs = experts.graph("rest", *map(g.like, state))
    y, x, token, scale, first, beyond, more = inputs
    # Tile j of the loop starts at position base[e] + j*C, for the first expert e with j < ends[e].
    ends = rest.add("CUMSUM", [more, rest.const(np.int32(0))], like_n)
    total = rest.add("REDUCE_MAX", [ends, rest.const([0])], ((), I32))
    base = rest.add("SUB", [more, ends], like_n)
    base = rest.add("MUL", [base, rest.const(np.int32(rows))], like_n)
    base = rest.add("ADD", [base, first], like_n)
    base = rest.add("ADD", [base, rest.const(np.int32(capacity))], like_n)
    carried = [rest.const(np.int32(0)), y, x, token, scale, base, beyond, ends, total]
    kinds = [rest.like(t) for t in carried]
    left, named = experts.graph("rest_left", *kinds)
    left.outputs = [left.add("LESS", [named[0], named[-1]], ((), BOOL))]
    step = {"condSubgraphIndex": left.index, "bodySubgraphIndex": _rest_tile(experts, kinds, rows)}
    rest.outputs = [rest.add("WHILE", carried, *kinds, **step)[1]]
    return g.branch(cond, state, rest, skip, out if out is not None else g.like(state[0]))


def _rest_tile(experts: Experts, kinds: Sequence[Kind], rows: int) -> int:
    """The loop's body: one tile of (j, y, x, token, scale, base, beyond, ends, total)."""
    b, inputs = experts.graph("rest_tile", *kinds)
    j, y, x, token, scale, base, beyond, ends, _ = inputs
    size, like_n = b.shape(token)[0], b.shape(ends)
    past = b.add("CAST", [b.add("LESS_EQUAL", [ends, j], (like_n, BOOL))], (like_n, I32))
    e = b.add("SUM", [past, b.const([0])], ((), I32))
    start = b.add("MUL", [j, b.const(np.int32(rows))], ((), I32))
    start = b.add("ADD", [start, _take(b, base, e)], ((), I32))
    at = b.add("ADD", [b.const(np.arange(rows, dtype=np.int32)), start], ((rows,), I32))
    inside = b.add("LESS", [at, _take(b, beyond, e)], ((rows,), BOOL))
    inside = b.add("CAST", [inside], ((rows,), F32))
    at = b.add("MINIMUM", [at, b.const(np.int32(size - 1))], ((rows,), I32))
    at_token, at_scale = _take(b, token, at), _take(b, scale, at)
    at_scale = b.add("MUL", [at_scale, inside], ((rows,), F32))  # padding adds nothing
    value = experts.run(b, e, x, at_token)
    value = b.add("MUL", [value, _reshape(b, at_scale, rows, 1)], b.like(value))
    where = _reshape(b, at_token, rows, 1)
    value = b.add("SCATTER_ND", [where, value, b.const(b.shape(y))], b.like(y))
    y = b.add("ADD", [y, value], b.like(y))
    j = b.add("ADD", [j, b.const(np.int32(1))], ((), I32))
    b.outputs = [j, y, *inputs[2:]]  # unchanged inputs cost no copy
    return b.index


def _argsort_descending(g: Graph, keys: int) -> int:
    kind = g.like(keys)
    return g.add("TOPK_V2", [keys, g.const(np.int32(kind[0][0]))], kind, kind)[1]


def _split(g: Graph, tensor: int, sizes: Sequence[int], axis: int = 0) -> list[int]:
    """The parts of a tensor which have these sizes along an axis."""
    if len(sizes) == 1:
        return [tensor]
    shape, kind = g.like(tensor)
    outs = [((*shape[:axis], size, *shape[axis + 1 :]), kind) for size in sizes]
    parts = g.add("SPLIT_V", [tensor, g.const(sizes), g.const(np.int32(axis))], *outs, numSplits=len(outs))
    return list(parts)


def _reshape(g: Graph, tensor: int, *shape: int) -> int:
    kind = (shape, g.like(tensor)[1])
    return g.add("RESHAPE", [tensor, g.const(shape)], kind, newShape=list(shape))


def _take(g: Graph, table: int, ids: int) -> int:
    """Rows of `table` along its first axis."""
    (_, *rest), kind = g.like(table)
    return g.add("GATHER", [table, ids], ((*g.shape(ids), *rest), kind))


def _equal(g: Graph, number: int, values: range) -> list[int]:
    """For each of some values whether a number [] is it."""
    all_of_them = g.const(np.arange(values.start, values.stop, dtype=np.int32))
    return _unpack(g, g.add("EQUAL", [number, all_of_them], ((len(values),), BOOL)))


def _unpack(g: Graph, tensor: int, axis: int = 0) -> list[int]:
    """The slices along an axis, as tensors of one rank less."""
    shape, kind = g.like(tensor)
    outs = [((*shape[:axis], *shape[axis + 1 :]), kind)] * shape[axis]
    parts = g.add("UNPACK", [tensor], *outs, num=len(outs), axis=axis)
    return list(parts) if len(outs) > 1 else [parts]
