"""All experts on all tokens, as two wide products: the yardstick that sparse experts are measured against.

This is the fastest form without control flow: a call reads every weight once. Its answers differ slightly from the
model's, because the second product rounds its input to INT8 over the row of all experts, not expert by expert.
T tokens, D model, F expert width, E experts, K choices a token.
"""

from __future__ import annotations

import numpy as np

from conversion.int4 import Int4
from conversion.litert.experts import activated
from conversion.litert.flatbuffer import Graph, Model


class DenseExperts:
    """One layer's experts side by side: gate and up [E*F, D], down [D, E*F]."""

    def __init__(self, model: Model, gate_up: Int4, down: Int4, activation: str):
        """Codes of `gate_up` are [E, 2F, D], gate rows first, of `down` [E, D, F]."""
        experts, double, _ = gate_up.codes.shape
        self.shape, self.activation = (experts, double // 2), activation
        gate, up = (
            Int4(*(_rows(a[:, part]) for a in (gate_up.codes, gate_up.scales)))
            for part in (slice(double // 2), slice(double // 2, None))
        )
        side = Int4(*(np.concatenate(list(a), axis=-1) for a in (down.codes, down.scales)))
        self._gate, self._up, self._down = (model.store(w) for w in (gate, up, side))

    def expand(self, g: Graph, x: int, ids: int, weights: int, out: int) -> None:
        """Append y [T, D] = sum over k of weights[t, k] * expert_{ids[t, k]}(x[t]) to `g`, written to `out`."""
        (experts, width), (tokens, choices) = self.shape, g.shape(ids)
        wide, split = ((tokens, experts * width), "float32"), (tokens, experts, width)
        gate, up = (g.fully_connected(x, g.int4(w), wide) for w in (self._gate, self._up))
        h = g.add("RESHAPE", [activated(g, gate, up, self.activation), g.const(split)], (split, "float32"))
        one, zero = g.const(np.float32(1)), g.const(np.float32(0))
        kind = ((tokens, choices, experts), "float32")
        chosen = g.add("ONE_HOT", [ids, g.const(np.int32(experts)), one, zero], kind, axis=-1)
        column = (tokens, choices, 1)
        weights = g.add("RESHAPE", [weights, g.const(column)], (column, "float32"))
        chosen = g.add("MUL", [chosen, weights], kind)
        routing = g.add("SUM", [chosen, g.const([1])], ((tokens, experts), "float32"))
        column = (tokens, experts, 1)
        routing = g.add("RESHAPE", [routing, g.const(column)], (column, "float32"))
        h = g.add("MUL", [h, routing], (split, "float32"))
        h = g.add("RESHAPE", [h, g.const(wide[0])], wide)
        g.fully_connected(h, g.int4(self._down), out)


def _rows(a: np.ndarray) -> np.ndarray:
    return a.reshape(-1, a.shape[-1])
