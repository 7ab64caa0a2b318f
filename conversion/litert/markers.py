"""How the exported program reaches LiteRT: markers for INT4 work, fixed ops for the functions of `torch_ops`.

A marker carries the names of its weights in its options, so no weight exists while torch exports and the
converter runs; `conversion.litert.lower` puts the real ops and the exact integers in their place afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable
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
from conversion.torch_model import Cache, Composed, Seen, StaticCache
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

    def self_attention(self, layer: int, x: Tensor, norm: Tensor, seen: Seen, cache: Cache) -> Tensor:
        """Marker of the first half of a layer for one token; else, and where heads do not fill lanes, its parts."""
        if x.shape[1] > 1 or self.config.head_dim % LANES:
            return super().self_attention(layer, x, norm, seen, cache)
        cache = cast(StaticCache, cache)
        names = "+".join(f"model.layers.{layer}.self_attn.{part}_proj" for part in "qkvo")
        given = [seen.cos, seen.sin, cast(Tensor, seen.mask), cache.k[layer], cache.v[layer], cache.start]
        made = torch.ops.moe_jax.self_attention(x, norm, given, names)
        y, cache.k[layer], cache.v[layer] = made
        return y

    def mixture(self, layer: int, x: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        """Marker of the second half of a layer for one token; else its parts."""
        if x.shape[1] > 1:
            return super().mixture(layer, x, norm, bias)
        return torch.ops.moe_jax.mixture(x, norm, bias, f"model.layers.{layer}.feed_forward")


def _define(code: str, signature: str, fake: Callable[..., Any]) -> None:
    """Make a function of torch that can be exported and not run: `fake` gives the shapes of its results.

    Lowered, it is a custom op `code` on its tensors, with the names of weights, joined by + here, in its options.
    """
    torch.library.define(code.replace(".", "::"), signature)
    torch.library.register_fake(code.replace(".", "::"), fake)

    def lower(lctx: Any, *given: Any) -> Any:
        (names,) = (value.split("+") for value in given if isinstance(value, str))
        lists = (value if isinstance(value, list | tuple) else [value] for value in given)
        operands = [value for values in lists for value in values if not isinstance(value, str | int)]
        payload = json.dumps({"names": names}).encode()
        results = ir.Operation.create(
            "tfl.custom",
            results=lowering_utils.node_meta_to_ir_types(lctx.node),
            operands=operands,
            attributes={
                "custom_code": ir.StringAttr.get(code),
                "custom_option": ir.Attribute.parse(f'#tfl<const_bytes: "0x{payload.hex()}">'),
            },
        ).results
        return results if len(results) > 1 else results[0]

    lowerings.lower(getattr(torch.ops.moe_jax, code.removeprefix("moe_jax.")))(lower)


_define(LINEAR, "(Tensor x, str names, int out) -> Tensor", lambda x, names, out: x.new_empty((*x.shape[:-1], out)))
_define(
    EMBEDDING,
    "(Tensor tokens, str name, int width) -> Tensor",
    lambda tokens, name, width: tokens.new_empty((*tokens.shape, width), dtype=torch.float32),
)
_define(FEED_FORWARD, "(Tensor x, str names) -> Tensor", lambda x, names: torch.empty_like(x))
_define(
    EXPERTS,
    "(Tensor h, Tensor ids, Tensor weights, str name) -> Tensor",
    lambda h, ids, weights, name: torch.empty_like(h),
)
_define(
    ATTENTION,
    "(Tensor q, Tensor k, Tensor v, Tensor mask, str name) -> Tensor",
    lambda q, k, v, mask, name: torch.empty_like(q),
)
_define(
    SELF_ATTENTION,
    "(Tensor x, Tensor norm, Tensor[] given, str names) -> (Tensor, Tensor, Tensor)",
    lambda x, norm, given, names: tuple(torch.empty_like(value) for value in (x, *given[3:5])),
)
_define(
    MIXTURE,
    "(Tensor x, Tensor norm, Tensor bias, str name) -> Tensor",
    lambda x, norm, bias, name: torch.empty_like(x),
)


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
