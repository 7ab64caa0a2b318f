"""The sharding rules: the only place that ties a logical axis to mesh axes."""

from __future__ import annotations

import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from moe_jax.chips import LANES
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import platform

# Logical axis -> mesh axes. Parameters are cut along d_model by fsdp, experts by expert, heads, shared
# experts and vocabulary by tensor; a batch is cut by every other axis, since an expert group also sees its
# own tokens.
BATCH_AXES = ("slices", "data", "fsdp", "expert")
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "sequence": "context",
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "pair": None,
    "mlp": "tensor",
    "expert": "expert",
    "expert_mlp": None,
    "router": None,
    "norm": None,
    "activation": None,
    "width": None,
}


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The PartitionSpec of logical `axes`."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: tuple[str, ...]) -> NamedSharding:
    """Where an array of logical `axes` lives on `mesh`."""
    return NamedSharding(mesh, spec(axes))


def constrain(x: jax.Array, mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    """Tell the compiler where `x` lives; free on a mesh of one device."""
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes))


def check_divisible(cfg: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh that cannot cut this run evenly, with the sizes that can."""
    model, sizes = cfg.model, mesh.shape
    _check(sizes, "fsdp", {"model.d_model": model.d_model})
    _check(sizes, "context", {"data.seq_len": cfg.data.seq_len})
    if platform(mesh) == "tpu" and cfg.data.seq_len % (LANES * sizes["context"]):
        raise UserError(
            f"data.seq_len {cfg.data.seq_len} over mesh.context={sizes['context']} is no multiple of {LANES} per "
            f"device, as attention on TPU needs; use a multiple of {LANES * sizes['context']}"
        )
    cut_by_tensor = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads,
        "model.vocab_size": model.vocab_size,
    }
    if model.moe is not None:
        _check(sizes, "expert", {"model.moe.num_experts": model.moe.num_experts})
        if model.moe.shared_expert_width:
            cut_by_tensor["model.moe.shared_expert_width"] = model.moe.shared_expert_width
    elif sizes["expert"] > 1:
        raise UserError("mesh.expert is above 1 but the model is dense; use mesh.fsdp or mesh.data")
    else:
        cut_by_tensor["model.ffn_width"] = model.ffn_width
    cut_by_tensor["data.seq_len per context shard"] = cfg.data.seq_len // sizes["context"]
    _check(sizes, "tensor", cut_by_tensor)
    sequences = cfg.data.global_batch_size // cfg.gradient_accumulation
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if sequences % shards:
        used = " x ".join(axis for axis in BATCH_AXES if sizes[axis] > 1)
        raise UserError(
            f"sequences per microbatch {sequences} does not divide over mesh {used} = {shards}; "
            f"use a multiple of {shards} sequences, or a product of {_divisors(sequences)}"
        )


def _check(sizes, axis: str, cut: dict[str, int]) -> None:
    """Every size of `cut` must divide over the mesh axis; the message names what divides all of them."""
    for what, size in cut.items():
        if size % sizes[axis]:
            raise UserError(
                f"{what} {size} does not divide over mesh.{axis}={sizes[axis]}; "
                f"use one of {_divisors(math.gcd(*cut.values()))}"
            )


def _divisors(size: int) -> str:
    return ", ".join(str(d) for d in range(1, min(size, 64) + 1) if size % d == 0)
