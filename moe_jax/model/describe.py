"""Every parameter of a model before any exists: shape, logical axes, and the axis that INT4 groups follow.

One tree, read by initialisation, sharding, checkpoints, parameter counts, QAT coverage and export.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import jax
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.layers import ExpertBias
from moe_jax.model.transformer import Transformer


@dataclass(frozen=True)
class Leaf:
    """One stacked variable. `trained` is false for the routing bias, which balancing moves instead."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    quant_axis: int | None
    trained: bool


def build(cfg: ModelConfig, key: jax.Array) -> Transformer:
    """A freshly initialised model."""
    return Transformer(nnx.Rngs(key), cfg)


@cache
def abstract_model(cfg: ModelConfig) -> Transformer:
    """The model with shapes in place of arrays."""
    return nnx.eval_shape(lambda: build(cfg, jax.random.key(0)))


@cache
def describe(cfg: ModelConfig) -> dict[str, Leaf]:
    """Path ("layers/attention/q/kernel") -> Leaf, in the order of the tree."""
    leaves = {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract_model(cfg))):
        metadata = variable.get_metadata()
        leaves["/".join(map(str, path))] = Leaf(
            variable.shape, metadata["axes"], metadata["quant_axis"], variable.type is not ExpertBias
        )
    return leaves
