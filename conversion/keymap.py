"""The one table that ties a JAX parameter to its PyTorch (Hugging Face) names, read in both directions.

A row gives the JAX path, its shape in letters, how one layer's array is laid out on the other side, and which
tensors are INT4. Layers are stacked on a leading axis in JAX and are separate tensors in PyTorch.
Legend: D model, NH query heads x width, GH key/value heads x width, E experts, F expert width, S shared width,
W dense feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.errors import UserError

_LAYER = "model.layers.{}."
_FFN = _LAYER + "feed_forward."


@dataclass(frozen=True)
class Row:
    """One JAX parameter: `layout` is copy, transpose (last two axes) or split ([D, 2, F] to two [F, D])."""

    jax: str
    shape: str
    layout: str
    torch: tuple[str, ...]
    int4: bool = False
    needs: str = ""  # moe, shared or dense: the part of the model that the row belongs to

    @property
    def stacked(self) -> bool:
        """Whether JAX stacks the layers on a leading axis."""
        return self.jax.startswith("layers/")


TABLE = (
    Row("embed/embedding", "V D", "copy", ("model.embed_tokens",), int4=True),
    Row("final_norm/scale", "D", "copy", ("model.norm.weight",)),
    Row("layers/attention_norm/scale", "D", "copy", (_LAYER + "input_layernorm.weight",)),
    Row("layers/ffn_norm/scale", "D", "copy", (_LAYER + "post_attention_layernorm.weight",)),
    *(
        Row(f"layers/attention/{part}/kernel", shape, "transpose", (_LAYER + f"self_attn.{part}_proj",), int4=True)
        for part, shape in (("q", "D NH"), ("k", "D GH"), ("v", "D GH"), ("o", "NH D"))
    ),
    Row("layers/ffn/router/kernel", "D E", "transpose", (_FFN + "router.weight",), needs="moe"),
    Row("layers/ffn/router/bias", "E", "copy", (_FFN + "expert_bias",), needs="moe"),
    Row(
        "layers/ffn/experts/gate_up",
        "E D 2F",
        "transpose",
        (_FFN + "experts.gate_up_proj",),
        int4=True,
        needs="moe",
    ),
    Row("layers/ffn/experts/down", "E F D", "transpose", (_FFN + "experts.down_proj",), int4=True, needs="moe"),
    Row(
        "layers/ffn/shared/gate_up",
        "D 2 S",
        "split",
        (_FFN + "shared_expert.gate_proj", _FFN + "shared_expert.up_proj"),
        int4=True,
        needs="shared",
    ),
    Row(
        "layers/ffn/shared/down", "S D", "transpose", (_FFN + "shared_expert.down_proj",), int4=True, needs="shared"
    ),
    Row("layers/ffn/gate_up", "D 2 W", "split", (_FFN + "gate_proj", _FFN + "up_proj"), int4=True, needs="dense"),
    Row("layers/ffn/down", "W D", "transpose", (_FFN + "down_proj",), int4=True, needs="dense"),
)


def rows(config: ModelConfig) -> list[Row]:
    """The rows of the table that a model of this configuration has."""
    parts = {""}
    if config.moe is None:
        parts.add("dense")
    else:
        parts |= {"moe", "shared"} if config.moe.shared_expert_width else {"moe"}
    return [row for row in TABLE if row.needs in parts]


def jax_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """JAX path to shape, layers stacked."""
    letters = _letters(config)
    return {
        row.jax: ((config.num_layers,) if row.stacked else ())
        + tuple(letters[letter] for letter in row.shape.split())
        for row in rows(config)
    }


@dataclass(frozen=True)
class TorchTensor:
    """A tensor on the PyTorch side: its name, float shape [..., out, in] and whether it is held as INT4."""

    name: str
    shape: tuple[int, ...]
    int4: bool


def torch_tensors(config: ModelConfig) -> list[TorchTensor]:
    """Every tensor of the model on the PyTorch side, in the order of the table."""
    letters, found = _letters(config), []
    for row in rows(config):
        shape = _laid_out_shape(row, tuple(letters[letter] for letter in row.shape.split()))
        for layer in _layers(row, config):
            found += [TorchTensor(name.format(layer), shape, row.int4) for name in row.torch]
    return found


def to_torch(parameters: Mapping[str, np.ndarray], config: ModelConfig) -> Iterator[tuple[TorchTensor, np.ndarray]]:
    """Yield every PyTorch tensor with its float32 value, one at a time so that memory holds one copy.

    Raises UserError when `parameters` misses a path, has one too many, or one of another shape.
    """
    _check("checkpoint", {k: v.shape for k, v in parameters.items()}, jax_shapes(config))
    for row in rows(config):
        stack = parameters[row.jax]
        for layer in _layers(row, config):
            value = stack[layer] if row.stacked else stack
            for name, part in zip(row.torch, _lay_out(row, value), strict=True):
                tensor = TorchTensor(name.format(layer), part.shape, row.int4)
                yield tensor, np.ascontiguousarray(part, np.float32)


def to_jax(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Inverse of `to_torch`: float tensors by PyTorch name to JAX arrays by path, layers stacked."""
    wanted = {tensor.name: tensor.shape for tensor in torch_tensors(config)}
    _check("model", {k: v.shape for k, v in tensors.items()}, wanted)
    parameters = {}
    for row in rows(config):
        layers = [_undo(row, [tensors[name.format(layer)] for name in row.torch]) for layer in _layers(row, config)]
        parameters[row.jax] = np.stack(layers) if row.stacked else layers[0]
    return parameters


def _letters(config: ModelConfig) -> dict[str, int]:
    moe = config.moe
    letters = {
        "V": config.vocab_size,
        "D": config.d_model,
        "NH": config.num_heads * config.head_dim,
        "GH": config.num_kv_heads * config.head_dim,
        "W": config.ffn_width,
        "2": 2,
    }
    if moe is not None:
        letters |= {"E": moe.num_experts, "F": moe.expert_width, "2F": 2 * moe.expert_width}
        letters["S"] = moe.shared_expert_width
    return letters


def _layers(row: Row, config: ModelConfig) -> range:
    return range(config.num_layers if row.stacked else 1)


def _laid_out_shape(row: Row, shape: tuple[int, ...]) -> tuple[int, ...]:
    if row.layout == "split":
        return shape[2], shape[0]
    return shape if row.layout == "copy" else (*shape[:-2], shape[-1], shape[-2])


def _lay_out(row: Row, value: np.ndarray) -> list[np.ndarray]:
    if row.layout == "split":
        return [value[:, 0].T, value[:, 1].T]
    return [value if row.layout == "copy" else np.swapaxes(value, -1, -2)]


def _undo(row: Row, parts: list[np.ndarray]) -> np.ndarray:
    if row.layout == "split":
        return np.stack([part.T for part in parts], axis=1)
    return parts[0] if row.layout == "copy" else np.swapaxes(parts[0], -1, -2)


def _check(what: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(f"the {what} misses {listed(missing)}; it is not of this configuration")
    if extra := sorted(found.keys() - wanted.keys()):
        raise UserError(f"the {what} holds unknown {listed(extra)}; it is not of this configuration")
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise UserError(
                f"{name} of the {what} has shape {tuple(found[name])} where the configuration gives "
                f"{shape}; use the configuration that it was trained with"
            )


def listed(names: list[str], limit: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
