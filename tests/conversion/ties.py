"""Activations so close to half an INT8 step that the order of float32 sums decides how they are rounded.

No reference can know the order that a runtime sums in, and one value rounded the other way moves everything after
it by far more than a last bit. So a runtime is held to the reference with each such value rounded up or down: few
enough alternatives to try, and each a bound as tight as without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from conversion.torch_model import MobileMoE, Reference
from conversion.weights import Weights
from moe_jax.ops import fake_quant

NEAR = 255e-6  # steps from the half: a millionth of a row's range, as float32 sums of some hundred terms differ


class Tie(NamedTuple):
    """A value near half a step: of which token, before which product, in which column."""

    token: int
    product: str
    column: int


class Tied(Reference):
    """The reference that rounds the ties `swayed` the other way; `met` gathers all ties of what it computes."""

    def __init__(self, weights: Weights, swayed: frozenset[Tie] = frozenset()):
        super().__init__(weights)
        self.swayed, self.met = swayed, set[Tie]()

    def rounded(self, x: Tensor, product: str, tokens: Tensor | None = None) -> Tensor:
        """See `Reference.rounded`."""
        rows = x.reshape(-1, x.shape[-1]).numpy().copy()
        codes, scale, zero = fake_quant.quantize_rows_int8(rows)
        error = rows / scale - (codes - zero)
        for row, column in np.argwhere(np.abs(error) > 0.5 - NEAR).tolist():
            tie = Tie(row if tokens is None else int(tokens[row]), product, column)
            self.met.add(tie)
            if tie in self.swayed:
                rows[row, column] += np.copysign(2 * NEAR, error[row, column]) * scale[row, 0]
        return super().rounded(torch.from_numpy(rows).reshape(x.shape), product, tokens)


def nearest(
    weights: Weights,
    ids: Sequence[int],
    got: np.ndarray,
    close: float,
    swayed: frozenset[Tie] = frozenset(),
    kind: type[Tied] = Tied,
) -> tuple[np.ndarray, frozenset[Tie]]:
    """Log-likelihoods [S-1] of ids[1:] that differ from `got` by less than `close`, and the ties swayed for it.

    When no choice of ties brings them as close, those without any (more than `swayed`). `kind` is for runtimes that
    do not round everything.
    """
    ops = kind(weights, swayed)
    logits = MobileMoE(weights, ops, len(ids))(torch.tensor([list(ids)], dtype=torch.int32))[0]
    rows = torch.log_softmax(logits, -1)[:-1]
    want = rows.gather(1, torch.tensor(list(ids[1:]))[:, None])[:, 0].numpy()
    apart = np.flatnonzero(np.abs(got - want) >= close)
    if len(apart):
        # What a token sees is behind it, so the first one that differs holds the value that was rounded otherwise.
        for tie in sorted(tie for tie in ops.met - swayed if tie.token == apart[0]):
            found = nearest(weights, ids, got, close, swayed | {tie}, kind)
            if np.abs(got - found[0]).max() < close:
                return found
    return want, swayed
