"""MobileMoE in PyTorch on INT4 weights, written once and run twice: as the reference and as what is exported.

The module below holds only what stays float (norms and bias). Everything quantised goes through `Ops`, whose
reference computes with the dequantised codes as XNNPACK does and whose other form (conversion.litert.markers)
leaves a marker with the weight's name in the exported program.
Legend: B batch, S sequence, T tokens (B*S), C cache length, D model, N query heads, G key/value heads, H head
width, E experts, K experts per token, F expert width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conversion import MASKED, torch_ops
from conversion.weights import Weights
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.model.rope import rope_frequencies
from moe_jax.ops import fake_quant

EMBEDDING = "model.embed_tokens"


class Seen(NamedTuple):
    """What attention is told of positions: alike in every layer."""

    turn: Tensor  # [H, H], which takes adjacent pairs (a, b) to (-b, a)
    cos: Tensor  # [S, 1, H], each value twice
    sin: Tensor
    mask: Tensor | None  # [1, 1, S, C], added to scores; None where the cache knows what may be seen


class Ops(ABC):
    """What of a model may have its own form: products of INT4 weights, by name, and the halves of a layer."""

    @abstractmethod
    def linear(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """x [..., in] times the weights [out, in], one below the other: [..., sum of out]."""

    @abstractmethod
    def feed_forward(self, x: Tensor, gate_up: tuple[str, str], down: str) -> Tensor:
        """x [..., D] through a gated feed-forward with these weights, [F, D] twice and [D, F]: x's shape."""

    @abstractmethod
    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        """Rows of the table [V, D] at integer tokens [T]: [T, D]."""

    @abstractmethod
    def self_attention(self, layer: int, x: Tensor, norm: Tensor, seen: Seen, cache: Cache) -> Tensor:
        """The first half of a layer: x [B, S, D] plus what it sees of the cache, after a norm of weight [D]."""

    @abstractmethod
    def mixture(self, layer: int, x: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        """The second half of a layer with experts: x [B, S, D] + routed experts + shared expert, after a norm.

        `bias` [E] only helps choose.
        """


class Cache(Protocol):
    """Keys and values of earlier positions."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take k, v [B, G, S, H] of new positions and return those to attend to, [B, G, C, H]."""
        ...


class NoCache:
    """Attend to the given positions only."""

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return what came."""
        return k, v


class StaticCache:
    """A cache of fixed length, written from `start` on (`start_of`); `k` and `v` hold the new state."""

    def __init__(self, k: list[Tensor], v: list[Tensor], start: Tensor):
        self.k, self.v, self.start = list(k), list(v), start

    @staticmethod
    def start_of(positions: Tensor) -> Tensor:
        """Where int32 positions [S] begin in a cache: int32 [4], positions being the third of four axes."""
        return F.pad(positions[:1], (2, 1))

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new positions and return the whole cache."""
        self.k[layer] = torch_ops.write(self.k[layer], k, self.start)
        self.v[layer] = torch_ops.write(self.v[layer], v, self.start)
        return self.k[layer], self.v[layer]


class Composed(Ops):
    """The halves of a layer, made of smaller operations and of ordinary tensor functions."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    @abstractmethod
    def router(self, h: Tensor, name: str) -> Tensor:
        """h [T, D] times the float32 weight [E, D], activations left alone: [T, E]."""

    @abstractmethod
    def experts(self, h: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
        """Sum over k of weights [T, K] times the feed-forward of expert ids [T, K] (int32) on h [T, D]."""

    @abstractmethod
    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> Tensor:
        """Softmax of q [B, G, N/G*S, H] times k [B, G, C, H] plus mask [1, 1, S, C], times v: q's shape.

        The rows of a group are its heads one after the other, S positions each.
        """

    def self_attention(self, layer: int, x: Tensor, norm: Tensor, seen: Seen, cache: Cache) -> Tensor:
        """See `Ops.self_attention`."""
        c, name = self.config, f"model.layers.{layer}.self_attn"
        n, g, width = c.num_heads, c.num_kv_heads, c.head_dim
        batch, length, _ = x.shape
        qkv = self.linear(normed(x, norm, c.norm_eps), qkv_names(name))
        qkv = qkv.reshape(batch, length, n + 2 * g, width)
        qk, v = qkv[:, :, : n + g], qkv[:, :, n + g :]
        qk = qk * inverse_rms(qk, c.norm_eps) if c.qk_norm else qk
        qk = qk * seen.cos + (qk @ seen.turn) * seen.sin
        q = (qk[:, :, :n] * width**-0.5).transpose(1, 2)
        k, v = cache.update(layer, qk[:, :, n:].transpose(1, 2), v.transpose(1, 2))
        q = q.reshape(batch, g, n // g * length, width)  # query heads of one group become rows of one product
        out = (
            self.attention(q, k, v, cast(Tensor, seen.mask), name).reshape(batch, n, length, width).transpose(1, 2)
        )
        return x + self.linear(out.reshape(batch, length, n * width), (f"{name}.o_proj",))

    def mixture(self, layer: int, x: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        """See `Ops.mixture`."""
        moe, name = cast(MoEConfig, self.config.moe), f"model.layers.{layer}.feed_forward"
        x_normed = normed(x, norm, self.config.norm_eps)
        h = x_normed.reshape(-1, self.config.d_model)
        ids, weights = self.route(h, moe, f"{name}.router.weight", bias)
        y = self.experts(h, ids, weights, f"{name}.experts").reshape(x.shape)
        if moe.shared_expert_width:
            y = y + self.feed_forward(x_normed, *swiglu(f"{name}.shared_expert"))
        return x + y

    def route(self, h: Tensor, moe: MoEConfig, name: str, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts int32 [T, K] and their weights [T, K] for h [T, D]; `name` is the router's weight [E, D].

        The bias [E] only helps choose.
        """
        logits = self.router(h, name)
        scores = torch.sigmoid(logits) if moe.score_func == "sigmoid" else logits.softmax(dim=-1)
        ids = self.top_k(scores + bias if moe.use_expert_bias else scores, moe.num_experts_per_tok)
        tokens = torch.arange(len(ids), dtype=torch.int32)[:, None]
        weights = torch_ops.rows(scores.reshape(-1), ids + moe.num_experts * tokens)
        if moe.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, weights * moe.routed_scaling_factor

    def top_k(self, scores: Tensor, k: int) -> Tensor:
        """Indices int32 [T, k] of the largest scores [T, E], the lower first among equals."""
        return torch_ops.top_k(scores, k)


class Reference(Composed):
    """Exact arithmetic of the deployed model in float32: INT4 weights, INT8 activations per row.

    `int8_activations=False` leaves activations alone, which isolates the weights when two programs are compared:
    rounding to INT8 turns a difference of one float ulp into one of a whole step now and then.
    """

    def __init__(self, weights: Weights, int8_activations: bool = True):
        super().__init__(weights.config)
        self._weights = weights
        self._int8 = int8_activations
        self._dense: dict[tuple[str, ...], Tensor] = {}

    def linear(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """See `Ops.linear`."""
        return self.rounded(x, "+".join(names)) @ self._float(names).T

    def feed_forward(self, x: Tensor, gate_up: tuple[str, str], down: str) -> Tensor:
        """See `Ops.feed_forward`."""
        return self.linear(gated(self.linear(x, gate_up), self._weights.config.activation), (down,))

    def router(self, h: Tensor, name: str) -> Tensor:
        """See `Composed.router`."""
        return h @ torch.from_numpy(self._weights.float(name)).T

    def embedding(self, tokens: Tensor, name: str) -> Tensor:
        """See `Ops.embedding`."""
        return self._float((name,))[tokens.long()]

    def experts(self, h: Tensor, ids: Tensor, weights: Tensor, name: str) -> Tensor:
        """See `Composed.experts`."""
        gate_up = self._weights.int4(f"{name}.gate_up_proj").dequantize()
        down = self._weights.int4(f"{name}.down_proj").dequantize()
        out = torch.zeros_like(h)
        for expert in ids.unique().tolist():
            rows, slot = (ids == expert).nonzero(as_tuple=True)
            up = self.rounded(h[rows], f"{name}.{expert}.gate_up", rows) @ torch.from_numpy(gate_up[expert]).T
            act = gated(up, self._weights.config.activation)
            y = self.rounded(act, f"{name}.{expert}.down", rows) @ torch.from_numpy(down[expert]).T
            out.index_add_(0, rows, weights[rows, slot, None] * y)
        return out

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, name: str) -> Tensor:
        """See `Composed.attention`."""
        scores = q @ k.mT + mask.repeat(1, 1, q.shape[2] // mask.shape[2], 1)
        return torch.softmax(scores, dim=-1) @ v

    def rounded(self, x: Tensor, product: str, tokens: Tensor | None = None) -> Tensor:
        """x [..., in] as the weights see it: each row in INT8.

        `product` and `tokens` [rows], where rows are not all tokens in order, tell an override what it rounds.
        """
        if not self._int8:
            return x
        codes, scale, zero = fake_quant.quantize_rows_int8(x.numpy())
        return torch.from_numpy((codes.astype(np.float32) - zero) * scale)

    def _float(self, names: tuple[str, ...]) -> Tensor:
        if names not in self._dense:
            self._dense[names] = torch.from_numpy(self._weights.fused(names).dequantize())
        return self._dense[names]


def inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """One over the root mean square of the last axis, which stays with length 1."""
    return torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + epsilon)


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., D] over its root mean square, times `weight` [D]."""
    return x * inverse_rms(x, epsilon) * weight


def qkv_names(name: str) -> tuple[str, str, str]:
    """The weights of an attention that read its input."""
    return f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"


def swiglu(name: str) -> tuple[tuple[str, str], str]:
    """The weights of a gated feed-forward: gate and up, and down."""
    return (f"{name}.gate_proj", f"{name}.up_proj"), f"{name}.down_proj"


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up of [..., 2F], the first F columns being the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return gate * torch.sigmoid(gate) * up
    return F.gelu(gate, approximate="tanh") * up


class Decoder(nn.Module, ABC):
    """The model's stages, so that any cache and any head can be put on; `_float` says where norms and bias are."""

    def __init__(self, config: ModelConfig, ops: Ops, length: int):
        """`length` is the number of positions that the rotary tables cover."""
        super().__init__()
        self.config, self.ops = config, ops
        cos, sin = rotary_tables(config, length)
        self.register_buffer("cos", torch.from_numpy(cos))
        self.register_buffer("sin", torch.from_numpy(sin))
        self.register_buffer("turn", torch.from_numpy(_quarter_turn(config.head_dim)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of int32 tokens [B, S] without a cache: the parity reference."""
        length = tokens.shape[1]
        positions = torch.arange(length, dtype=torch.int32)
        causal = torch.full((1, 1, length, length), MASKED).triu(1)
        return self.head(self.hidden(tokens, positions, causal, NoCache()))

    def hidden(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """Normed state [B, S, D] of tokens [B, S] at int32 positions [S]; mask [1, 1, S, C] is added to scores."""
        x, cos, sin = self.embed(tokens, positions)
        for layer in range(self.config.num_layers):
            x = self.layer(layer, x, cos, sin, mask, cache)
        return self.final(x)

    def embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State [B, S, D], and the cosines and sines [S, 1, H] that every layer turns by."""
        c = self.config
        batch, length = tokens.shape
        x = self.ops.embedding(tokens.reshape(-1), EMBEDDING).reshape(batch, length, c.d_model)
        cos, sin = (torch_ops.rows(table, positions)[:, None] for table in (self.cos, self.sin))
        return x, cos, sin

    def layer(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """The state [B, S, D] after one layer; see `Seen`."""
        name, moe = f"model.layers.{layer}", self.config.moe
        first, second = (self._float(f"{name}.{part}_layernorm.weight") for part in ("input", "post_attention"))
        x = self.ops.self_attention(layer, x, first, Seen(self.turn, cos, sin, mask), cache)
        if moe is None:
            h = normed(x, second, self.config.norm_eps)
            return x + self.ops.feed_forward(h, *swiglu(f"{name}.feed_forward"))
        return self.ops.mixture(layer, x, second, self.expert_bias(layer, moe))

    def final(self, x: Tensor) -> Tensor:
        """The normed state that the head takes."""
        return normed(x, self._float("model.norm.weight"), self.config.norm_eps)

    def head(self, x: Tensor) -> Tensor:
        """Logits [..., V] of normed states [..., D]: the embedding again."""
        return self.ops.linear(x, (EMBEDDING,))

    def expert_bias(self, layer: int, moe: MoEConfig) -> Tensor:
        """What is added to scores [E] where experts are chosen."""
        name = f"model.layers.{layer}.feed_forward.expert_bias"
        return self._float(name) if moe.use_expert_bias else torch.zeros(moe.num_experts)

    @abstractmethod
    def _float(self, name: str) -> Tensor:
        """A tensor that is not quantised, by its name."""


class MobileMoE(Decoder):
    """The whole model on weights at hand."""

    def __init__(self, weights: Weights, ops: Ops, length: int):
        """`length` as in `Decoder`."""
        super().__init__(weights.config, ops, length)
        int4 = set(weights.int4_names())
        for name in weights.names():
            if name not in int4:
                self.register_buffer(_flat(name), torch.from_numpy(weights.float(name)))

    def _float(self, name: str) -> Tensor:
        return getattr(self, _flat(name))


def _flat(name: str) -> str:
    return name.replace(".", "_")  # a buffer's name may hold no dot


def rotary_tables(config: ModelConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [length, H], each value standing twice: pairs are adjacent (2i, 2i+1)."""
    inverse = rope_frequencies(config.rope, config.head_dim)
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse
    return np.repeat(np.cos(angles), 2, axis=1), np.repeat(np.sin(angles), 2, axis=1)


def _quarter_turn(width: int) -> np.ndarray:
    """The matrix that takes pairs (a, b) to (-b, a); one small product lowers better than strided slices."""
    turn = np.zeros((width, width), np.float32)
    even = np.arange(0, width, 2)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    return turn
