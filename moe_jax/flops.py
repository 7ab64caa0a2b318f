"""Parameter counts, bytes on a phone and floating-point operations: the one place for each formula."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.chips import chip_of
from moe_jax.config import ModelConfig, QuantConfig
from moe_jax.model.describe import describe


class Parameters(NamedTuple):
    """`active` takes part in one token's forward pass; the tied embedding counts once, as active."""

    active: int
    total: int


class DeployedBytes(NamedTuple):
    """Weights as a phone has them, INT4 where QAT quantises and float32 elsewhere; `active` as in `Parameters`."""

    active: float
    total: float


def count_parameters(cfg: ModelConfig) -> Parameters:
    """Trained parameters. Of the routed experts, num_experts_per_tok of num_experts are active."""
    total = routed = 0
    for leaf in describe(cfg).values():
        size = math.prod(leaf.shape) if leaf.trained else 0
        total += size
        routed += size if "expert" in leaf.axes else 0
    if cfg.moe is None:
        return Parameters(total, total)
    active_routed = routed * cfg.moe.num_experts_per_tok // cfg.moe.num_experts
    return Parameters(total - routed + active_routed, total)


def deployed_bytes(cfg: ModelConfig) -> DeployedBytes:
    """Bytes of weights that one token touches, and of all; each default group of INT4 has a 16-bit scale."""
    active = total = 0.0
    int4 = 0.5 + 2 / QuantConfig().weight_group_size
    for leaf in describe(cfg).values():
        size = math.prod(leaf.shape) * (4 if leaf.quant_axis is None else int4)
        share = cfg.moe.num_experts_per_tok / cfg.moe.num_experts if cfg.moe and "expert" in leaf.axes else 1
        active, total = active + size * share, total + size
    return DeployedBytes(active, total)


def cache_bytes(cfg: ModelConfig, context: int) -> int:
    """Bytes of keys and values of `context` positions in float32."""
    return 4 * 2 * context * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim


def train_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of forward and backward: 6 per active weight of a product, attention causally halved.

    Recomputation is not counted (this is the numerator of MFU, not of hardware utilisation).
    """
    norms = sum(math.prod(f.shape) for f in describe(cfg).values() if "norm" in f.axes)
    products = 6 * (count_parameters(cfg).active - norms)
    # Scores and weighted sum: 2 products of 2 FLOPs per key, key count seq_len / 2 on average, times 3.
    attention = 6 * seq_len * cfg.num_heads * cfg.head_dim * cfg.num_layers
    return float(products + attention)


def peak_flops(device: jax.Device) -> float:
    """Peak FLOP/s of a device: the published bfloat16 figure, or on CPU what a large float32 product reaches."""
    if device.platform != "cpu":
        chip = chip_of(device.device_kind)
        return chip.bf16_flops / chip.devices_per_chip if chip else float("nan")
    size = 1024
    product = jax.jit(jnp.dot)
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
