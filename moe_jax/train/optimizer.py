"""AdamW with clipping and the learning-rate schedules, through optax."""

from __future__ import annotations

import optax

from moe_jax.config import ModelConfig, OptimizerConfig
from moe_jax.model.describe import describe
from moe_jax.paths import unflatten_paths


def make_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then constant, or cosine or linear decay to `final_fraction`."""
    rest = max(1, steps - cfg.warmup_steps)
    after = {
        "cosine": optax.cosine_decay_schedule(cfg.learning_rate, rest, cfg.final_fraction),
        "linear": optax.linear_schedule(cfg.learning_rate, cfg.learning_rate * cfg.final_fraction, rest),
        "constant": optax.constant_schedule(cfg.learning_rate),
    }[cfg.schedule]
    if not cfg.warmup_steps:
        return after
    # From 1/warmup: a first step with a rate of exactly zero would be spent for nothing.
    warmup = optax.linear_schedule(cfg.learning_rate / cfg.warmup_steps, cfg.learning_rate, cfg.warmup_steps - 1)
    return optax.join_schedules([warmup, after], [cfg.warmup_steps])


def make_optimizer(cfg: OptimizerConfig, steps: int, model: ModelConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; norm scales do not decay."""
    leaves = {path: leaf for path, leaf in describe(model).items() if leaf.trained}
    decays = unflatten_paths({path: "norm" not in leaf.axes for path, leaf in leaves.items()})
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
        optax.scale_by_learning_rate(make_schedule(cfg, steps)),
    )
