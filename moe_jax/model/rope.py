"""Rotary positions: adjacent pairs rotate together, and slow pairs are slowed further (llama3 scaling).

MobileMoE sets the low and the high frequency factor of llama3 scaling to the same value, so its blending
band is empty and the usual smooth formula divides by zero: the scaling is a selection by wavelength.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each of the head_dim / 2 pairs, float32."""
    frequencies = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    slow = 2 * np.pi / frequencies > rope.original_max_position_embeddings
    return np.where(slow, frequencies / rope.factor, frequencies).astype(np.float32)


def apply_rope(x_BSNH: jax.Array, positions_BS: jax.Array, rope: RopeConfig) -> jax.Array:
    """Rotate each adjacent pair (2i, 2i+1) of the last axis by position * frequency_i, in float32."""
    angles = positions_BS[..., None].astype(jnp.float32) * rope_frequencies(rope, x_BSNH.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    even, odd = x_BSNH[..., 0::2].astype(jnp.float32), x_BSNH[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1)
    return rotated.reshape(x_BSNH.shape).astype(x_BSNH.dtype)
