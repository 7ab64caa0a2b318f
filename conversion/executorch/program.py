"""The model in the ops of ExecuTorch's stock runtime, with its weights inside, as `torch.export` takes it.

Products with INT4 weights become XNNPACK's; the cache, attention and routed experts are the custom ops that its
own export of Llama uses (`extension/llm/custom_ops`). Experts see activations in float32 where the runtime has no
torchao kernels, as in the Python packages, and in INT8 per row where it has (Arm builds with
EXECUTORCH_BUILD_KERNELS_LLM_QUANTIZED_MOE).
Legend as in `conversion.torch_model`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import IntxUnpackedToInt8Tensor

from conversion.executorch.packing import pack
from conversion.int4 import Int4
from conversion.torch_model import (
    EMBEDDING,
    Cache,
    MobileMoE,
    Ops,
    Seen,
    gated,
    inverse_rms,
    normed,
    qkv_names,
    swiglu,
)
from conversion.weights import Weights
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError

BIASED = 0x88  # both nibbles of a byte from two's complement to 8 more


def require_expressible(config: ModelConfig) -> None:
    """UserError for a model that the runtime's experts cannot compute."""
    moe = config.moe
    if moe is None:
        return
    reasons = {
        "activation other than silu": config.activation != "silu",
        "norm_topk_prob=false": not moe.norm_topk_prob,
        "an expert bias beside softmax scores": moe.score_func == "softmax" and moe.use_expert_bias,
    }
    for what, found in reasons.items():
        if found:
            raise UserError(f"ExecuTorch's experts know no {what}; export this model to LiteRT or GGUF")


class Program(nn.Module):
    """(int64 tokens [1, S], int64 [1], the position of the first) -> logits [1, V] of the next token.

    The cache of `context` positions is state inside; what is at a position counts once a call has reached it.
    """

    def __init__(self, weights: Weights, context: int):
        super().__init__()
        c, ops = weights.config, _Ops(weights)
        self.model, self.weights, self.caches = MobileMoE(weights, ops, context), ops.stored, nn.Module()
        for name in (f"{part}{layer}" for layer in range(c.num_layers) for part in "kv"):
            self.caches.register_buffer(name, torch.zeros(1, context, c.num_kv_heads, c.head_dim))

    def forward(self, tokens: Tensor, start: Tensor) -> Tensor:
        """See the class."""
        model, length, first = self.model, tokens.shape[1], cast(int, start[0].item())
        torch._check(first >= 0)
        torch._check(first + length <= len(model.cos))
        x = model.ops.embedding(tokens, EMBEDDING)
        cos, sin = (table.narrow(0, first, length)[:, None] for table in (model.cos, model.sin))
        for layer in range(model.config.num_layers):
            x = model.layer(layer, x, cos, sin, None, _Cache(self.caches, first))
        return model.head(model.final(x[:, -1]))


class _Cache:
    """Keys and values [1, C, G, H] of each layer, written from position `first` on."""

    def __init__(self, caches: nn.Module, first: int):
        self._caches, self.first = caches, first

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [1, S, G, H] of new positions and return the whole."""
        keys, values = getattr(self._caches, f"k{layer}"), getattr(self._caches, f"v{layer}")
        torch.ops.llama.update_cache(k, keys, self.first)
        torch.ops.llama.update_cache(v, values, self.first)
        return keys, values


class _Ops(Ops):
    """See the module; `weights` are read once, into `stored`."""

    def __init__(self, weights: Weights) -> None:
        self.config = c = weights.config
        self.stored = nn.Module()
        self._group = weights.group
        self._put("table", torch.from_numpy(swapped(weights.packed(EMBEDDING) ^ BIASED)))
        self._put("table_scales", torch.from_numpy(weights.scales(EMBEDDING).astype(np.float32)))
        for names in products(c):
            self._put("+".join(names), _linear_weight(weights.fused(names)))
        for layer in range(c.num_layers if c.moe else 0):
            router, *parts = mixture_names(layer)
            self._put(router, torch.from_numpy(weights.float(router)))
            for part in parts:
                self._put(part, torch.from_numpy(pack(weights.int4(part))))

    def _put(self, name: str, value: Tensor) -> None:
        self.stored.register_buffer(_flat(name), value)

    def _get(self, name: str) -> Tensor:
        return getattr(self.stored, _flat(name))

    def linear(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """See `Ops.linear`."""
        return F.linear(x, self._get("+".join(names)))

    def feed_forward(self, x: Tensor, gate_up: tuple[str, str], down: str) -> Tensor:
        """See `Ops.feed_forward`."""
        return self.linear(_gated(self.linear(x, gate_up), self.config.activation), (down,))

    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        """See `Ops.embedding`; the shape of the tokens is kept."""
        table, scales = self._get("table"), self._get("table_scales")
        return torch.ops.quantized_decomposed.embedding_4bit(table, scales, None, -8, 7, tokens)

    def self_attention(self, layer: int, x: Tensor, norm: Tensor, seen: Seen, cache: Cache) -> Tensor:
        """See `Ops.self_attention`."""
        c, name = self.config, f"model.layers.{layer}.self_attn"
        n, g, width = c.num_heads, c.num_kv_heads, c.head_dim
        qkv = self.linear(normed(x, norm, c.norm_eps), qkv_names(name)).reshape(*x.shape[:2], n + 2 * g, width)
        qk, v = qkv[:, :, : n + g], qkv[:, :, n + g :]
        qk = qk * inverse_rms(qk, c.norm_eps) if c.qk_norm else qk
        qk = qk * seen.cos + (qk @ seen.turn) * seen.sin
        keys, values = cache.update(layer, qk[:, :, n:], v)
        first = cast(_Cache, cache).first
        out = torch.ops.llama.custom_sdpa(qk[:, :, :n], keys, values, first, None, 0.0, True)
        return x + self.linear(out.reshape(*x.shape[:2], n * width), (f"{name}.o_proj",))

    def mixture(self, layer: int, x: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        """See `Ops.mixture`."""
        c, moe, name = self.config, cast(MoEConfig, self.config.moe), f"model.layers.{layer}.feed_forward"
        h = normed(x, norm, c.norm_eps)
        router, gate_up, down = map(self._get, mixture_names(layer))
        y = torch.ops.llama.quantized_moe_ffn(
            h.reshape(-1, c.d_model), router, bias if moe.use_expert_bias else bias[:0], gate_up, down,
            moe.num_experts_per_tok, moe.num_experts, moe.expert_width, c.d_model, self._group, 4,
            moe.score_func, moe.routed_scaling_factor,
        ).reshape(x.shape)  # fmt: skip
        if moe.score_func == "softmax":  # whose weights the op leaves unscaled
            y = y * moe.routed_scaling_factor
        if moe.shared_expert_width:
            y = y + self.feed_forward(h, *swiglu(f"{name}.shared_expert"))
        return x + y


def products(config: ModelConfig) -> Iterator[tuple[str, ...]]:
    """Names of the INT4 weights of each product but the experts', those of one input together."""
    yield (EMBEDDING,)
    for layer in range(config.num_layers):
        name, moe = f"model.layers.{layer}", config.moe
        yield from (qkv_names(f"{name}.self_attn"), (f"{name}.self_attn.o_proj",))
        if moe is None or moe.shared_expert_width:
            gate_up, down = swiglu(f"{name}.feed_forward" + ("" if moe is None else ".shared_expert"))
            yield from (gate_up, (down,))


def swapped(packed: np.ndarray) -> np.ndarray:
    """Bytes of two codes as the embedding's op has them: even columns in the high nibble, not in the low one."""
    return packed >> 4 | packed << 4


def mixture_names(layer: int) -> tuple[str, str, str]:
    """The router and the two weights of all routed experts of a layer."""
    name = f"model.layers.{layer}.feed_forward"
    return f"{name}.router.weight", f"{name}.experts.gate_up_proj", f"{name}.experts.down_proj"


def _gated(gate_up: Tensor, activation: str) -> Tensor:
    """`gated` with GELU in steps: XNNPACK's delegate takes the operator by tanh for the one by erf, 5e-4 off."""
    if activation == "silu":
        return gated(gate_up, activation)
    gate, up = gate_up.chunk(2, dim=-1)
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def _linear_weight(weight: Int4) -> Tensor:
    """A weight [out, in] that XNNPACK multiplies activations in INT8 per row by."""
    scales = torch.from_numpy(weight.scales.astype(np.float32))
    zeros, block = torch.zeros_like(scales, dtype=torch.int8), (1, weight.group)
    kinds = cast(Any, torch).int4, block, torch.float32, "int8_asym_per_token"
    return IntxUnpackedToInt8Tensor(torch.from_numpy(weight.codes), scales, zeros, *kinds)


def _flat(name: str) -> str:
    return name.replace(".", "_")
