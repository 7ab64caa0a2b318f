"""The sharding rules: the only place that ties a logical axis to mesh axes."""

from __future__ import annotations

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import RunConfig
from moe_jax.errors import UserError

# Logical axis -> mesh axes. Parameters are cut along d_model by fsdp, experts by expert; a batch is cut by
# every axis, since an expert group also sees its own tokens.
BATCH_AXES = ("data", "fsdp", "expert")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "sequence": None,
    "layers": None,
    "vocab": None,
    "embed": "fsdp",
    "heads": None,
    "pair": None,
    "mlp": None,
    "expert": "expert",
    "expert_mlp": None,
    "router": None,
    "norm": None,
    "activation": None,
}


def spec(axes: tuple[str, ...], gathered: bool = False) -> PartitionSpec:
    """The PartitionSpec of logical `axes`; `gathered` leaves the fsdp axis out (a weight in use)."""
    mesh_axes = [RULES[axis] for axis in axes]
    return PartitionSpec(*(None if gathered and axis == "fsdp" else axis for axis in mesh_axes))


def sharding(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """Where an array of logical `axes` lives on `mesh`."""
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, mesh: Mesh, axes: tuple[str, ...], gathered: bool = False) -> jax.Array:
    """Tell the compiler where `x` lives; free on a mesh of one device."""
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, gathered)))


def check_divisible(cfg: RunConfig, mesh: Mesh) -> None:
    """Refuse a mesh that cannot cut this run evenly, with the sizes that can."""
    model = cfg.model
    _check("d_model", model.d_model, "fsdp", mesh.shape["fsdp"])
    if model.moe is not None:
        _check("moe.num_experts", model.moe.num_experts, "expert", mesh.shape["expert"])
    elif mesh.shape["expert"] > 1:
        raise UserError("mesh.expert is above 1 but the model is dense; use mesh.fsdp or mesh.data")
    microbatch = cfg.data.global_batch_size // cfg.gradient_accumulation
    shards = 1
    for axis in BATCH_AXES:
        shards *= mesh.shape[axis]
    _check("sequences per microbatch", microbatch, " x ".join(BATCH_AXES), shards)


def _check(what: str, size: int, axis: str, shards: int) -> None:
    if size % shards:
        divisors = [str(d) for d in range(1, min(size, 64) + 1) if size % d == 0]
        raise UserError(
            f"{what} {size} does not divide over mesh {axis} = {shards}; use one of {', '.join(divisors)}"
        )
