"""How the exported program reaches LiteRT: markers for INT4 work, fixed ops for the functions of `torch_ops`.

A marker carries the names of its weights in its options, so no weight exists while torch exports and the
converter runs; `conversion.litert.lower` puts the real ops and the exact integers in their place afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
import torch
from litert_converter.mlir import ir as _ir
from litert_torch.backend import lowerings
from litert_torch.backend.lowerings import utils as lowering_utils
from torch import Tensor

from conversion import keymap, torch_ops  # noqa: F401  (its operators are lowered here)
from conversion.litert.kernel_op import LANES
from conversion.torch_model import Cache, Composed, StaticCache
from moe_jax.config import ModelConfig

# Importing litert_torch switches 64-bit JAX on for the whole process, training and verifying included.
jax.config.update("jax_enable_x64", False)

ir: Any = _ir  # made at run time by a native module, so types know nothing of it
Value = Any

LINEAR, EMBEDDING, EXPERTS = "moe_jax.linear", "moe_jax.embedding", "moe_jax.experts"
ATTENTION, FEED_FORWARD = "moe_jax.attention", "moe_jax.feed_forward"
SELF_ATTENTION, MIXTURE = "moe_jax.self_attention", "moe_jax.mixture"


class Markers(Composed):
    """The `Ops` of conversion.torch_model that only leave markers; see there for shapes."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self._shapes = {tensor.name: tensor.shape for tensor in keymap.torch_tensors(config)}

    def linear(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """Marker of one product with the rows of all `names`."""
        out = sum(self._shapes[name][0] for name in names)
        return torch.ops.moe_jax.linear(x, "+".join(names), out)

    def feed_forward(self, x: Tensor, gate_up: tuple[str, str], down: str) -> Tensor:
        """Marker of a dense feed-forward."""
        return torch.ops.moe_jax.feed_forward(x, "+".join((*gate_up, down)))

    def router(self, h: Tensor, name: str) -> Tensor:
        """Marker of a product with a float weight, which has the same spelling."""
        return self.linear(h, (name,))

    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        """Marker of a lookup."""
        return torch.ops.moe_jax.embedding(tokens, name, self._shapes[name][1])

    def experts(self, h: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
        """Marker of a layer's routed experts."""
        return torch.ops.moe_jax.experts(h, ids, weights, name)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> Tensor:
        """Marker of a layer's attention over the cache."""
        return torch.ops.moe_jax.attention(q, k, v, mask, name)


class KernelMarkers(Markers):
    """For `conversion.kernel`, which has one op for half a layer of one token."""

    def self_attention(self, layer: int, x: Tensor, norm: Tensor, around: Sequence[Tensor], cache: Cache) -> Tensor:
        """Marker of the first half of a layer for one token; else, and where heads do not fill lanes, its parts."""
        if x.shape[1] > 1 or self.config.head_dim % LANES:
            return super().self_attention(layer, x, norm, around, cache)
        cache = cast(StaticCache, cache)
        names = "+".join(f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkvo")
        given = [*around[1:], cache.k[layer], cache.v[layer], cache.start]
        made = torch.ops.moe_jax.self_attention(x, norm, given, names)
        y, cache.k[layer], cache.v[layer] = made
        return y

    def mixture(self, layer: int, x: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        """Marker of the second half of a layer for one token; else its parts."""
        if x.shape[1] > 1:
            return super().mixture(layer, x, norm, bias)
        return torch.ops.moe_jax.mixture(x, norm, bias, f"model.layers.{layer}.feed_forward")


@torch.library.custom_op("moe_jax::linear", mutates_args=())
def _linear(x: Tensor, names: str, out: int) -> Tensor:
    raise NotImplementedError("a marker is exported, never run")


@_linear.register_fake
def _(x: Tensor, names: str, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


@torch.library.custom_op("moe_jax::feed_forward", mutates_args=())
def _feed_forward(x: Tensor, names: str) -> Tensor:
    raise NotImplementedError("a marker is exported, never run")


@_feed_forward.register_fake
def _(x: Tensor, names: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("moe_jax::embedding", mutates_args=())
def _embedding(tokens: Tensor, name: str, width: int) -> Tensor:
    raise NotImplementedError("a marker is exported, never run")


@_embedding.register_fake
def _(tokens: Tensor, name: str, width: int) -> Tensor:
    return tokens.new_empty((*tokens.shape, width), dtype=torch.float32)


@torch.library.custom_op("moe_jax::experts", mutates_args=())
def _experts(h: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
    raise NotImplementedError("a marker is exported, never run")


@_experts.register_fake
def _(h: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
    return torch.empty_like(h)


@torch.library.custom_op("moe_jax::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> Tensor:
    raise NotImplementedError("a marker is exported, never run")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("moe_jax::self_attention", mutates_args=())
def _self_attention(x: Tensor, norm: Tensor, given: list[Tensor], names: str) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("a marker is exported, never run")


@_self_attention.register_fake
def _(x: Tensor, norm: Tensor, given: list[Tensor], names: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(given[3]), torch.empty_like(given[4])


@torch.library.custom_op("moe_jax::mixture", mutates_args=())
def _mixture(x: Tensor, norm: Tensor, bias: Tensor, name: str) -> Tensor:
    raise NotImplementedError("a marker is exported, never run")


@_mixture.register_fake
def _(x: Tensor, norm: Tensor, bias: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


def _custom(lctx: Any, code: str, operands: list[Value], options: dict) -> Value:
    return _customs(lctx, code, operands, options)[0]


def _customs(lctx: Any, code: str, operands: list[Value], options: dict) -> list[Value]:
    payload = json.dumps(options, sort_keys=True).encode()
    return ir.Operation.create(
        "tfl.custom",
        results=lowering_utils.node_meta_to_ir_types(lctx.node),
        operands=operands,
        attributes={
            "custom_code": ir.StringAttr.get(code),
            "custom_option": ir.Attribute.parse(f'#tfl<const_bytes: "0x{payload.hex()}">'),
        },
    ).results


@lowerings.lower(torch.ops.moe_jax.linear)
def _lower_linear(lctx: Any, x: Value, names: str, out: int) -> Value:
    return _custom(lctx, LINEAR, [x], {"names": names.split("+")})


@lowerings.lower(torch.ops.moe_jax.feed_forward)
def _lower_feed_forward(lctx: Any, x: Value, names: str) -> Value:
    return _custom(lctx, FEED_FORWARD, [x], {"names": names.split("+")})


@lowerings.lower(torch.ops.moe_jax.embedding)
def _lower_embedding(lctx: Any, tokens: Value, name: str, width: int) -> Value:
    return _custom(lctx, EMBEDDING, [tokens], {"names": [name]})


@lowerings.lower(torch.ops.moe_jax.experts)
def _lower_experts(lctx: Any, h: Value, ids: Value, weights: Value, name: str) -> Value:
    return _custom(lctx, EXPERTS, [h, ids, weights], {"names": [name]})


@lowerings.lower(torch.ops.moe_jax.attention)
def _lower_attention(lctx: Any, q: Value, k: Value, v: Value, mask: Value, name: str) -> Value:
    return _custom(lctx, ATTENTION, [q, k, v, mask], {"names": [name]})


@lowerings.lower(torch.ops.moe_jax.self_attention)
def _lower_self_attention(lctx: Any, x: Value, norm: Value, given: list[Value], names: str) -> list[Value]:
    return _customs(lctx, SELF_ATTENTION, [x, norm, *given], {"names": names.split("+")})


@lowerings.lower(torch.ops.moe_jax.mixture)
def _lower_mixture(lctx: Any, x: Value, norm: Value, bias: Value, name: str) -> Value:
    return _custom(lctx, MIXTURE, [x, norm, bias], {"names": [name]})


def _tfl(lctx: Any, name: str, operands: list[Value], attributes: dict[str, ir.Attribute]) -> Value:
    results = lowering_utils.node_meta_to_ir_types(lctx.node)
    return ir.Operation.create(f"tfl.{name}", results=results, operands=operands, attributes=attributes).results[0]


@lowerings.lower(torch.ops.moe_jax.top_k)
def _lower_top_k(lctx: Any, scores: Value, k: int) -> Value:
    count = lowering_utils.numpy_array_constant(np.array(k, np.int32))
    ids = lowering_utils.node_meta_to_ir_types(lctx.node)[0]
    values = ir.RankedTensorType.get(ids.shape, ir.F32Type.get())
    made = ir.Operation.create("tfl.topk_v2", results=[values, ids], operands=[scores, count])
    return made.results[1]


@lowerings.lower(torch.ops.moe_jax.rows)
def _lower_rows(lctx: Any, table: Value, indices: Value) -> Value:
    zero = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 0)
    return _tfl(lctx, "gather", [table, indices], {"axis": zero, "batch_dims": zero})


@lowerings.lower(torch.ops.moe_jax.write)
def _lower_write(lctx: Any, cache: Value, new: Value, start: Value) -> Value:
    return _tfl(lctx, "dynamic_update_slice", [cache, new, start], {})
