"""MobileMoE for transformers: one file that lies beside the weights and is loaded with trust_remote_code=True.

It stands alone (PyTorch and transformers, nothing of the project) and reads both published layouts: BF16, and INT4
codes that stay packed and are expanded where they are used. Written for clearness and exactness, not for speed.
Legend: B batch, S sequence, K keys, H head width, T tokens, D model, E experts, F expert width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class MobileMoEConfig(PretrainedConfig):
    """config.json as it is, every field an attribute; declared are those that transformers 5 reads itself."""

    model_type = "mobilemoe"
    max_position_embeddings: int = 8192
    rope_parameters: dict[str, Any] | None = None


class Weights(nn.Module):
    """A module whose weights [..., n] are floats, or INT4 codes with a float16 scale per group of the last axis."""

    def __init__(self, config: Any):
        super().__init__()
        self.group = (getattr(config, "quantization", None) or {}).get("group_size", 0)

    def declare(self, shape: tuple[int, ...], name: str, codes: str, scales: str) -> None:
        """Make the tensors of one weight: `name`, or `codes` (two to a byte) and `scales`."""
        if not self.group:
            return self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        *lead, last = shape
        self.register_buffer(codes, torch.zeros(*lead, last // 2, dtype=torch.uint8))
        return self.register_buffer(scales, torch.zeros(*lead, last // self.group, dtype=torch.float16))

    def read(self, index: Any, dtype: torch.dtype, name: str, codes: str, scales: str) -> Tensor:
        """Rows or experts `index` of a declared weight."""
        if not self.group:
            return getattr(self, name)[index].to(dtype)
        packed, scale = getattr(self, codes)[index], getattr(self, scales)[index].float()
        nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        values = ((nibbles ^ 8).to(torch.int8) - 8).float()  # two's complement of four bits
        return (values.unflatten(-1, (-1, self.group)) * scale[..., None]).flatten(-2).to(dtype)


class Matrix(Weights):
    """A product with a weight [out, in], or a table of rows."""

    names = ("weight", "qweight", "weight_scale")

    def __init__(self, config: Any, outputs: int, inputs: int):
        super().__init__(config)
        self.declare((outputs, inputs), *self.names)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `ids` of the table."""
        return self.read(ids, dtype, *self.names)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.read(slice(None), x.dtype, *self.names))


class Experts(Weights):
    """The routed experts' weights [E, in, out]; gate and up lie side by side."""

    gate_up = ("gate_up_proj", "gate_up_qweight", "gate_up_scale")
    down = ("down_proj", "down_qweight", "down_scale")

    def __init__(self, config: Any):
        super().__init__(config)
        experts, width, inner = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.declare((experts, width, 2 * inner), *self.gate_up)
        self.declare((experts, inner, width), *self.down)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """[T, D] of the tokens that chose `expert` to [T, D]."""
        gate, up = (x @ self.read(expert, x.dtype, *self.gate_up)).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ self.read(expert, x.dtype, *self.down)


class SharedExpert(nn.Module):
    """SwiGLU on every token."""

    def __init__(self, config: Any):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size_mlp
        self.gate_proj, self.up_proj = Matrix(config, inner, width), Matrix(config, inner, width)
        self.down_proj = Matrix(config, width, inner)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class FeedForward(nn.Module):
    """The shared expert and the chosen ones; the bias takes part in the choice and not in the weights."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.expert_bias = nn.Parameter(torch.zeros(config.num_local_experts))
        self.experts = Experts(config)
        self.shared_expert = SharedExpert(config) if config.intermediate_size_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        flat = x.flatten(0, 1)
        scores = F.linear(flat.float(), self.router.weight.float()).sigmoid()
        biased = scores + self.expert_bias.float()
        # A stable sort, so that of equal ones the first is taken.
        chosen = biased.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.num_experts_per_tok]
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        out = self.shared_expert(flat) if self.shared_expert else torch.zeros_like(flat)
        for expert in chosen.unique().tolist():
            tokens, slots = (chosen == expert).nonzero(as_tuple=True)
            mixed = self.experts(flat[tokens], expert) * weights[tokens, slots, None].to(x.dtype)
            out = out.index_add(0, tokens, mixed)
        return out.view_as(x)


class Norm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, config: Any):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis, in float32."""
        return (_rms(x.float(), self.eps) * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with weightless QK norm."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        width, model = config.head_dim, config.hidden_size
        queries, kv = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj, self.o_proj = Matrix(config, queries, model), Matrix(config, model, queries)
        self.k_proj, self.v_proj = Matrix(config, kv, model), Matrix(config, kv, model)

    def forward(self, x: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """x [B, S, D], angles [B, S, H / 2], seen [B, 1, S, K]."""
        heads = [
            part(x).unflatten(-1, (-1, self.config.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj)
        ]
        if self.config.use_qk_norm:
            heads[:2] = [_rms(part.float(), self.config.rms_norm_eps).to(x.dtype) for part in heads[:2]]
        heads[:2] = [_rotated(part, angles) for part in heads[:2]]
        q, k, v = (part.transpose(1, 2) for part in heads)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, config: Any, layer: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(config), Norm(config)
        self.self_attn, self.feed_forward = Attention(config, layer), FeedForward(config)

    def forward(self, x: Tensor, angles: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, seen, cache)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything up to the last norm."""

    def __init__(self, config: Any):
        super().__init__()
        self.embed_tokens = Matrix(config, config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config)


class MobileMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; the head is the embedding."""

    config_class = MobileMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "router", "expert_bias", "weight_scale", "gate_up_scale", "down_scale",
    ]  # fmt: skip

    def __init__(self, config: MobileMoEConfig):
        super().__init__(config)
        self.model = Trunk(config)
        self.post_init()

    def get_output_embeddings(self) -> None:
        """There is no head to tie."""

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V], or of the last `logits_to_keep` tokens; `attention_mask` [B, K] marks padding."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        keys = torch.arange(past + input_ids.shape[1], device=input_ids.device)
        seen = (keys <= places[:, None])[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, : len(keys)].bool()
            seen = seen | (keys == places[:, None])  # padding sees itself: a row without keys has no mean
        positions = places[None] if position_ids is None else position_ids
        angles = positions[..., None].float() * _frequencies(self.config).to(input_ids.device)
        x = self.model.embed_tokens.rows(input_ids, self.model.norm.weight.dtype)
        for layer in self.model.layers:
            x = layer(x, angles, seen, past_key_values)
        logits = self.model.embed_tokens(self.model.norm(x[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


def _frequencies(config: Any) -> Tensor:
    """Radians per position of each pair of a head, float32 [H / 2]; slow pairs are slowed further."""
    scaling = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = scaling.get("rope_theta") or config.rope_theta
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    frequencies = theta**-exponents
    if "factor" in scaling:  # a selection: the usual blend between two frequencies would divide by zero
        slow = 2 * math.pi / frequencies > scaling["original_max_position_embeddings"]
        frequencies = torch.where(slow, frequencies / scaling["factor"], frequencies)
    return frequencies.float()


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Adjacent pairs of [B, S, heads, H] by angles [B, S, H / 2]."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2).to(x.dtype)


def _rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
