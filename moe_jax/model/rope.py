"""Rotary positions: adjacent pairs rotate together, and slow pairs are slowed further (llama3 scaling).

MobileMoE sets the low and the high frequency factor of llama3 scaling to the same value, so its blending
band is empty and the usual smooth formula divides by zero: the scaling is a selection by wavelength.
The rotation itself is in `ops/rotary.py`.
Legend: B batch, S sequence, H head width, P pairs (H / 2).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RopeConfig


class Rotation(NamedTuple):
    """Cosine and sine of every pair's angle at every place, [B, P, S] float32."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each of the head_dim / 2 pairs, float32."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    slow = 2 * np.pi / frequencies > rope.original_max_position_embeddings
    return np.where(slow, frequencies / rope.factor, frequencies).astype(np.float32)


def rotation(positions_BS: jax.Array, rope: RopeConfig, head_dim: int) -> Rotation:
    """The same for every layer: computed once, outside the layer scan."""
    frequencies_P = rope_frequencies(rope, head_dim)[:, None]
    angles = positions_BS[:, None, :].astype(jnp.float32) * frequencies_P
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def halves_first(w: jax.Array) -> jax.Array:
    """Columns [..., H] of a query or key head with all first members of the pairs before all second ones.

    Scores do not change when queries and keys are permuted alike, and two halves are cheaper to rotate than
    interleaved pairs.
    """
    return w.reshape(*w.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(w.shape)
