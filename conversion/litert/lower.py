"""From weights to a .tflite: litert-torch lowers a skeleton without INT4 weights, surgery puts the integers in.

The skeleton holds markers, norms and routers only, so the converter's memory does not grow with the experts; the
codes and scales of the checkpoint go straight into the file and are never seen as floats.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import litert_torch
import torch
from torch import Tensor, nn

from conversion.litert import markers
from conversion.litert.dense import DenseExperts
from conversion.litert.experts import Experts, expand
from conversion.litert.flatbuffer import Graph, Model, Stored
from conversion.torch_model import MobileMoE, StaticCache
from conversion.weights import Weights
from moe_jax.errors import UserError

_FUSED = "+"  # between the names of weights whose rows are one tensor of the file


class Step(nn.Module):
    """One signature of the LiteRT-LM contract: tokens and cache in, cache and maybe last logits out."""

    def __init__(self, model: MobileMoE, logits: bool):
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, tokens: Tensor, input_pos: Tensor, mask: Tensor, **cache: Tensor) -> dict[str, Tensor]:
        """tokens int32 [1, S], input_pos int32 [S], mask [1, 1, S, C], kv_cache_{k,v}_{layer} [1, G, C, H]."""
        layers = range(self.model.config.num_layers)
        keys = [cache[f"kv_cache_k_{i}"] for i in layers]
        values = [cache[f"kv_cache_v_{i}"] for i in layers]
        state = StaticCache(keys, values, input_pos[:1])
        x = self.model.hidden(tokens, input_pos, mask, state)
        out = {f"kv_cache_k_{i}": state.k[i] for i in layers}
        out |= {f"kv_cache_v_{i}": state.v[i] for i in layers}
        return out | {"logits": self.model.head(x[:, -1:])} if self.logits else out


def cache_length(context: int, prefill: Sequence[int]) -> int:
    """Positions of the cache for a context: room for the padding of a last, partly filled prefill call.

    DYNAMIC_UPDATE_SLICE moves a slice that would reach past the end back, over positions that are in use. The
    length is never prime: LiteRT-LM takes a prime cache for a placeholder and resizes the model.
    """
    return -(-(context + max(prefill) - 1) // 32) * 32


def sample_inputs(weights: Weights, tokens: int, length: int) -> dict[str, Tensor]:
    """Zero inputs of a signature for `tokens` new tokens and a cache of `length` positions."""
    c = weights.config
    shape = (1, c.num_kv_heads, length, c.head_dim)
    names = [f"kv_cache_{part}_{i}" for part in "kv" for i in range(c.num_layers)]
    return {
        "tokens": torch.zeros(1, tokens, dtype=torch.int32),
        "input_pos": torch.arange(tokens, dtype=torch.int32),
        "mask": torch.zeros(1, 1, tokens, length),
    } | {name: torch.zeros(shape) for name in names}


def export_tflite(
    weights: Weights, path: str | Path, context: int, prefill: Sequence[int] = (16, 128), *, dense: bool = False
) -> None:
    """Write the model with signatures `decode` and `prefill_<n>` for a context of `context` tokens.

    `dense` computes all experts on all tokens, which only serves to measure what sparsity is worth.
    """
    limit = weights.config.max_position_embeddings
    if not 0 < context <= limit:
        raise UserError(f"context {context} is not within 1 and the model's {limit} positions")
    if not prefill or min(prefill) < 1 or max(prefill) > context:
        raise UserError(f"prefill lengths {tuple(prefill)} must lie between 1 and context {context}")
    length = cache_length(context, prefill)
    with tempfile.TemporaryDirectory() as folder:
        skeleton = Path(folder, "skeleton.tflite")
        skeleton.write_bytes(_skeleton(weights, sorted(set(prefill)), length))
        model = Model.read(skeleton)
        _Surgeon(model, weights, dense).run()
        model.sweep()
        model.write(path)


def _skeleton(weights: Weights, prefill: Sequence[int], length: int) -> bytes:
    litert_torch.config.show_progress = False
    model = MobileMoE(weights, markers.Markers(weights.config), length)
    calls = [(f"prefill_{n}", n, False) for n in prefill] + [("decode", 1, True)]
    converter = litert_torch.Converter()
    for name, tokens, logits in calls:
        inputs = sample_inputs(weights, tokens, length)
        converter.signature(name, Step(model, logits).eval(), sample_kwargs=inputs)
    with jax.enable_x64(True):  # as litert_torch sets it for itself, and markers.py takes back
        return cast(Any, converter.convert()).model_content()


class _Surgeon:
    """Replaces markers; a weight is stored once however many graphs use it."""

    def __init__(self, model: Model, weights: Weights, dense: bool):
        self.model, self.weights = model, weights
        self._form = DenseExperts if dense else Experts
        self._stored: dict[tuple[str, ...], Stored] = {}
        self._experts: dict[str, Experts | DenseExperts] = {}

    def run(self) -> None:
        """Replace every marker of every signature."""
        for graph in list(self.model.graphs):  # expansion appends the experts' graphs
            self._each(graph, markers.LINEAR, self._linear)
            self._each(graph, markers.EMBEDDING, self._embedding)
            self._each(graph, markers.EXPERTS, self._expand)

    def _each(self, graph: Graph, code: str, put: Callable[..., Any]) -> None:
        for op in graph.custom_ops(code):
            names = tuple(json.loads(bytes(op.customOptions))["names"])
            with graph.replace(op):
                put(graph, names, [int(i) for i in op.inputs], int(op.outputs[0]))

    def _linear(self, graph: Graph, names: tuple[str, ...], inputs: list[int], out: int) -> None:
        graph.fully_connected(inputs[0], self._weight(graph, names), out)

    def _embedding(self, graph: Graph, names: tuple[str, ...], inputs: list[int], out: int) -> None:
        graph.embedding_lookup(inputs[0], self._weight(graph, names), out)

    def _expand(self, graph: Graph, names: tuple[str, ...], inputs: list[int], out: int) -> None:
        (name,) = names
        if name not in self._experts:
            gate_up, down = (self.weights.int4(f"{name}.{p}_proj") for p in ("gate_up", "down"))
            activation = self.weights.config.activation
            self._experts[name] = self._form(self.model, gate_up, down, activation, name)
        experts, (h, ids, mix) = self._experts[name], inputs
        if isinstance(experts, Experts):
            expand(graph, experts, h, ids, mix, out)
        else:
            experts.expand(graph, h, ids, mix, out)

    def _weight(self, graph: Graph, names: tuple[str, ...]) -> int:
        if names not in self._stored:
            self._stored[names] = self.model.store(self.weights.fused(names))
        return graph.int4(self._stored[names], _FUSED.join(names))
