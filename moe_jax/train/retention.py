"""Which checkpoints stay when a new one is complete."""

from __future__ import annotations

import math
from collections.abc import Iterable

from moe_jax.config import CheckpointConfig
from moe_jax.train.checksums import Record


def kept(records: Iterable[Record], policy: CheckpointConfig) -> set[int]:
    """Steps that stay: the newest, the multiples, the best by held-out loss, and every final one."""
    newest_first = sorted(records, key=lambda record: record.step, reverse=True)
    steps = {record.step for record in newest_first[: policy.keep]}
    steps |= {record.step for record in newest_first if record.final}
    if policy.keep_every:
        steps |= {record.step for record in newest_first if record.step % policy.keep_every == 0}
    if policy.keep_best and (best := best_step(newest_first)) is not None:
        steps.add(best)
    return steps


def best_step(records: Iterable[Record]) -> int | None:
    """The step of the lowest held-out loss, None where none was measured.

    Of equally good ones it is the newest; a loss that is not finite is never the best.
    """
    known = [(r.heldout_loss, -r.step) for r in records if r.heldout_loss is not None]
    finite = [entry for entry in known if math.isfinite(entry[0])]
    return -min(finite)[1] if finite else None
