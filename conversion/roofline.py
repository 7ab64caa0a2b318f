"""How fast a phone runs a model, from the bytes and products of a token, checked against published figures.

    seconds of a token written  = bytes of weights / rate + attention's products at the context / rate
    seconds of a prompt read    = products with weights / rate + attention's products / rate

The four rates are those that a phone's published figures of the *dense* model imply; a phone without any gets the
mean of their shares of bandwidth and peak. What is then published of the sparse models checks the law: it reads low
where a model's experts cost more than their bytes and products, and those of MobileMoE do.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from conversion.phones import PHONES, Phone, find
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from moe_jax.flops import deployed_bytes
from moe_jax.model.describe import describe

CONTEXTS, PROMPTS = (256, 1024, 4096, 8192), (512, 1024, 4096)
_TWIN = "dense_twin"
LoadModel = Callable[[str], ModelConfig]


class Work(NamedTuple):
    """Of one token: bytes of weights, INT8 products while reading (no head), attention's products per position."""

    bytes: float
    products: float
    attention: float


class Rates(NamedTuple):
    """Bytes/s and attention's products/s while writing, both kinds of products/s while reading."""

    stream: float
    looks: float
    products: float
    attention: float


def work(config: ModelConfig) -> Work:
    """What a token costs; of the routed experts only the chosen ones count."""
    products = 0.0
    for path, leaf in describe(config).items():
        size = math.prod(leaf.shape)
        if config.moe and "expert" in leaf.axes:
            size *= config.moe.num_experts_per_tok / config.moe.num_experts
        products += 0 if leaf.quant_axis is None or path.startswith("embed") else size
    looks = 2.0 * config.num_layers * config.num_heads * config.head_dim
    return Work(deployed_bytes(config).active, products, looks)


def rates(phone: Phone, load: LoadModel) -> Rates:
    """The rates of a phone, from its own figures of the dense model or by the shares that others reach."""
    if _TWIN in phone.measured:
        return _fitted(phone, work(load(_TWIN)))
    known = [(other, _fitted(other, work(load(_TWIN)))) for other in PHONES if _TWIN in other.measured]
    wide, fast = phone.bandwidth * 1e9, phone.peak
    return Rates(
        wide * mean(r.stream / o.bandwidth / 1e9 for o, r in known),
        *(fast * mean(getattr(r, name) / o.peak for o, r in known) for name in Rates._fields[1:]),
    )


def _fitted(phone: Phone, twin: Work) -> Rates:
    found = phone.measured[_TWIN]
    contexts, prompts = list(found.decode), list(found.first_token)
    weights, look = _line(contexts, [1 / v for v in found.decode.values()])
    per_token, square = _line(prompts, [s / n for n, s in found.first_token.items()])
    return Rates(twin.bytes / weights, twin.attention / look, twin.products / per_token, twin.attention / square)


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Of the straight line with the least relative error: value at 0, slope."""
    points = np.array([np.ones(len(x)), x]).T / np.array(y)[:, None]
    start, slope = np.linalg.lstsq(points, np.ones(len(x)), rcond=None)[0]
    return float(start), float(slope)


def decode(cost: Work, rate: Rates, context: int) -> float:
    """Tokens/s written at a context."""
    return 1 / (cost.bytes / rate.stream + cost.attention * context / rate.looks)


def first_token(cost: Work, rate: Rates, tokens: int) -> float:
    """Seconds to read a prompt."""
    return tokens * (cost.products / rate.products + cost.attention * tokens / rate.attention)


def roofline(file: str | Path, phone: str, load: LoadModel) -> dict[str, Any]:
    """Predict a .litertlm, or a model that `load` finds by name, on a phone; every table keyed by length.

    `decode_tok_s`, `prefill_tok_s`, `first_token_s`, what a token touches, and `check`: for each published model on
    each phone, measured over predicted speed. Raises UserError for unknown phones, files and names.
    """
    target = find(phone)
    config = config_of(file) if str(file).endswith(".litertlm") else load(str(file))
    cost, rate = work(config), rates(target, load)
    contexts = [n for n in CONTEXTS if n <= config.max_position_embeddings] or [config.max_position_embeddings]
    prompts = [n for n in PROMPTS if n <= config.max_position_embeddings] or contexts
    waits = {n: first_token(cost, rate, n) for n in prompts}
    return {
        "file": str(file),
        "phone": target.name,
        "memory_gb": target.memory,
        "gb_per_token": cost.bytes / 1e9,
        "products_per_token": cost.products,
        "rates": {"stream_gb_s": rate.stream / 1e9}
        | {f"{name}_g_s": getattr(rate, name) / 1e9 for name in Rates._fields[1:]},
        "decode_tok_s": {n: decode(cost, rate, n) for n in contexts},
        "prefill_tok_s": {n: n / wait for n, wait in waits.items()},
        "first_token_s": waits,
        "check": {p.name: _check(p, rates(p, load), load) for p in PHONES if p.measured},
    }


def _check(phone: Phone, rate: Rates, load: LoadModel) -> dict[str, dict[str, dict[int, float]]]:
    result = {}
    for name, found in phone.measured.items():
        cost = work(load(name))
        result[name] = {
            "decode": {n: v / decode(cost, rate, n) for n, v in found.decode.items()},
            "prefill": {n: first_token(cost, rate, n) / s for n, s in found.first_token.items()},
        }
    return result


def config_of(bundle: str | Path) -> ModelConfig:
    """The shapes of a bundle's model, as far as its decode graph shows them; UserError where all experts run."""
    from ai_edge_litert import schema_py_generated as schema

    from conversion.litert.container import entries, intact
    from conversion.readback import EXPERT, kernel_weights, sections

    parts = sections(bundle)
    with intact(bundle):
        model: Any = schema.Model.GetRootAs(parts.tflite, 0)
        graphs = entries(model, "Subgraphs")
        decodes = (s.SubgraphIndex() for s in entries(model, "SignatureDefs") if s.SignatureKey() == b"decode")
        graph = graphs[next(decodes)]
        shapes = {t.Name().decode(): tuple(map(int, t.ShapeAsNumpy())) for t in entries(graph, "Tensors")}
        choices = width = 0
        for op in entries(graph, "Operators"):
            if model.OperatorCodes(op.OpcodeIndex()).BuiltinCode() == schema.BuiltinOperator.TOPK_V2:
                choices = int(graph.Tensors(op.Outputs(0)).ShapeAsNumpy()[-1])
            for tensor, shape in kernel_weights(model, graph, op):
                if tensor.Name().endswith(b".experts"):
                    (choices,) = struct.unpack_from("<I", bytes(op.CustomOptionsAsNumpy()), 4)
                    width = shape[2]
                else:
                    shapes[tensor.Name().decode()] = shape[-2:]
        inside = (t for g in graphs if EXPERT.fullmatch((g.Name() or b"").decode()) for t in entries(g, "Tensors"))
        width = next((int(t.Shape(1)) for t in inside if t.Name() == b"down"), width)
        rows = [(name, shape) for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2]
        ends = "o_proj", "down_proj", "router.weight"
        out, down, router = (next((shape for name, shape in rows if name.endswith(end)), (0, 0)) for end in ends)
        if choices and not width:  # the form to compare with, whose experts are no longer told apart
            raise UserError(f"{bundle} computes all experts on every token; name the sparse bundle")
        if len({bool(router[0]), bool(choices), bool(width)}) > 1:
            raise ValueError("it shows a part of its experts")
        cache = shapes["kv_cache_k_0"]
        vocab, d_model = shapes["model.embed_tokens"]
        moe = MoEConfig(router[0], choices, width, down[1]) if choices else None
        return ModelConfig(
            num_layers=sum(name.startswith("kv_cache_k_") and name[11:].isdigit() for name in shapes),
            d_model=d_model,
            num_heads=out[1] // cache[-1],
            num_kv_heads=cache[1],
            head_dim=cache[-1],
            vocab_size=vocab,
            ffn_width=down[1] + choices * width,
            max_position_embeddings=parts.metadata.max_num_tokens,
            moe=moe,
        )


def table(result: Mapping[str, Any]) -> str:
    """Predictions, and published over predicted speed of every model on every phone."""
    size, products = result["gb_per_token"], result["products_per_token"] / 1e9
    lines = [
        f"{result['file']} on {result['phone']} ({result['memory_gb']} GB)",
        f"  a token: {size:.3f} GB of weights, {products:.3f} G products",
    ]
    lines += [f"  decode at {n:5} {v:8.1f} tokens/s" for n, v in result["decode_tok_s"].items()]
    for n, v in result["prefill_tok_s"].items():
        lines.append(f"  prefill  {n:6} {v:8.1f} tokens/s, first token after {result['first_token_s'][n]:.2f} s")
    lines.append("published over predicted speed (the law is fitted to dense_twin alone)")
    for phone, models in result["check"].items():
        for model, kinds in models.items():
            cells = [f"{kind} {n}: {v:.2f}" for kind, values in kinds.items() for n, v in values.items()]
            lines.append(f"  {phone:14} {model:12} " + ", ".join(cells))
    return "\n".join(lines)
