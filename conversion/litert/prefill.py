"""Many tokens through sparse experts: every expert on tiles of its own tokens.

The (token, choice) pairs are sorted by expert, every expert runs on tiles of its own, and a loop takes what is left
of overfull experts: no routing drops a token or computes an expert on all of them.

T tokens, D model, E experts, K choices a token, R = T*K routed pairs, C rows of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from conversion.litert.experts import Experts
from conversion.litert.flatbuffer import BOOL, F32, I32, Graph, Kind
from conversion.litert.moving import reshape, split, take, unpack

# Rows of a small tile. XNNPACK's kernels take 4 rows at once on Arm (gemm-config.c) and 8 with AVX-512 on AMD:
# 2 rows cost what 8 do, 9 twice as much, and 1 row, which has its own kernel, a fifth. Intel's AVX-512 with GFNI
# takes 14 and would be faster with tiles of 14; AMD took 1.2 times as long with them for 128 tokens of one layer.
_ROWS = 8
_REST = 32  # rows of a tile for what is left of overfull experts
_FEW = 2.5  # mean rows of an expert up to which single rows beat tiles
_MANY = 7  # tiles of an expert above which a larger one comes first


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
    """Append y [T, D], as `routed.expand` says, for T > 1."""
    tokens, choices = g.shape(ids)
    n, routed = len(experts), tokens * choices
    rows = tiling(tokens, choices, n)
    pairs = _sort(g, reshape(g, ids, routed), weights, n, choices)
    done = _run_tiles(g, experts, x, pairs, rows)
    capacity = sum(rows)
    if routed <= capacity:  # no expert can be overfull
        return _combine(g, done, pairs, weights, capacity, out)
    y = _combine(g, done, pairs, weights, capacity, None)
    rest = _REST if tokens > _REST else _ROWS
    state = (y, x, pairs.token, pairs.scale, pairs.first, pairs.beyond)
    return _add_rest(g, experts, state, (rest, capacity), out)


class _Pairs(NamedTuple):
    """The (token, choice) pairs, R of them by their number or R + E by their position in the order of experts."""

    ids: int  # [R] expert
    rank: int  # [R] position
    token: int  # [R + E]
    scale: int  # [R + E] weight
    first: int  # [E] an expert's first position
    beyond: int  # [E] the position behind its last
    count: int  # [E]


def _sort(g: Graph, ids: int, weights: int, n: int, choices: int) -> _Pairs:
    """Sort the pairs by (expert, token), with a marker in front of every expert.

    The integer keys are unique, so no tie is left to the runtime. `order` lists pairs and, as numbers from R on,
    markers; `rank` is its inverse. A marker repeats the last pair, but is only ever read as padding.
    """
    (routed,) = g.shape(ids)
    size = routed + n
    key = g.add("MUL", [ids, g.const(np.int32(-routed - 1))], ((routed,), I32))
    key = g.add("SUB", [key, g.const(np.arange(1, routed + 1, dtype=np.int32))], ((routed,), I32))
    markers = g.const(-(routed + 1) * np.arange(n, dtype=np.int32))
    order = _argsort_descending(g, g.add("CONCATENATION", [key, markers], ((size,), I32), axis=0))
    rank = _argsort_descending(g, g.add("NEG", [order], ((size,), I32)))
    rank, marker = split(g, rank, (routed, n))
    first = g.add("ADD", [marker, g.const(np.int32(1))], ((n,), I32))
    beyond = g.add("SLICE", [marker, g.const([1]), g.const([n - 1])], ((n - 1,), I32))
    beyond = g.add("CONCATENATION", [beyond, g.const([size])], ((n,), I32), axis=0)
    count = g.add("SUB", [beyond, first], ((n,), I32))
    pair = g.add("MINIMUM", [order, g.const(np.int32(routed - 1))], ((size,), I32))
    token = g.add("FLOOR_DIV", [pair, g.const(np.int32(choices))], ((size,), I32))
    scale = g.add("GATHER", [reshape(g, weights, routed), pair], ((size,), F32))
    return _Pairs(ids, rank, token, scale, first, beyond, count)


def _run_tiles(g: Graph, experts: Experts, x: int, pairs: _Pairs, rows: Sequence[int]) -> list[int]:
    """What becomes of every expert's tiles of these rows, zeros where one is not in use.

    Rows past an expert's last pair repeat other pairs; nothing fetches what becomes of them.
    """
    n, tiles, capacity, (size,) = len(experts), len(rows), sum(rows), g.shape(pairs.token)
    steps = g.const(np.arange(capacity, dtype=np.int32)[None])
    at = g.add("ADD", [reshape(g, pairs.first, n, 1), steps], ((n, capacity), I32))
    at = g.add("MINIMUM", [at, g.const(np.int32(size - 1))], ((n, capacity), I32))
    at = take(g, pairs.token, at)
    starts = np.cumsum((0, *rows[:-1]), dtype=np.int32)
    used = g.add("GREATER", [reshape(g, pairs.count, n, 1), g.const(starts[None])], ((n, tiles), BOOL))
    used = unpack(g, reshape(g, used, n * tiles))
    return experts.fill(g, used, x, at, rows)


def _combine(g: Graph, done: Sequence[int], pairs: _Pairs, weights: int, capacity: int, out: int | None) -> int:
    """y [T, D]: every pair fetches its row; one past the capacity fetches the row of zeros at the end."""
    (tokens, choices), (routed,), (n,) = g.shape(weights), g.shape(pairs.ids), g.shape(pairs.first)
    (_, width), end = g.shape(done[0]), n * capacity
    table = [*done, g.const(np.zeros((1, width), np.float32))]
    table = g.add("CONCATENATION", table, ((end + 1, width), F32), axis=0)
    place = g.add("SUB", [pairs.rank, take(g, pairs.first, pairs.ids)], ((routed,), I32))
    fits = g.add("LESS", [place, g.const(np.int32(capacity))], ((routed,), BOOL))
    own = g.add("MUL", [pairs.ids, g.const(np.int32(capacity))], ((routed,), I32))
    place = g.add("ADD", [place, own], ((routed,), I32))
    place = g.add("SELECT_V2", [fits, place, g.const(np.int32(end))], ((routed,), I32))
    place = unpack(g, reshape(g, place, tokens, choices), axis=1)
    shares = unpack(g, reshape(g, weights, tokens, choices, 1), axis=1)
    like_y = ((tokens, width), F32)
    terms = [g.add("MUL", [take(g, table, p), w], like_y) for p, w in zip(place, shares, strict=True)]
    terms += [g.const(np.zeros((1, width), np.float32))] if choices == 1 else []
    y = terms[0]
    for term in terms[1:-1]:
        y = g.add("ADD", [y, term], like_y)
    return g.add("ADD", [y, terms[-1]], like_y if out is None else out)


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
    start = b.add("ADD", [start, take(b, base, e)], ((), I32))
    at = b.add("ADD", [b.const(np.arange(rows, dtype=np.int32)), start], ((rows,), I32))
    inside = b.add("LESS", [at, take(b, beyond, e)], ((rows,), BOOL))
    inside = b.add("CAST", [inside], ((rows,), F32))
    at = b.add("MINIMUM", [at, b.const(np.int32(size - 1))], ((rows,), I32))
    at_token, at_scale = take(b, token, at), take(b, scale, at)
    at_scale = b.add("MUL", [at_scale, inside], ((rows,), F32))  # padding adds nothing
    value = experts.run(b, e, x, at_token)
    value = b.add("MUL", [value, reshape(b, at_scale, rows, 1)], b.like(value))
    where = reshape(b, at_token, rows, 1)
    value = b.add("SCATTER_ND", [where, value, b.const(b.shape(y))], b.like(y))
    y = b.add("ADD", [y, value], b.like(y))
    j = b.add("ADD", [j, b.const(np.int32(1))], ((), I32))
    b.outputs = [j, y, *inputs[2:]]  # unchanged inputs cost no copy
    return b.index


def _argsort_descending(g: Graph, keys: int) -> int:
    kind = g.like(keys)
    return g.add("TOPK_V2", [keys, g.const(np.int32(kind[0][0]))], kind, kind)[1]
