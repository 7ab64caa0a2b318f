"""Loss on held-out text while a run trains, by which it keeps its best checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import jax
from jax.sharding import Mesh

from moe_jax.config import DataConfig, RunConfig
from moe_jax.data.packing import PackedRows
from moe_jax.data.pipeline import heldout_batches
from moe_jax.data.sources import iter_documents, source_files
from moe_jax.errors import UserError
from moe_jax.files import is_remote
from moe_jax.parallel.batches import put_everywhere
from moe_jax.train.state import TrainState
from moe_jax.train.step import make_eval_step


def why_unusable(config: DataConfig) -> str:
    """Why held-out data cannot be read, by its first documents or, in a bucket, its files; empty if it can."""
    try:
        for source in config.heldout:
            source_files(source.path) if is_remote(source.path) else next(iter_documents(source))
    except UserError as error:
        return str(error)
    return ""


class HeldoutLoss:
    """Nats per token on the first batches of data.heldout; as in use, no expert is ever full.

    `compiled` says whether the next call computes at once.
    """

    def __init__(self, cfg: RunConfig, mesh: Mesh, rows: list[PackedRows]) -> None:
        self._mesh, self._rows = mesh, rows
        self.compiled = False
        self._step = make_eval_step(replace(cfg, model=cfg.model.dropless()), mesh)
        # Of a microbatch's size: that much fits with a backward pass.
        self._size = cfg.data.global_batch_size // cfg.gradient_accumulation
        self._count = cfg.gradient_accumulation * cfg.checkpoint.heldout_batches

    def __call__(self, state: TrainState, each: Callable[[], object]) -> float:
        """The loss of a state's parameters; `each` is called after every batch."""
        nats = tokens = 0.0
        for batch in itertools.islice(heldout_batches(self._rows, self._size), self._count):
            arrays = put_everywhere(batch, self._mesh)
            nll, count = jax.device_get(self._step(state.params, state.biases, arrays))
            nats, tokens = nats + float(nll), tokens + float(count)
            self.compiled = True
            each()
        return nats / max(tokens, 1.0)
