"""Which steps went wrong: a loss or gradient that is not finite, or a loss far above the last ones.

The judgement follows from the losses alone, which every process sees alike and a checkpoint holds, so all processes
and all restarts of a run judge the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

from moe_jax.config import GuardConfig

_WINDOW = 32  # losses that a spike is measured against
_ENOUGH = 8  # of them, before anything counts as a spike


@dataclass(frozen=True)
class BadStep:
    """A step whose result must not be used."""

    step: int
    quantity: str  # loss or grad_norm
    value: float
    batch: int  # the number of its batch, from 0


class LossGuard:
    """Tells bad steps from good ones by the losses of the last good ones."""

    def __init__(self, cfg: GuardConfig) -> None:
        self._factor = cfg.spike_factor
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    @property
    def recent(self) -> list[float]:
        """The last good losses, oldest first."""
        return list(self._recent)

    def reset(self, recent: list[float]) -> None:
        """Go back to the losses that a checkpoint holds."""
        self._recent = deque(recent, maxlen=_WINDOW)

    def check(self, step: int, loss: float, grad_norm: float, batch: int) -> BadStep | None:
        """Take a step's result in, or say what is wrong with it."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return BadStep(step, name, value, batch)
        enough = self._factor and len(self._recent) >= _ENOUGH
        if enough and loss > self._factor * statistics.median(self._recent):
            return BadStep(step, "loss", loss, batch)
        self._recent.append(loss)
        return None
