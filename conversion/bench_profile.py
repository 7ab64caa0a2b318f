"""Where the time of a call goes: by part of the model, by kind of op and by layer, as a table and as a picture.

LiteRT times each op, in whole microseconds, and slows down by noting memory besides. So ops are taken from its
record and the whole from calls without one; what is left over are the branches between experts and all that is too
short to be seen. An op is put down to a layer by the INT4 product before it, whose order follows from the graph.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from conversion.bench_process import Texts
from conversion.bench_runtime import Event, Runtime
from conversion.kernel import EMBEDDING, NAMES
from conversion.litert.container import entries, intact
from conversion.readback import kernel_weights, sections
from moe_jax.errors import UserError
from moe_jax.files import write_bytes

REST = "branches and ops below 1 us"
_COLOURS = {
    "attention": "#2858b8", "experts": "#d1570a", "shared expert": "#e8a15c", "router": "#8a4fb0",
    "embedding": "#7a8594", "head": "#1f7a4d", REST: "#c9c5ba",
}  # fmt: skip
_PARTS = {"self_attn": "attention", "router": "router", "experts": "experts", "shared_expert": "shared expert"}
_PARTS |= {"feed_forward": "shared expert"}  # of a dense model, which has nothing else
_LAYER = re.compile(r"layers\.(\d+)\.")
_NODE, _DELEGATED = 2, (4, 8)
Spot = tuple[int, str]  # layer (-1: none) and part
Walk = list[tuple[Spot, Event]]


def profile(
    bundle: str | Path,
    *,
    context: int = 256,
    threads: int = 1,
    calls: int = 20,
    text: str = "stdlib:heldout",
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """{"decode", "prefill_<n>" for each length that fits: {ms, calls, parts, ops, layers}}, all in ms of one call.

    `decode` is the median of `calls` tokens of real text after `context` of it. `parts` {part: ms}, `ops` {op:
    [ms, times it ran]}, `layers` [{part: ms}]; REST is what the ops leave of `ms`. UserError for unreadable files.
    """
    parts = sections(bundle)
    limit = parts.metadata.max_num_tokens
    if context + 2 * calls + 2 > limit:
        raise UserError(f"{context} + {2 * calls} tokens exceed the bundle's context of {limit}; lower --contexts")
    texts, result = Texts(text, parts.tokenizer), {}
    with tempfile.TemporaryDirectory() as folder:
        say(f"loading {bundle}")
        with intact(bundle):
            runtime, spots = Runtime(parts.tflite, threads, Path(folder, "weights")), _Spots(parts.tflite)
        for length in runtime.lengths[::-1]:
            if length <= limit:
                say(f"prefill of {length} tokens")
                prompts = [p["ids"] for p in texts.prompts(length, 6)]
                result[f"prefill_{length}"] = _profile(runtime, spots, prompts, runtime.prefill, 0)
        say(f"decode at {context}")
        runtime.tokens = 0
        for piece in texts.way(0, context):
            runtime.prefill(piece["ids"])
        ids = texts.pieces(2 * calls + 2, 1)[0]["ids"]
        result["decode"] = _profile(runtime, spots, ids, runtime.decode, None)
    return result | {"context": context, "threads": threads}


def _profile(runtime: Runtime, spots: _Spots, inputs: Sequence[Any], call: Callable, start: int | None) -> Any:
    """One half of the inputs, except the first, is timed from outside, the other one op by op."""
    half = len(inputs) // 2

    def run(given: Any) -> float:
        if start is not None:
            runtime.tokens = start
        begun = time.perf_counter()
        call(given)
        return time.perf_counter() - begun

    run(inputs[0])
    whole = median(run(given) for given in inputs[1 : half + 1]) * 1e3
    walks = []
    for given in inputs[half + 1 :]:
        with runtime.profiled() as record:
            run(given)
        walks.append(spots.walk(record))
    found: dict[Spot, float] = defaultdict(float)
    ops: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for (spot, name), (ms, times) in _typical(walks).items():
        found[spot] += ms
        ops[name][0] += ms
        ops[name][1] += times
    parts: dict[str, float] = defaultdict(float)
    for (_, part), ms in found.items():
        parts[part] += ms
    parts[REST] = max(whole - sum(parts.values()), 0)
    layers = range(max((layer for layer, _ in found), default=-1) + 1)
    return {
        "ms": whole,
        "parts": _largest_first(parts, lambda ms: ms),
        "ops": _largest_first(ops, lambda op: op[0]),
        "layers": [{p: ms for (at, p), ms in sorted(found.items()) if at == layer} for layer in layers],
    }


def _largest_first(values: dict[str, Any], key: Callable[[Any], float]) -> dict[str, Any]:
    return dict(sorted(values.items(), key=lambda pair: -key(pair[1])))


def _typical(walks: Sequence[Walk]) -> dict[tuple[Spot, str], tuple[float, float]]:
    """ms, and times it ran, of each op in each place: medians, so that a disturbed call does not count."""
    sums: list[dict[tuple[Spot, str], list[int]]] = []
    for walk in walks:
        sums.append(defaultdict(lambda: [0, 0]))
        for spot, event in walk:
            sums[-1][spot, event.name][0] += event.microseconds
            sums[-1][spot, event.name][1] += 1
    keys = {key: None for each in sums for key in each}
    series = {key: [each.get(key, [0, 0]) for each in sums] for key in keys}
    return {key: (median(t for t, _ in s) / 1e3, sum(n for _, n in s) / len(s)) for key, s in series.items()}


class _Spots:
    """Which layer and part an event belongs to."""

    def __init__(self, tflite: memoryview) -> None:
        model: Any = schema.Model.GetRootAs(tflite, 0)
        graphs = entries(model, "Subgraphs")
        self._inside = {i: spot for i, g in enumerate(graphs) if (spot := _spot((g.Name() or b"").decode()))}
        mains = {signature.SubgraphIndex() for signature in entries(model, "SignatureDefs")}
        self._products = {main: _products(model, graphs[main]) for main in mains}

    def walk(self, record: Sequence[Event]) -> Walk:
        """The events of ops with their places, those of the branches' own nodes left out."""
        main = next(e.graph for e in record if e.name == "Invoke")
        products, spot = iter(self._products.get(main, ())), (-1, "embedding")
        walked: Walk = []
        open_from = 0  # since the last product or node of the main graph: norms belong to what comes next
        for event in record:
            if event.kind == _NODE and (event.graph != main or event.name in ("IF", "WHILE")):
                if event.graph != main and event.name not in ("IF", "WHILE"):
                    walked.append((self._inside.get(event.graph, spot), event))
            elif event.kind == _NODE:
                known = event.name in NAMES
                spot = next(products, spot) if known else _builtin(spot, event.name)
                if known:
                    walked[open_from:] = [(spot, e) for _, e in walked[open_from:]]
                walked.append((spot, event))
                open_from = len(walked)
            elif event.kind in _DELEGATED and event.graph != main:
                walked.append((self._inside.get(event.graph, spot), event))
                open_from = len(walked)
            elif event.kind in _DELEGATED:
                walked.append((spot, event))
                if "QB4W" in event.name:
                    spot = next(products, spot)
                    walked[open_from:] = [(spot, e) for _, e in walked[open_from:]]
                    open_from = len(walked)
        return walked


def _products(model: Any, graph: Any) -> list[Spot]:
    """Place of each INT4 product and each op of the kernel, in order; each needs the one before it."""
    spots: list[Spot] = []
    for op in entries(graph, "Operators"):
        code = model.OperatorCodes(op.OpcodeIndex())
        weights = [tensor for tensor, _ in kernel_weights(model, graph, op)]
        if code.BuiltinCode() == schema.BuiltinOperator.FULLY_CONNECTED:
            weights = [w for w in (graph.Tensors(op.Inputs(1)),) if w.Type() == schema.TensorType.INT4]
        if weights:
            outside = -1, "embedding" if code.CustomCode() == EMBEDDING.encode() else "head"
            spots.append(_spot(weights[0].Name().decode()) or outside)
    return spots


def _spot(name: str) -> Spot | None:
    if not (layer := _LAYER.search(name)):
        return None
    part = next((part for word, part in _PARTS.items() if f".{word}" in name), "router")
    return int(layer[1]), part


def _builtin(before: Spot, name: str) -> Spot:
    """Ops that no delegate takes: writes to the cache belong to attention, the rest of a layer to routing."""
    layer, part = before
    if part == "embedding" or name == "DYNAMIC_UPDATE_SLICE":
        return before
    return layer, "router"


def table(result: dict[str, Any], most: int = 12) -> str:
    """Parts and the `most` expensive ops of each call."""
    lines = []
    for call, found in result.items():
        if not isinstance(found, dict):
            continue
        took = sum(found["parts"].values())
        slower = f"; noted op by op {took:.3f} ms, of which the shares are" if took > 1.01 * found["ms"] else ""
        lines.append(f"{call}: {found['ms']:.3f} ms{slower}")
        rows = [(part, ms, "") for part, ms in found["parts"].items()]
        rows += [(f"  {op}", ms, f"{times:8.0f}x") for op, (ms, times) in list(found["ops"].items())[:most]]
        lines += [f"  {name:48.48}{ms:9.3f} ms {ms / took:6.1%}{times}" for name, ms, times in rows]
    return "\n".join(lines)


def draw(result: dict[str, Any], path: str | Path) -> None:
    """Write the layers of each call as bars of its parts, an SVG that needs nothing else."""
    parts, y, wide, left = [], 24, 560, 70
    for call, found in result.items():
        if not isinstance(found, dict):
            continue
        rows = [(f"layer {i}", layer) for i, layer in enumerate(found["layers"])]
        outside = {p: v for p, v in found["parts"].items() if p in ("embedding", "head", REST)}
        rows.append(("all others", outside))
        scale = wide / max(sum(row.values()) for _, row in rows)
        parts.append(f'<text x="0" y="{y}" class="h">{call}: {found["ms"]:.2f} ms</text>')
        for name, row in rows:
            y, x = y + 16, float(left)
            parts.append(f'<text x="0" y="{y + 10}">{name}</text>')
            for part, ms in row.items():
                title = f"<title>{name}, {escape(part)}: {ms:.3f} ms</title>"
                size = f'x="{x:.1f}" y="{y}" width="{ms * scale:.1f}" height="13"'
                parts.append(f'<rect {size} fill="{_COLOURS[part]}">{title}</rect>')
                x += ms * scale
            parts.append(f'<text x="{x + 4:.1f}" y="{y + 10}">{sum(row.values()):.2f}</text>')
        y += 40
    x = 0
    for part, colour in _COLOURS.items():
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y + 10}">{escape(part)}</text>')
        x += 30 + 6 * len(part)
    style = "text{font:11px sans-serif;fill:#444}.h{font-weight:bold}"
    size = f'width="{left + wide + 50}" height="{y + 24}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{ground}'
    write_bytes(path, (head + "".join(parts) + "</svg>\n").encode())
