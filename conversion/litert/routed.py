"""Sparse INT4 experts out of builtin ops: what a token does not select is neither computed nor read.

One token is a chain of one IF per expert, many are sorted into tiles (`prefill.py`). T tokens, D model, E experts,
K choices a token.
"""

from __future__ import annotations

import numpy as np

from conversion.litert.experts import Experts
from conversion.litert.flatbuffer import BOOL, F32, Graph
from conversion.litert.moving import reshape, unpack
from conversion.litert.prefill import expand_prefill


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
    where, shares = (reshape(g, tensor, k, 1) for tensor in (ids, weights))
    scales = g.add("SCATTER_ND", [where, shares, g.const([n, 1])], ((n, 1), F32))  # sums up what meets
    chosen = unpack(g, g.add("NOT_EQUAL", [scales, g.const(np.float32(0))], ((n, 1), BOOL)))
    return experts.add_chosen(g, chosen, g.const(np.zeros((1, experts.width), np.float32)), x, scales, out)
