"""Batches on the mesh: which rows this process reads, and how they become global arrays.

A process reads whole rows, those of its devices; processes that cut only the sequence between them read the same.
Which process holds which rows of the global batch depends on the mesh, what the global batch holds does not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.errors import UserError
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import BATCH_AXES, sharding

Batch = dict[str, Any]  # tokens, targets, segment_ids, positions int32 [B, S]; loss_mask float32 [B, S]
_AXES = ("batch", "sequence")


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process reads part `index` of the `count` equal parts of each global batch.

    Raises:
        UserError: two processes hold some, but not all, of their rows in common.
    """
    _, held = _shards(mesh)
    parts = sorted(set(held.values()))
    if len({len(part) for part in parts}) > 1 or len(set().union(*parts)) < sum(map(len, parts)):
        raise UserError(
            f"the mesh {dict(mesh.shape)} cuts the batch unevenly across {len(held)} processes; "
            "let mesh.context times mesh.tensor divide the devices of one process"
        )
    return parts.index(held[jax.process_index()]), len(parts)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part [B / count, S] of `share_of_batch` as global arrays [B, S], cut over the batch axes."""
    total, held = _shards(mesh)
    mine = held[jax.process_index()]
    size = len(batch["tokens"]) // len(mine)  # rows of a shard
    shape, where = (total * size, batch["tokens"].shape[1]), sharding(mesh, _AXES)

    def local(array: np.ndarray, index: Any) -> np.ndarray:
        at = size * mine.index((index[0].start or 0) // size)
        return array[at : at + size, index[1]]

    return {k: jax.make_array_from_callback(shape, where, lambda i, v=v: local(v, i)) for k, v in batch.items()}


def put_everywhere(batch: Batch, mesh: Mesh) -> Batch:
    """A global batch [B, S] that every process holds whole, cut over the batch axes."""
    where = sharding(mesh, _AXES)
    return {k: jax.make_array_from_callback(v.shape, where, v.__getitem__) for k, v in batch.items()}


def put_votes(mesh: Mesh, vote: int) -> jax.Array:
    """int32 [devices]: this process's `vote` on each of its devices; the step returns the highest of all."""
    where = NamedSharding(mesh, PartitionSpec(AXES))
    return jax.make_array_from_callback((mesh.size,), where, lambda _: np.array([vote], np.int32))


@cache
def _shards(mesh: Mesh) -> tuple[int, dict[int, tuple[int, ...]]]:
    """(row shards of a batch, those that each process's devices hold)."""
    where = sharding(mesh, _AXES)
    total = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    held: dict[int, set[int]] = {}
    for device, index in where.devices_indices_map((total, mesh.size)).items():
        held.setdefault(device.process_index, set()).add(index[0].start or 0)
    return total, {process: tuple(sorted(shards)) for process, shards in held.items()}
