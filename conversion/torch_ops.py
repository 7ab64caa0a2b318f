"""Ordinary tensor functions whose LiteRT form must be one particular op.

Each is a torch operator with a plain implementation, so the model runs anywhere; `conversion.litert.markers`
lowers each to the op named here, where the converter's own choice would differ in result or be slower.
Legend: T tokens, E experts, K experts per token, S new positions, C cache length, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("moe_jax::top_k", mutates_args=())
def top_k(scores: Tensor, k: int) -> Tensor:
    """TOPK_V2: int32 indices [T, K] of the k largest scores [T, E], ties to the lower index.

    torch.topk promises no order among equals.
    """
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :k].int()


@top_k.register_fake
def _(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int32)


@torch.library.custom_op("moe_jax::rows", mutates_args=())
def rows(table: Tensor, indices: Tensor) -> Tensor:
    """GATHER of rows of a table [V, ...] at int32 indices that are never negative."""
    return table[indices.long()]


@rows.register_fake
def _(table: Tensor, indices: Tensor) -> Tensor:
    return table.new_empty((*indices.shape, *table.shape[1:]))


@torch.library.custom_op("moe_jax::write", mutates_args=())
def write(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """DYNAMIC_UPDATE_SLICE: cache [B, G, C, H] with `new` [B, G, S, H] from start[2] on (int32 [4])."""
    first = int(start[2])
    return cache.index_copy(2, torch.arange(first, first + new.shape[2]), new)


@write.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)
