"""Loss-free balancing: after each optimizer step the selection bias moves against the load."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, rate: float) -> jax.Array:
    """Raise the bias of experts below the mean load by `rate`, lower it above; the sum stays.

    `counts_LE` must be the global counts of the whole step, all devices and microbatches: the sign of a
    partial count is not the sign of the sum.
    """
    # In whole numbers: a mean in float32 may fall beside an expert that is exactly at it.
    total, experts = counts_LE.sum(-1, keepdims=True), counts_LE.shape[-1]
    below, above = counts_LE < -(-total // experts), counts_LE > total // experts
    push = below.astype(jnp.float32) - above.astype(jnp.float32)
    return bias_LE + rate * (push - push.mean(-1, keepdims=True))
