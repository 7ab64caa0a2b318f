"""Memory and least time of a step from a few products of shapes: enough to order candidates before compiling."""

from __future__ import annotations

import math

from launch.hlo import Collective
from launch.roofline import collective_seconds
from launch.slices import Slice
from moe_jax.chips import chip_named
from moe_jax.config import RunConfig
from moe_jax.flops import train_flops_per_token
from moe_jax.model.describe import describe
from moe_jax.parallel.rules import RULES

# Passes over a layer's activations in HBM and what is alive of them at one time, as compiled for v5e; only the
# order of candidates hangs on them.
_PASSES, _ALIVE = 10, 2.5


def _parameters(cfg: RunConfig, sizes: dict[str, int], cut_by: tuple[str, ...]) -> float:
    """Trained parameters of a device where only the axes of `cut_by` cut them."""
    total = 0.0
    for leaf in describe(cfg.model).values():
        axes = {RULES[axis] for axis in leaf.axes} & set(cut_by)
        total += math.prod(leaf.shape) * leaf.trained / math.prod(sizes[str(axis)] for axis in axes)
    return total


def _widths(cfg: RunConfig) -> tuple[float, float, float, float]:
    """Elements per token and layer: residual, attention (queries, keys, values, result), dispatch, other hidden.

    Dispatch is the experts' rows with their gate|up products; the others are of the shared expert or the dense
    feed-forward, and the weighted input of down.
    """
    model, moe = cfg.model, cfg.model.moe
    attention = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    if moe is None:
        return model.d_model, attention, 0.0, 3.0 * model.ffn_width
    dispatch = moe.num_experts_per_tok * (model.d_model + 2 * moe.expert_width)
    hidden = moe.num_experts_per_tok * moe.expert_width + 3 * moe.shared_expert_width
    return model.d_model, attention, dispatch, hidden


def _kept(cfg: RunConfig) -> float:
    """Elements per token and layer that are kept for the backward pass besides the layer's input."""
    residual, attention, dispatch, hidden = _widths(cfg)
    return {
        "full": 0.0,
        "save_attention": cfg.model.num_heads * cfg.model.head_dim,
        "save_dispatch": cfg.model.moe.num_experts_per_tok * residual if cfg.model.moe else 0.0,
        # Twice and a bit: norms, scores and activations keep float32 intermediates (24 GB at size S, compiled).
        "nothing": 2.2 * (2 * residual + attention + dispatch + hidden),
    }[cfg.remat]


def _repeated_flops(cfg: RunConfig) -> float:
    """FLOPs per token of the forward pass that the backward pass repeats: all but the last products of a layer."""
    model, moe = cfg.model, cfg.model.moe
    if cfg.remat == "nothing":
        return 0.0
    width = moe.num_experts_per_tok * moe.expert_width + moe.shared_expert_width if moe else model.ffn_width
    products = 2 * model.d_model * (2 * (model.num_heads + model.num_kv_heads) * model.head_dim + 2 * width)
    scores = 2 * cfg.data.seq_len * model.num_heads * model.head_dim
    return model.num_layers * (products + (scores if cfg.remat != "save_attention" else 0.0))


def estimated_bytes(cfg: RunConfig, sizes: dict[str, int]) -> tuple[float, float]:
    """(state, temporaries) of a device."""
    model, layers = cfg.model, cfg.model.num_layers
    cut = _parameters(cfg, sizes, ("fsdp", "expert", "tensor"))
    tokens = cfg.tokens_per_step / cfg.gradient_accumulation / math.prod(sizes.values())
    residual, attention, dispatch, hidden = _widths(cfg)
    saved = residual + _kept(cfg)
    table = model.vocab_size * model.d_model / sizes["tensor"]
    logits = cfg.loss_chunk * model.vocab_size / sizes["tensor"]
    stacked = _parameters(cfg, sizes, ("expert", "tensor")) - table
    # Without recomputation, what was gathered for the forward pass is kept for the backward one.
    gathered = 2 * stacked if cfg.remat == "nothing" else 6 * stacked / layers
    alive = _ALIVE * (residual + attention + dispatch * sizes["expert"] + hidden)
    gradients = 4 * cut * (1 if cfg.gradient_accumulation == 1 else 2)
    temp = gradients + 2 * tokens * (layers * saved + alive) + 2 * logits + 6 * table + gathered
    return (4 if cfg.optimizer.offload else 12) * cut, temp


def least_seconds(cfg: RunConfig, sizes: dict[str, int], kind: Slice) -> tuple[float, float, float]:
    """What one step takes at least of the resources of `roofline`: compute, memory, interconnect."""
    chip, model, count = chip_named(kind.family), cfg.model, cfg.gradient_accumulation
    devices = math.prod(sizes.values())
    tokens = cfg.tokens_per_step / devices
    flops = tokens * (train_flops_per_token(model, cfg.data.seq_len) + _repeated_flops(cfg))
    cut = _parameters(cfg, sizes, ("fsdp", "expert", "tensor"))
    whole = _parameters(cfg, sizes, ("expert", "tensor"))
    again = 1 + (cfg.remat != "nothing")
    moved = 28 * cut + count * 2 * (3 + again) * whole
    width = sum(_widths(cfg))
    moved += tokens * model.num_layers * 2 * _PASSES * (width + max(0.0, width - _kept(cfg)) / 3)
    passes = 4 if cfg.remat == "nothing" else 2  # written and read again; what is not named is copied on both ways
    moved += tokens * model.num_layers * 2 * passes * _kept(cfg)
    residual = 2 * model.d_model * model.num_layers * tokens
    sent = [
        ("all-gather", sizes["fsdp"], 1, 2 * whole * again * count),
        ("reduce-scatter", sizes["fsdp"], 1, 2 * whole * count),
        ("all-reduce", sizes["data"] * sizes["slices"], sizes["slices"], 2 * cut * count),
        # A layer gathers what it works on and scatters what comes out, forward, again, and backward.
        ("all-gather", sizes["expert"], 1, residual * sizes["expert"] * (2 + 2 * again)),
        ("all-gather", sizes["tensor"], 1, residual * sizes["tensor"] * (4 + 4 * again)),
        ("all-gather", sizes["context"], 1, residual * sizes["context"] * again),
    ]
    moving = sum(
        collective_seconds(Collective(name, group, across, 1, round(size)), chip, kind.shape)
        for name, group, across, size in sent
        if group > 1
    )
    share = chip.devices_per_chip
    return flops / (chip.bf16_flops / share), moved / (chip.hbm_bandwidth / share), moving
