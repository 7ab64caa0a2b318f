"""Small model configurations and batches that several tests share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, RopeConfig, RunConfig
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train.state import TrainState, init_state

MOE = ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=96,
    max_position_embeddings=128,
    ffn_width=96,
    init_scale=0.2,  # large enough that routing and attention are far from uniform
    rope=RopeConfig(theta=1000.0, original_max_position_embeddings=64),
    moe=MoEConfig(num_experts=6, num_experts_per_tok=2, expert_width=32, shared_expert_width=64),
)
DENSE = replace(MOE, moe=None)

# A program that runs once is not worth optimising: a third of the compile time, and the same meaning.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quick: Callable[..., Any] = partial(jax.jit, compiler_options=QUICK)


def with_moe(**changes: Any) -> ModelConfig:
    """MOE with other routing options."""
    assert MOE.moe is not None
    return replace(MOE, moe=replace(MOE.moe, **changes))


def run_config(model: ModelConfig = MOE, **changes: Any) -> RunConfig:
    """Float32, 8 sequences of 16, one device."""
    defaults: dict[str, Any] = {
        "data": DataConfig(seq_len=16, global_batch_size=8),
        "mesh": MeshConfig(1, 1, 1),
        "compute_dtype": "float32",
        "loss_chunk": 8,
        "remat": "nothing",
        "steps": 10,
    }
    return RunConfig(model=model, **(defaults | changes))


def mesh_of(sizes: MeshConfig) -> Mesh:
    """A mesh over as many of the fake devices as `sizes` multiplies to."""
    return make_mesh(sizes, jax.devices()[: math.prod(astuple(sizes))])


def fresh_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """`init_state`, quickly."""
    return quick(partial(init_state, cfg, mesh))()


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a program, those in the bodies of its loops, calls and kernels too."""

    def is_jaxpr(value):
        return hasattr(getattr(value, "jaxpr", value), "eqns")

    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value))


def occurrences(jaxpr: Any, primitive: str) -> int:
    """How often a primitive stands in a program."""
    return sum(eqn.primitive.name == primitive for eqn in equations(jaxpr))


def batch(rows: int = 8, length: int = 16, seed: int = 0, vocab: int = 96) -> dict[str, np.ndarray]:
    """Two documents a row and a padded tail, as the pipeline would pack them."""
    rng = np.random.default_rng(seed)
    cut, end = length // 3, length - 2
    segments = np.zeros((rows, length), np.int32)
    segments[:, :cut], segments[:, cut:end] = 1, 2
    positions = np.zeros((rows, length), np.int32)
    positions[:, :cut], positions[:, cut:end] = np.arange(cut), np.arange(end - cut)
    mask = (segments > 0).astype(np.float32)
    mask[:, [cut - 1, end - 1]] = 0
    return {
        "tokens": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "segment_ids": segments,
        "positions": positions,
        "loss_mask": mask,
    }
