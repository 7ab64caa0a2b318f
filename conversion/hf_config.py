"""config.json of the published MobileMoE folders to a model configuration and back, refusing what it cannot say.

Reading builds a configuration, writes it again and compares: a field that says something else is named. Fields that
are not known here are handed to the caller to show, except those about positions, which would change every answer.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_jax.config import TRAINING_OPTIONS, ModelConfig, MoEConfig, RopeConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.overrides import differences, from_dict

GROUP = 32
QUANTIZATION = {
    "format": "mobilemoe-int4-g32",
    "group_size": GROUP,
    "embedding_group_size": GROUP,
    "qmin": -8,
    "qmax": 7,
    "symmetric": True,
    "packed": True,
    "scale_dtype": "float16",
    "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])",
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 1.0}
# Said by a folder or not; where it is said it must be so.
_OPTIONAL = (
    "architectures",
    "attention_bias",
    "attn_temperature_tuning",
    "interleave_moe_layer_step",
    "layer_types",
)
_NOT_OF_THE_MODEL = (
    "torch_dtype", "dtype", "transformers_version", "auto_map", "_name_or_path", "bos_token_id", "eos_token_id",
    "pad_token_id", "initializer_range", "use_cache", "attention_dropout", "for_llm_compressor",
    "no_rope_layer_interval",  # of Llama 4, whose config this one follows: unused where no_rope_layers is given
)  # fmt: skip

_MOST_LAYERS = 10_000  # more is damage, of which a list as long would be made


def read_config(path: Path) -> tuple[ModelConfig, bool, list[str]]:
    """(model, whether its weights are INT4, fields that nothing here reads) of a config.json.

    Raises UserError naming the field that is missing or says what this project cannot compute.
    """
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}); name a folder with config.json and weights") from None
    try:
        config = _parsed(data, path)
    except KeyError as error:
        raise UserError(f"{path} misses {error}; use a MobileMoE folder") from None
    int4 = data.get("quantization") is not None
    wanted = _rendered(config) | ({"quantization": QUANTIZATION} if int4 else {})
    for key, value in wanted.items():
        if key in data or key not in _OPTIONAL:
            _require_same(path, key, data.get(key), value)
    unread = [k for k in data if k not in wanted and k not in _NOT_OF_THE_MODEL and data[k] is not None]
    for key in unread:
        if "rope" in key or "quant" in key:
            raise UserError(f"{path} has {key} = {data[key]!r}, which is not understood; use a MobileMoE folder")
    return config, int4, unread


def hf_config(config: ModelConfig, tokenizer: Tokenizer, int4: bool) -> dict[str, Any]:
    """config.json of a model; UserError where the published layout has no words for it."""
    if config.moe is None:
        raise UserError("the published layout has no dense model; export a mixture of experts")
    data = _rendered(config)
    rope = config.rope
    if rope.factor == 1:  # then nothing depends on the context that scaling starts from
        rope = replace(rope, original_max_position_embeddings=config.max_position_embeddings)
    lost = differences(replace(config, rope=rope), _parsed(data)).keys() - set(TRAINING_OPTIONS)
    if lost:
        raise UserError(
            f"the published layout cannot say {', '.join(sorted(lost))} of this model; export it as "
            ".litertlm, or to GGUF if that can"
        )
    return data | {
        "auto_map": {
            "AutoConfig": "modeling_mobilemoe.MobileMoEConfig",
            "AutoModelForCausalLM": "modeling_mobilemoe.MobileMoEForCausalLM",
        },
        "torch_dtype": "bfloat16",
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.end, tokenizer.eot],
        "pad_token_id": tokenizer.pad,
    } | ({"quantization": QUANTIZATION} if int4 else {})  # fmt: skip


def _parsed(data: dict[str, Any], path: Path = Path("config.json")) -> ModelConfig:
    positions, scaling = data["max_position_embeddings"], data["rope_scaling"]
    if not isinstance(scaling, dict) or not scaling:  # anything but null is refused when it is compared
        scaling = {"factor": 1.0, "original_max_position_embeddings": positions}
    said = data | {f"rope_scaling.{key}": value for key, value in scaling.items()}

    def get(kind: type, key: str) -> Any:  # a run with 2.0 or true for a whole number could not be read again
        return from_dict(kind, said[key], f"{key} in {path}")

    moe = MoEConfig(
        num_experts=get(int, "num_local_experts"),
        num_experts_per_tok=get(int, "num_experts_per_tok"),
        expert_width=get(int, "intermediate_size"),
        shared_expert_width=get(int, "intermediate_size_mlp"),
        norm_topk_prob=get(bool, "norm_topk_prob"),
        routed_scaling_factor=get(float, "routed_scaling_factor"),
    )
    if (layers := get(int, "num_hidden_layers")) > _MOST_LAYERS:
        raise UserError(f"{path} has num_hidden_layers = {layers}; at most {_MOST_LAYERS} can be read")
    original = get(int, "rope_scaling.original_max_position_embeddings")
    return ModelConfig(
        num_layers=layers,
        d_model=get(int, "hidden_size"),
        num_heads=get(int, "num_attention_heads"),
        num_kv_heads=get(int, "num_key_value_heads"),
        head_dim=get(int, "head_dim"),
        vocab_size=get(int, "vocab_size"),
        max_position_embeddings=get(int, "max_position_embeddings"),
        # Of the dense feed-forward that the experts were cut from.
        ffn_width=moe.num_experts_per_tok * moe.expert_width + moe.shared_expert_width,
        qk_norm=get(bool, "use_qk_norm"),
        norm_eps=get(float, "rms_norm_eps"),
        rope=RopeConfig(get(float, "rope_theta"), get(float, "rope_scaling.factor"), original),
        moe=moe,
    )


def _rendered(config: ModelConfig) -> dict[str, Any]:
    moe, rope, layers = config.moe or MoEConfig(), config.rope, config.num_layers
    scaled = {"factor": rope.factor, "original_max_position_embeddings": rope.original_max_position_embeddings}
    return {
        "model_type": "mobilemoe",
        "architectures": ["MobileMoEForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": config.d_model,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "intermediate_size": moe.expert_width,
        "intermediate_size_mlp": moe.shared_expert_width,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "use_qk_norm": config.qk_norm,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": _LLAMA3 | scaled if rope.factor != 1 else None,
        "no_rope_layers": [1] * layers,  # 1 means that positions are used, whatever the name says
        "layer_types": ["full_attention"] * layers,
        "interleave_moe_layer_step": 1,
        "hidden_act": config.activation,
        "attention_bias": False,
        "attn_temperature_tuning": False,
        "tie_word_embeddings": True,
    }


def _require_same(path: Path, key: str, found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            _require_same(path, f"{key}.{name}", found.get(name), wanted.get(name))
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        raise UserError(f"{path} has {key} = {found!r}, this project computes {wanted!r}; use a MobileMoE folder")
