"""The one table that ties a JAX parameter to its names in PyTorch, Hugging Face files and GGUF, both ways.

A row gives the JAX path and how one layer's array is laid out on the other side; its shape, and whether it is INT4,
are those of `moe_jax.model.describe`. Layers are stacked on a leading axis in JAX and are separate tensors
everywhere else.
Legend: D model, F width of a feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.model.describe import describe

_LAYER = "model.layers.{}."
_FFN = _LAYER + "feed_forward."
_BLOCK = "blk.{}."


@dataclass(frozen=True)
class Row:
    """One JAX parameter: `layout` is copy, transpose (last two axes) or split ([D, 2, F] to two [F, D]).

    Hugging Face files name a tensor as PyTorch does and lay it out alike, except `in_out` ones: those keep the axes
    of JAX, with INT4 groups along the output. A tensor with two GGUF names for one PyTorch name is cut in two along
    the output; `rotated` ones have the rows of each head in another order there. `shape`, of one layer, and `int4`
    are a model's: `rows` fills them in.
    """

    jax: str
    layout: str
    torch: tuple[str, ...]
    gguf: tuple[str, ...]
    in_out: bool = False
    rotated: bool = False
    shape: tuple[int, ...] = ()
    int4: bool = False

    @property
    def stacked(self) -> bool:
        """Whether JAX stacks the layers on a leading axis."""
        return self.jax.startswith("layers/")


def _norm(jax: str, torch: str, gguf: str) -> Row:
    return Row(f"{jax}/scale", "copy", (f"{torch}.weight",), (f"{gguf}.weight",))


def _attention(part: str, gguf: str) -> Row:
    path, name = f"layers/attention/{part}/kernel", _LAYER + f"self_attn.{part}_proj"
    return Row(path, "transpose", (name,), (_BLOCK + f"{gguf}.weight",), rotated=part in "qk")


def _pair(jax: str, torch: str, gguf: str) -> Row:
    """Gate and up in one array."""
    return Row(jax, "split", tuple(_FFN + f"{torch}{part}_proj" for part in ("gate", "up")), _gguf_pair(gguf))


def _down(jax: str, torch: str, gguf: str, in_out: bool = False) -> Row:
    return Row(jax, "transpose", (_FFN + f"{torch}down_proj",), (_BLOCK + f"ffn_down{gguf}.weight",), in_out=in_out)


def _gguf_pair(suffix: str) -> tuple[str, str]:
    return _BLOCK + f"ffn_gate{suffix}.weight", _BLOCK + f"ffn_up{suffix}.weight"


TABLE = (
    Row("embed/embedding", "copy", ("model.embed_tokens",), ("token_embd.weight",)),
    _norm("final_norm", "model.norm", "output_norm"),
    _norm("layers/attention_norm", _LAYER + "input_layernorm", _BLOCK + "attn_norm"),
    _norm("layers/ffn_norm", _LAYER + "post_attention_layernorm", _BLOCK + "ffn_norm"),
    _attention("q", "attn_q"),
    _attention("k", "attn_k"),
    _attention("v", "attn_v"),
    _attention("o", "attn_output"),
    Row("layers/ffn/router/kernel", "transpose", (_FFN + "router.weight",), (_BLOCK + "ffn_gate_inp.weight",)),
    Row("layers/ffn/router/bias", "copy", (_FFN + "expert_bias",), (_BLOCK + "exp_probs_b.bias",)),
    Row(
        "layers/ffn/experts/gate_up",
        "transpose",
        (_FFN + "experts.gate_up_proj",),
        _gguf_pair("_exps"),
        in_out=True,
    ),
    _down("layers/ffn/experts/down", "experts.", "_exps", in_out=True),
    _pair("layers/ffn/shared/gate_up", "shared_expert.", "_shexp"),
    _down("layers/ffn/shared/down", "shared_expert.", "_shexp"),
    _pair("layers/ffn/gate_up", "", ""),
    _down("layers/ffn/down", "", ""),
)


@cache
def rows(config: ModelConfig) -> tuple[Row, ...]:
    """The rows of the table that a model of this configuration has."""
    leaves = describe(config)
    return tuple(
        replace(row, shape=leaf.shape[1:] if row.stacked else leaf.shape, int4=leaf.quant_axis is not None)
        for row in TABLE
        if (leaf := leaves.get(row.jax))
    )


def jax_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """JAX path to shape, layers stacked, in the order of the table."""
    return {row.jax: ((config.num_layers,) if row.stacked else ()) + row.shape for row in rows(config)}


@dataclass(frozen=True)
class TorchTensor:
    """A tensor on the PyTorch side: its name, float shape [..., out, in] and whether it is held as INT4."""

    name: str
    shape: tuple[int, ...]
    int4: bool


def torch_tensors(config: ModelConfig) -> list[TorchTensor]:
    """Every tensor of the model on the PyTorch side, in the order of the table."""
    found = []
    for row in rows(config):
        for layer in _layers(row, config):
            found += [TorchTensor(name.format(layer), _laid_out_shape(row), row.int4) for name in row.torch]
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


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face file in its float form."""

    name: str
    shape: tuple[int, ...]
    row: Row
    layer: int

    @property
    def codes(self) -> str:
        """Name of the packed codes of an INT4 tensor."""
        return f"{self.name.removesuffix('_proj')}_qweight" if self.row.in_out else f"{self._module}.qweight"

    @property
    def scales(self) -> str:
        """Name of the scales of an INT4 tensor."""
        return f"{self.name.removesuffix('_proj')}_scale" if self.row.in_out else f"{self._module}.weight_scale"

    @property
    def _module(self) -> str:
        return self.name.removesuffix(".weight")


def hf_tensors(config: ModelConfig) -> list[HfTensor]:
    """Every tensor of the published layouts, in the order of the table, those of one row and layer side by side."""
    found = []
    for row in rows(config):
        shape = row.shape if row.in_out else _laid_out_shape(row)
        for layer in _layers(row, config):
            for name in (template.format(layer) for template in row.torch):
                full = name if row.in_out or not row.int4 else f"{name}.weight"
                found.append(HfTensor(full, shape, row, layer))
    return found


def to_hf(row: Row, value: np.ndarray) -> list[np.ndarray]:
    """One layer's JAX array as the Hugging Face tensors of the row, views where possible."""
    return [value] if row.in_out else _lay_out(row, value)


def from_hf(row: Row, parts: list[np.ndarray]) -> np.ndarray:
    """Inverse of `to_hf`."""
    return parts[0] if row.in_out else _undo(row, parts)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: the output rows [start, start + height) of one PyTorch tensor."""

    name: str
    shape: tuple[int, ...]
    torch: TorchTensor
    start: int
    rotated: bool


def gguf_tensors(config: ModelConfig) -> list[GgufTensor]:
    """Every tensor of the model in GGUF (llama.cpp's own additions aside), in the order of the table."""
    found = []
    for row in rows(config):
        shape = _laid_out_shape(row)
        cuts = len(row.gguf) // len(row.torch)
        part = (*shape[:-2], shape[-2] // cuts, shape[-1]) if cuts > 1 else shape
        for layer in _layers(row, config):
            for i, name in enumerate(row.gguf):
                torch = TorchTensor(row.torch[i // cuts].format(layer), shape, row.int4)
                start = i % cuts * part[-2] if cuts > 1 else 0
                found.append(GgufTensor(name.format(layer), part, torch, start, row.rotated))
    return found


def _layers(row: Row, config: ModelConfig) -> range:
    return range(config.num_layers if row.stacked else 1)


def _laid_out_shape(row: Row) -> tuple[int, ...]:
    if row.layout == "split":
        return row.shape[2], row.shape[0]
    return row.shape if row.layout == "copy" else (*row.shape[:-2], row.shape[-1], row.shape[-2])


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
