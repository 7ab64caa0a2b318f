"""GGUF for stock llama.cpp: its `exaone-moe` architecture computes just what MobileMoE does, the dense twin too.

All layers are marked as sliding, because only those rotate there, with a window of the whole context. llama3
scaling goes in as a factor per pair, the weightless QK norm as weights of ones, a dense model as leading dense
layers alone. INT4 codes and scales move to Q4_0 unchanged; one tensor at a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tqdm import tqdm

from conversion import keymap
from conversion.gguf_vocab import vocabulary
from conversion.int4 import Int4, unpack_nibbles
from conversion.outputs import replacing, writing
from conversion.weights import Weights
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.files import AnyPath
from moe_jax.model.rope import rope_frequencies

ARCHITECTURE = "exaone-moe"
_BLOCK = 32  # weights that share a scale in Q4_0
_MOST_EXPERTS = 1024  # LLAMA_MAX_EXPERTS: llama.cpp aborts above it
_GATING = {"softmax": 1, "sigmoid": 2}
_HEAD = "output.weight"  # the embedding again: the architecture knows no tied head


def write_gguf(
    weights: Weights, path: str | Path, tokenizer: AnyPath | None = None, *, kind: str = "q4_0", name: str = ""
) -> dict[str, Any]:
    """Write `weights` as a GGUF file; what was written, for a report. Same weights, same bytes.

    `kind` is q4_0 (codes and scales as they are) or f32 (the same values, for exact comparison); without a
    `tokenizer` the file takes ids only, as for speed measurements of random weights.

    Raises:
        UserError: a model that llama.cpp cannot compute exactly, a tokenizer it would apply otherwise, a disk that
            is full; a file that was there stays as it was.
    """
    path, described = Path(path), words(weights.config, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), replacing(path) as aside:
        _write(aside, weights, kind, name or path.stem, described)
    size = path.stat().st_size
    return {"file": str(path), "bytes": size, "architecture": ARCHITECTURE, "type": kind, "group": weights.group}


def words(config: ModelConfig, tokenizer: AnyPath | None) -> dict[str, Any]:
    """Metadata `tokenizer.*` of a file; UserError for a model or tokenizer that llama.cpp would apply otherwise."""
    if why := _inexact(config):
        raise UserError(f"llama.cpp cannot compute this model exactly: {why}; export it to .litertlm instead")
    return vocabulary(tokenizer, config.vocab_size) if tokenizer else {"tokenizer.ggml.model": "no_vocab"}


def metadata(config: ModelConfig, kind: str, name: str) -> dict[str, Any]:
    """The keys by which llama.cpp builds the model."""
    moe, layers = config.moe, config.num_layers
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.d_model,
        "block_count": layers,
        "feed_forward_length": moe.shared_expert_width if moe else config.ffn_width,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "attention.sliding_window": config.max_position_embeddings,
        "attention.sliding_window_pattern": [True] * layers,
        "rope.freq_base": config.rope.theta,
        "rope.dimension_count": config.head_dim,
        "expert_feed_forward_length": moe.expert_width if moe else config.ffn_width,
        "expert_gating_func": _GATING[moe.score_func] if moe else _GATING["sigmoid"],
        "leading_dense_block_count": 0 if moe else layers,
    }
    if moe:
        keys |= {
            "expert_count": moe.num_experts,
            "expert_used_count": moe.num_experts_per_tok,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": moe.shared_expert_width,
            "expert_weights_norm": moe.norm_topk_prob,
            "expert_weights_scale": moe.routed_scaling_factor,
        }
    file_type = gguf.LlamaFileType.MOSTLY_Q4_0 if kind == "q4_0" else gguf.LlamaFileType.ALL_F32
    general = {"name": name, "file_type": int(file_type), "quantization_version": gguf.GGML_QUANT_VERSION}
    return {f"general.{k}": v for k, v in general.items()} | {f"{ARCHITECTURE}.{k}": v for k, v in keys.items()}


def q4_0(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes uint8 [..., in/2] and scales float16 [..., in/group] as Q4_0 blocks, uint8 [..., in/32 * 18]."""
    codes = (unpack_nibbles(packed) + 8).view(np.uint8)
    codes = codes.reshape(*codes.shape[:-1], -1, 2, _BLOCK // 2)
    blocks = np.empty((*codes.shape[:-2], 2 + _BLOCK // 2), np.uint8)
    repeats = codes.shape[-3] // scales.shape[-1]
    blocks[..., :2] = np.repeat(scales, repeats, axis=-1)[..., None].view(np.uint8)
    blocks[..., 2:] = codes[..., 0, :] | (codes[..., 1, :] << 4)
    return blocks.reshape(*codes.shape[:-3], -1)


def _inexact(config: ModelConfig) -> str:
    """What the architecture does not have, or nothing."""
    if not config.qk_norm:
        return "it has no QK norm"
    if config.activation != "silu":
        return f"its activation is {config.activation}"
    if config.moe is not None and not config.moe.shared_expert_width:
        return "it has no shared expert"
    if config.moe is not None and config.moe.num_experts > _MOST_EXPERTS:
        return f"it has more than {_MOST_EXPERTS} experts"
    return ""


def _write(path: Path, weights: Weights, kind: str, name: str, words: dict[str, Any]) -> None:
    tensors = list(_tensors(weights, kind))
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for key, value in (metadata(weights.config, kind, name) | words).items():
        _add(writer, key, value)
    for tensor, shape, _ in tensors:
        raw = gguf.GGMLQuantizationType.F32
        if kind == "q4_0" and tensor.torch.int4:
            raw = gguf.GGMLQuantizationType.Q4_0
        block, size = gguf.GGML_QUANT_SIZES[raw]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, values in tqdm(tensors, "GGUF", unit="tensor", disable=None):
            writer.write_tensor_data(values())
    finally:
        writer.close()


def _tensors(
    weights: Weights, kind: str
) -> Iterator[tuple[keymap.GgufTensor, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Every tensor with its shape and what gives its content, in the order of the file."""
    config = weights.config
    ones = np.ones(config.head_dim, np.float32)
    # What llama.cpp divides a pair's frequency by.
    slower = rope_frequencies(replace(config.rope, factor=1.0), config.head_dim)
    slower = slower / rope_frequencies(config.rope, config.head_dim)
    extra = {"rope_freqs.weight": slower}
    for layer in range(config.num_layers):
        extra |= {f"blk.{layer}.attn_{part}_norm.weight": ones for part in "qk"}
    tensors = keymap.gguf_tensors(config)
    tensors.append(replace(tensors[0], name=_HEAD))
    for name, value in extra.items():
        torch = keymap.TorchTensor(name, value.shape, False)
        yield keymap.GgufTensor(name, value.shape, torch, 0, False), value.shape, lambda value=value: value
    for tensor in tensors:
        yield tensor, tensor.shape, lambda tensor=tensor: _content(weights, tensor, kind)


def _content(weights: Weights, tensor: keymap.GgufTensor, kind: str) -> np.ndarray:
    name, moe = tensor.torch.name, weights.config.moe
    if name.endswith("expert_bias") and moe and not moe.use_expert_bias:
        return np.zeros(tensor.shape, np.float32)  # llama.cpp adds what is there
    if not tensor.torch.int4:
        return np.ascontiguousarray(weights.float(name), np.float32)
    packed, scales = (_rows(part, tensor, weights.config) for part in (weights.packed(name), weights.scales(name)))
    if kind == "q4_0":
        return q4_0(packed, scales)
    return Int4(unpack_nibbles(packed), scales).dequantize()


def _rows(array: np.ndarray, tensor: keymap.GgufTensor, config: ModelConfig) -> np.ndarray:
    """The output rows of a PyTorch array [..., out, x] that are this tensor's, in llama.cpp's order."""
    array = array[..., tensor.start : tensor.start + tensor.shape[-2], :]
    if tensor.rotated:  # llama.cpp rotates (i, i + half) of a head where MobileMoE rotates (2i, 2i + 1)
        heads = array.reshape(-1, config.head_dim // 2, 2, array.shape[-1])
        array = heads.swapaxes(1, 2).reshape(array.shape)
    return array


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    # bool before int: True is a whole number too.
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    adders[type(value)](key, value)
