"""From weights to a .tflite: litert-torch lowers one layer of a call, which is stamped once for every layer.

What is lowered holds markers and takes norms and bias as inputs, so the converter's time and memory grow with
neither layers nor experts; stamping puts in the ops of INT4 work and the floats. Codes and scales of the
checkpoint go straight into the file, one tensor at a time, and are never seen as floats.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import litert_torch
import numpy as np
import torch
from torch import Tensor

from conversion.litert import kernel_op, markers
from conversion.litert.attention import Attention
from conversion.litert.dense import DenseExperts
from conversion.litert.experts import Experts, expand
from conversion.litert.flatbuffer import Graph, Kind, Model, Read, Stored
from conversion.torch_model import Decoder, StaticCache
from conversion.weights import Weights
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError

_FUSED = "+"  # between the names of weights whose rows are one tensor of the file
_FIRST = "model.layers.0."  # the layer that stands for all
_NORM = "model.norm.weight"
_AROUND = ("cos", "sin", "mask", "start")  # what every layer is given
_SILENCE = 3.0  # seconds between two words on the progress


class _Part(Decoder):
    """Stages of the model whose floats are inputs, by the names that `_input` gives them."""

    _given: Mapping[str, Tensor]
    forward: Callable[..., Any]  # each its own

    def _float(self, name: str) -> Tensor:
        return self._given[_input(name)]


class _Embed(_Part):
    def forward(self, tokens: Tensor, input_pos: Tensor) -> dict[str, Tensor]:
        x, cos, sin = self.embed(tokens, input_pos)
        return {"x": x, "cos": cos, "sin": sin, "start": StaticCache.start_of(input_pos)}


class _Layer(_Part):
    def forward(self, x: Tensor, k: Tensor, v: Tensor, **given: Tensor) -> dict[str, Tensor]:
        cos, sin, mask, start = (given.pop(name) for name in _AROUND)
        self._given, cache = given, StaticCache([k], [v], start)
        return {"x": self.layer(0, x, (cos, sin, mask), cache), "k": cache.k[0], "v": cache.v[0]}


class _Head(_Part):
    def forward(self, x: Tensor, **given: Tensor) -> dict[str, Tensor]:
        self._given = given
        return {"logits": self.head(self.final(x[:, -1:]))}


def _input(name: str) -> str:
    """How a float of the first layer is called among the inputs of the lowered one."""
    return name.removeprefix(_FIRST).replace(".", "_")


def cache_length(context: int, prefill: Sequence[int]) -> int:
    """Positions of the cache for a context: room for the padding of a last, partly filled prefill call.

    DYNAMIC_UPDATE_SLICE moves a slice that would reach past the end back, over positions that are in use. The
    length is never prime: LiteRT-LM takes a prime cache for a placeholder and resizes the model.
    """
    return -(-(context + max(prefill) - 1) // 32) * 32


def inputs(config: ModelConfig, tokens: int, length: int) -> dict[str, Kind]:
    """Shape and type of a signature's inputs for `tokens` new tokens and a cache of `length` positions."""
    cache = (1, config.num_kv_heads, length, config.head_dim), "float32"
    names = [f"kv_cache_{part}_{i}" for part in "kv" for i in range(config.num_layers)]
    mask = (1, 1, tokens, length), "float32"
    known: dict[str, Kind] = {"tokens": ((1, tokens), "int32"), "input_pos": ((tokens,), "int32"), "mask": mask}
    return known | dict.fromkeys(names, cache)


def export_tflite(
    weights: Weights,
    path: str | Path,
    context: int,
    prefill: Sequence[int],
    *,
    experts: str = "sparse",
    say: Callable[[str], object] = lambda _: None,
) -> None:
    """Write the model with signatures `decode` and `prefill_<n>` for a context of `context` tokens.

    `experts` is one of `conversion.litert.FORMS`: sparse runs the chosen ones with stock ops, kernel with the op of
    `conversion.kernel`; dense computes all on all tokens, which only serves to measure what sparsity is worth.
    """
    limit = weights.config.max_position_embeddings
    if not 0 < context <= limit:
        raise UserError(f"context {context} is not within 1 and the model's {limit} positions")
    if not prefill or min(prefill) < 1 or max(prefill) > context:
        raise UserError(f"prefill lengths {tuple(prefill)} must lie between 1 and context {context}")
    length = cache_length(context, prefill)
    calls = {f"prefill_{n}": n for n in sorted(set(prefill))} | {"decode": 1}
    stamp = _Stamp(weights, _lowered(weights, calls, length), experts, say)
    for name, tokens in calls.items():
        stamp.signature(name, inputs(weights.config, tokens, length))
    stamp.model.write(path)


def _lowered(weights: Weights, calls: Mapping[str, int], length: int) -> Model:
    """A file with signatures `<call>/embed`, `<call>/layer` and, for decode, `decode/head`."""
    litert_torch.config.show_progress = False
    c, ops, converter = weights.config, markers.Markers(weights.config), litert_torch.Converter()
    floats = {_input(n): torch.from_numpy(weights.float(n)) for n in _floats(weights, 0)}
    for call, tokens in calls.items():
        kinds = inputs(c, tokens, length)
        embed = _Embed(c, ops, length).eval()
        start = {name: _zeros(kinds[name]) for name in ("tokens", "input_pos")}
        converter.signature(f"{call}/embed", embed, sample_kwargs=start)
        given = {"x": torch.zeros(1, tokens, c.d_model), "start": torch.zeros(4, dtype=torch.int32)}
        given |= {name: _zeros(kinds[f"kv_cache_{name}_0"]) for name in "kv"}
        given |= {name: torch.zeros(tokens, 1, c.head_dim) for name in ("cos", "sin")}
        given |= {"mask": _zeros(kinds["mask"])} | floats
        converter.signature(f"{call}/layer", _Layer(c, ops, 1).eval(), sample_kwargs=given)
    head = {"x": torch.zeros(1, 1, c.d_model), _input(_NORM): torch.zeros(c.d_model)}
    converter.signature("decode/head", _Head(c, ops, 1).eval(), sample_kwargs=head)
    with jax.enable_x64(True):  # as litert_torch sets it for itself, and markers.py takes back
        content = cast(Any, converter.convert()).model_content()
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        file.write(content)
        file.flush()
        return Model.read(file.name)


def _zeros(kind: Kind) -> Tensor:
    return torch.zeros(tuple(kind[0]), dtype=getattr(torch, kind[1]))


def _floats(weights: Weights, layer: int) -> list[str]:
    """Norms and bias of a layer; the router is the weight of a marker."""
    int4, prefix = set(weights.int4_names()), f"model.layers.{layer}."
    names = [name for name in weights.names() if name.startswith(prefix) and name not in int4]
    return [name for name in names if not name.endswith("router.weight")]


_Experts = Experts | DenseExperts | kernel_op.KernelExperts


class _Stamp:
    """Puts parts together to the graphs of signatures; a weight is stored once however many graphs use it."""

    def __init__(self, weights: Weights, parts: Model, form: str, say: Callable[[str], object]):
        self.model, self.weights, self._say = Model(), weights, say
        self._form = form
        self._int4 = set(weights.int4_names())
        self._stored: dict[tuple[str, ...], Stored] = {}
        self._experts: dict[str, _Experts] = {}
        self._parts = {_text(s.signatureKey): (parts.graphs[s.subgraphIndex], s) for s in parts.t.signatureDefs}
        self._bytes, self._done, self._begun, self._said = 0, 0, 0.0, 0.0

    def signature(self, call: str, kinds: Mapping[str, Kind]) -> None:
        """Append the graph of one call."""
        g, c = self.model.graph(call), self.weights.config
        given = {name: g.input(*kind, name) for name, kind in kinds.items()}
        state = self._put(g, f"{call}/embed", "", given) | {"mask": given["mask"]}
        self._attention = Attention(g, given["input_pos"], call)
        x, outputs = state.pop("x"), {}
        for layer in range(c.num_layers):
            names = {"x": x} | {part: given[f"kv_cache_{part}_{layer}"] for part in "kv"}
            names |= {_input(n): g.const(self.weights.float(_at(n, layer))) for n in _floats(self.weights, 0)}
            # A prefill has no use for what the last layer makes of its keys and values.
            wanted = ("k", "v") if layer + 1 == c.num_layers and call != "decode" else ("x", "k", "v")
            made = self._put(g, f"{call}/layer", f"layer_{layer}", state | names, wanted, layer)
            outputs |= {f"kv_cache_{part}_{layer}": made[part] for part in "kv"}
            x = made.get("x", x)
        if call == "decode":
            norm = g.const(self.weights.float(_NORM))
            outputs |= self._put(g, "decode/head", "head", {"x": x, _input(_NORM): norm})
        g.outputs = list(outputs.values())
        self.model.signature(call, g, given, outputs)

    def _put(
        self,
        g: Graph,
        name: str,
        label: str,
        given: Mapping[str, int],
        wanted: Sequence[str] | None = None,
        layer: int = 0,
    ) -> dict[str, int]:
        """Append what of a part leads to `wanted`, by default to all its outputs: their tensors by name."""
        part, signature = self._parts[name]
        known = {m.tensorIndex: given[_text(m.name)] for m in signature.inputs}
        outputs = {_text(m.name): m.tensorIndex for m in signature.outputs}
        outputs = {n: outputs[n] for n in wanted or outputs}
        needed, ops = set(outputs.values()), []
        for op in reversed(part.ops):
            if needed & {int(i) for i in op.outputs}:
                needed |= {int(i) for i in op.inputs}
                ops.append(op)
        for op in reversed(ops):
            code = _text(part.model.t.operatorCodes[op.opcodeIndex].customCode)
            if code is None:
                g.copy(op, part, known, label)
                continue
            names = tuple(_at(n, layer) for n in json.loads(bytes(op.customOptions))["names"])
            out = int(op.outputs[0])
            known[out] = g.tensor(*part.like(out), name=f"{label}/{names[0].removeprefix(_at(_FIRST, layer))}")
            self._expand(g, code, names, [known[int(i)] for i in op.inputs], known[out])
        return {n: known[i] for n, i in outputs.items()}

    def _expand(self, g: Graph, code: str, names: tuple[str, ...], inputs: list[int], out: int) -> None:
        """Put the ops of a marker in its place."""
        if code == markers.LINEAR:
            g.fully_connected(inputs[0], self._weight(g, names), out)
        elif code == markers.EMBEDDING:
            g.embedding_lookup(inputs[0], self._weight(g, names), out)
        elif code == markers.ATTENTION:
            self._attention.expand(inputs, out)
        else:
            (name,), (h, ids, mix) = names, inputs
            experts = self._experts.get(name) or self._experts.setdefault(name, self._bank(name))
            if isinstance(experts, Experts):
                expand(g, experts, h, ids, mix, out)
            else:
                experts.expand(g, h, ids, mix, out)

    def _bank(self, name: str) -> _Experts:
        gate_up, down, activation = f"{name}.gate_up_proj", f"{name}.down_proj", self.weights.config.activation
        if self._form == "dense":
            return DenseExperts(self.model, self.weights.int4(gate_up), self.weights.int4(down), activation, name)
        int4, (count, width, inner) = self.weights.int4, self.weights.shape(down)
        if self._form == "kernel":
            size = count * kernel_op.expert_bytes(width, inner)
            self._bytes += size
            buffer = self.model.later(size, lambda: self._counted(kernel_op.pack(int4(gate_up), int4(down))))
            return kernel_op.KernelExperts(buffer, (count, width, inner), activation, name)
        # An expert's two matrices one after the other, so that they lie side by side in the file.
        pairs = [(self._store((gate_up,), e), self._store((down,), e)) for e in range(count)]
        first, second = (list(bank) for bank in zip(*pairs, strict=True))
        return Experts(self.model, first, second, activation, name)

    def _weight(self, g: Graph, names: tuple[str, ...]) -> int:
        label = _FUSED.join(names)
        if names[0] not in self._int4:
            return g.const(self.weights.float(names[0]), label)
        if names not in self._stored:
            self._stored[names] = self._store(names)
        return g.int4(self._stored[names], label)

    def _store(self, names: tuple[str, ...], expert: int | None = None) -> Stored:
        """Rows of all `names`, or the matrix of one expert: read when the file is written."""
        shapes = [self.weights.shape(name)[-2:] for name in names]

        def read(get: Callable[[str], np.ndarray]) -> np.ndarray:
            parts = [get(name) if expert is None else get(name)[expert] for name in names]
            return self._counted(parts[0] if len(parts) == 1 else np.concatenate(parts))

        shape = sum(rows for rows, _ in shapes), shapes[0][1]
        self._bytes += int(shape[0] * shape[1] * (0.5 + 2 / self.weights.group))
        reads: list[Read] = [partial(read, get) for get in (self.weights.packed, self.weights.scales)]
        return self.model.store_later(shape, self.weights.group, *reads)

    def _counted(self, content: np.ndarray) -> np.ndarray:
        now = time.monotonic()
        self._begun, self._said = self._begun or now, self._said or now
        if self._done and now - self._said > _SILENCE:
            left = (now - self._begun) * (self._bytes / self._done - 1)
            self._say(f"weights written: {100 * self._done // self._bytes} %, {left:.0f} s left")
            self._said = now
        self._done += content.nbytes
        return content


def _at(name: str, layer: int) -> str:
    """A name of the first layer's, in another layer."""
    return name.replace(_FIRST, f"model.layers.{layer}.", 1)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
