"""From weights to a .tflite: litert-torch lowers one layer of a call, which is stamped once for every layer.

What is lowered holds markers and takes norms and bias as inputs, so the converter's time and memory grow with
neither layers nor experts; stamping puts in the ops of INT4 work and the floats. Codes and scales of the
checkpoint go straight into the file, one tensor at a time, and are never seen as floats.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import litert_torch
import torch
from torch import Tensor

from conversion.litert.content import Content
from conversion.litert.flatbuffer import Graph, Kind, Model, text_of
from conversion.litert.forms import FORMS, Stock
from conversion.torch_model import Decoder, StaticCache
from conversion.weights import Weights
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError

_FIRST = "model.layers.0."  # the layer that stands for all
_NORM = "model.norm.weight"


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
        cos, sin, mask, start = (given.pop(name) for name in ("cos", "sin", "mask", "start"))
        self._given, cache = given, StaticCache([k], [v], start)
        return {"x": self.layer(0, x, cos, sin, mask, cache), "k": cache.k[0], "v": cache.v[0]}


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

    `experts` is one of `conversion.litert.FORMS`: sparse runs the chosen ones with stock ops, kernel with those
    of `conversion.kernel`; dense computes all on all tokens, which only serves to measure what sparsity is worth.
    """
    if not prefill or min(prefill) < 1 or max(prefill) > context:
        raise UserError(f"prefill lengths {tuple(prefill)} must lie between 1 and context {context}")
    length = cache_length(context, prefill)
    calls = {f"prefill_{n}": n for n in sorted(set(prefill))} | {"decode": 1}
    form = FORMS[experts]
    stamp = _Stamp(weights, _lowered(weights, calls, length, form), form, say)
    # Before all branches, and the call that is made for each token first: LiteRT's GetTensorIdentifier looks for
    # each input and output in all subgraphs in turn, which after 4,400 of them took 2.3 ms of a token of size S.
    graphs = {name: stamp.model.graph(name) for name in reversed(calls)}
    for name, tokens in calls.items():
        stamp.signature(graphs[name], inputs(weights.config, tokens, length))
    stamp.model.write(path)


def _lowered(weights: Weights, calls: Mapping[str, int], length: int, form: type[Stock]) -> Model:
    """A file with signatures `<call>/embed`, `<call>/layer` and, for decode, `decode/head`."""
    litert_torch.config.show_progress = False
    c, ops, converter = weights.config, form.markers(weights.config), litert_torch.Converter()
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


class _Stamp:
    """Puts parts together to the graphs of signatures; a weight is stored once however many graphs use it."""

    def __init__(self, weights: Weights, parts: Model, form: type[Stock], say: Callable[[str], object]):
        self.model, self.weights = Model(), weights
        self._form = form(Content(weights, self.model, say))
        self._parts = {text_of(s.signatureKey): (parts.graphs[s.subgraphIndex], s) for s in parts.t.signatureDefs}

    def signature(self, g: Graph, kinds: Mapping[str, Kind]) -> None:
        """Fill the graph of one call."""
        call, c = g.t.name, self.weights.config
        given = {name: g.input(*kind, name) for name, kind in kinds.items()}
        state = self._put(g, f"{call}/embed", "", given) | {"mask": given["mask"]}
        self._form.begin(g, given["input_pos"], g.shape(given["mask"])[3], call)
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
        known = {m.tensorIndex: given[text_of(m.name)] for m in signature.inputs}
        outputs = {text_of(m.name): m.tensorIndex for m in signature.outputs}
        outputs = {n: outputs[n] for n in wanted or outputs}
        needed, ops = set(outputs.values()), []
        for op in reversed(part.ops):
            if needed & {int(i) for i in op.outputs}:
                needed |= {int(i) for i in op.inputs}
                ops.append(op)
        for op in reversed(ops):
            code = text_of(part.model.t.operatorCodes[op.opcodeIndex].customCode)
            if code is None:
                g.copy(op, part, known, label)
                continue
            options = json.loads(bytes(op.customOptions))
            options["names"] = names = tuple(_at(name, layer) for name in options["names"])
            own = "/".join((label, *(name.removeprefix(_at(_FIRST, layer)) for name in names[:1])))
            outs = [int(i) for i in op.outputs]
            known |= {int(i): g.const(part.array(i)) for i in op.inputs if int(i) not in known}  # constants
            known |= {out: g.tensor(*part.like(out), name=own) for out in outs}
            self._form.expand(g, code, options, [known[int(i)] for i in op.inputs], [known[out] for out in outs])
        return {n: known[i] for n, i in outputs.items()}


def _at(name: str, layer: int) -> str:
    """A name of the first layer's, in another layer."""
    return name.replace(_FIRST, f"model.layers.{layer}.", 1)
