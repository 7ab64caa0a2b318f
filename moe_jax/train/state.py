"""What a checkpoint must hold to continue a run, and where each leaf lives on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import ModelConfig, RunConfig
from moe_jax.model.describe import abstract_model, build, describe
from moe_jax.model.layers import Compute, ExpertBias
from moe_jax.model.transformer import Transformer
from moe_jax.parallel.rules import check_divisible, sharding
from moe_jax.paths import flatten_paths, unflatten_paths
from moe_jax.train.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """`params` and `biases` are nested dictionaries of float32 arrays, one leaf per path of `describe`."""

    step: Any  # int32 scalar: optimizer steps done
    params: dict[str, Any]
    biases: dict[str, Any]  # the routers' selection biases
    opt_state: Any


def compute_for(cfg: RunConfig, mesh: Mesh) -> Compute:
    """How this run computes its products."""
    return Compute(mesh, jnp.dtype(cfg.compute_dtype), cfg.quant)


def assemble(cfg: ModelConfig, params: dict[str, Any], biases: dict[str, Any]) -> Transformer:
    """The model that holds these arrays."""
    graph, state = nnx.split(abstract_model(cfg))
    leaves = flatten_paths(params) | flatten_paths(biases)
    flat = nnx.to_flat_state(state)
    filled = [(path, v.replace(leaves["/".join(map(str, path))])) for path, v in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def disassemble(model: Transformer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, biases) of a model, the inverse of `assemble`."""
    _, params, biases = nnx.split(model, nnx.Param, ExpertBias)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(biases)


def _create(cfg: RunConfig) -> TrainState:
    # Half of the key, as when a state held the other half: a seed keeps giving the parameters that it gave.
    params, biases = disassemble(build(cfg.model, jax.random.split(jax.random.key(cfg.seed))[0]))
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, cfg.model)
    return TrainState(jnp.int32(0), params, biases, optimizer.init(params))


def state_shardings(cfg: RunConfig, mesh: Mesh, in_use: bool = False) -> TrainState:
    """A TrainState of NamedShardings: moments live where their parameter does, all else everywhere.

    With `optimizer.offload` the moments are in the host's memory between steps, but not `in_use`.
    """
    memory = "pinned_host" if cfg.optimizer.offload and not in_use else None
    everywhere = NamedSharding(mesh, PartitionSpec())
    leaves = describe(cfg.model)
    params = unflatten_paths({p: sharding(mesh, f.axes) for p, f in leaves.items() if f.trained})
    biases = unflatten_paths({p: everywhere for p, f in leaves.items() if not f.trained})
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, cfg.model)
    shapes = jax.eval_shape(partial(_create, cfg))
    opt_state = optax.tree_map_params(
        optimizer.init, lambda _, where: where.with_memory_kind(memory), shapes.opt_state, params,
        transform_non_params=lambda _: everywhere,
    )  # fmt: skip
    return TrainState(everywhere, params, biases, opt_state)


def abstract_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: for restoring and for compile-only runs."""
    check_divisible(cfg, mesh)
    shapes = jax.eval_shape(partial(_create, cfg))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        state_shardings(cfg, mesh),
    )


def init_state(cfg: RunConfig, mesh: Mesh) -> TrainState:
    """A fresh state, created in place on the mesh; the same bits on any mesh."""
    check_divisible(cfg, mesh)
    return jax.jit(partial(_create, cfg), out_shardings=state_shardings(cfg, mesh))()
