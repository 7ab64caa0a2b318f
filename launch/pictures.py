"""The pictures of the demo's report: inline SVG and HTML, coloured by variables that follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 640, 284, 34, 26, 40  # of the loss curves, in drawing units
_LOAD_RANGE = 4.0  # a load this many times the even share, or its inverse, has the full colour

STYLE = """
:root{--bg:#fbfaf7;--ink:#1d1f24;--soft:#62666f;--rule:#dedbd3;--card:#fff;--main:#2858b8;--other:#a9b1bf;
--good:#1f7a4d;--bad:#b3261e;--hot:#d1570a;--cold:#2858b8;--band:#2858b80d}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--ink:#e7e6e2;--soft:#9b9fa8;--rule:#33363d;--card:#1d2025;
--main:#7aa5f5;--other:#575d69;--good:#63c795;--bad:#f2877f;--hot:#f08b45;--cold:#6b9bf2;--band:#7aa5f512}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:780px;margin:0 auto;padding:32px 18px 64px}h1{font-size:1.75rem;line-height:1.2;margin:0 0 .4em;
letter-spacing:-.015em}h2{font-size:1.1rem;margin:0 0 .7em}h3{font-size:.95rem;margin:1em 0 .4em;font-weight:600}
header p,figcaption,small,footer,section p{color:var(--soft);font-size:.9rem}section{margin-top:40px}
.chip{display:inline-block;padding:1px 10px;border-radius:99px;border:1px solid;margin-right:8px;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}
.line{list-style:none;display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:10px 24px;
margin:0;padding:0}
@media(min-width:700px){.line{grid-template-columns:repeat(3,1fr)}}
.line li{position:relative;background:var(--card);border:1px solid var(--rule);
border-radius:8px;padding:9px 11px;display:flex;flex-direction:column;line-height:1.35}
.line li span{font-size:.8rem;color:var(--soft);flex:1}.line small{margin-top:4px}
.line li+li:before{content:"→";position:absolute;left:-19px;top:8px;color:var(--soft)}
.kill{color:var(--bad);margin-left:.4em}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:12.5px;font-family:inherit}
.scroll{overflow-x:auto}.scroll svg{min-width:520px}
.axis{stroke:var(--rule)}.curve{fill:none;stroke:var(--main);stroke-width:1.8;stroke-linejoin:round}
.faint{fill:none;stroke:var(--main);stroke-opacity:.28;stroke-width:1}.band{fill:var(--band)}
.cross{stroke:var(--bad);stroke-width:2}text.name{fill:var(--ink);font-weight:600}
.hot{fill:var(--hot)}.cold{fill:var(--cold)}.cell{fill:var(--card);stroke:none}
figure{margin:14px 0 0}figcaption{margin-top:4px}
.key{white-space:nowrap;margin-right:.8em}
.swatch{display:inline-block;width:1.6em;height:.8em;border-radius:2px;margin:0 .25em;
border:1px solid var(--rule)}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th{text-align:left;color:var(--soft);font-weight:500}td,th{padding:8px 10px 8px 0;border-bottom:1px solid
var(--rule);vertical-align:top}.n{text-align:right;font-variant-numeric:tabular-nums}
td:nth-child(3){white-space:nowrap}td:last-child{font-weight:700;padding-right:0}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:5px 12px;
align-items:center;font-size:.9rem}
.bars i{display:block;height:14px;border-radius:3px;background:var(--other);min-width:2px}
.bars i.own{background:var(--main)}
.bars b{font-weight:500;text-align:right;font-variant-numeric:tabular-nums}
section p.says{color:var(--ink);font-size:1rem;max-width:88%;width:fit-content;padding:9px 14px;border-radius:14px;
margin:0 0 10px;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--rule)}
section p.you{margin-left:auto;background:var(--band)}summary{cursor:pointer}footer{margin-top:40px}
"""


def bars(rows: Iterable[tuple[str, float, bool]], form: str) -> str:
    """Horizontal bars from zero: (name, value, whether it is this project's own)."""
    rows = list(rows)
    top = max((value for _, value, _ in rows), default=0) or 1
    cells = "".join(
        f'<span>{escape(name)}</span><i class="{"own" if own else ""}" style="width:{100 * value / top:.1f}%"></i>'
        f"<b>{form.format(value)}</b>"
        for name, value, own in rows
    )
    return f'<div class="bars">{cells}</div>'


def loss_curves(curves: dict[str, list[dict[str, Any]]], kills: Sequence[int]) -> str:
    """All stages on one axis of trained tokens, a band each, the steps of `sft` at which it was killed marked.

    `curves` holds each stage's step lines (step, loss, tokens). The thin line is the loss of each batch, the thick
    one the mean around it, a red cross a SIGKILL.
    """
    losses = sorted(line["loss"] for lines in curves.values() for line in lines)
    total = sum(line["tokens"] for lines in curves.values() for line in lines) or 1
    low, high = (math.floor(losses[0]), math.ceil(losses[-1])) if losses else (0, 1)
    high = max(high, low + 1)

    def x(tokens: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 4) * tokens / total

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / (high - low)

    parts, done = [], 0.0
    for level in range(low, high + 1):
        parts.append(f'<line class=axis x1={_LEFT} x2={_WIDTH} y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text x={_LEFT - 8} y="{y(level) + 4:.1f}" text-anchor=end>{level}</text>')
    for index, (stage, lines) in enumerate(curves.items()):
        start, points, smooth = done, [], []
        reach = max(1, len(lines) // 40)
        for at, line in enumerate(lines):
            done += line["tokens"]
            near = [n["loss"] for n in lines[max(0, at - reach) : at + reach + 1]]
            points.append((x(done), y(line["loss"])))
            smooth.append((x(done), y(sum(near) / len(near))))
            if stage == "sft" and line["step"] in kills:
                parts.append(_cross(x(done), smooth[-1][1], line["step"]))
        if index % 2 == 0:
            size = f'width="{x(done) - x(start):.1f}" height={_HEIGHT - _TOP - _BOTTOM}'
            parts.append(f'<rect class=band x="{x(start):.1f}" y={_TOP} {size} />')
        parts.append(f'<text class=name x="{(x(start) + x(done)) / 2:.1f}" y=16 text-anchor=middle>{stage}</text>')
        parts += [_curve("faint", points), _curve("curve", smooth)]
    tick = 10 ** math.floor(math.log10(total / 2))
    tick *= next(m for m in (1, 2, 5) if total / (m * tick) <= 8)
    for tokens in range(0, int(total) + 1, max(int(tick), 1)):
        parts.append(f'<text x="{x(tokens):.1f}" y={_HEIGHT - 24} text-anchor=middle>{_short(tokens)}</text>')
    parts.append(f"<text x={_LEFT} y={_HEIGHT - 6}>across: tokens in the loss; up: nats per token</text>")
    return f'<div class="scroll">{_svg(_WIDTH, _HEIGHT, "loss of the four stages", parts)}</div>'


def loss_over_memory(
    lines: Mapping[str, Sequence[tuple[float, float]]], bound: float, best: tuple[float, float]
) -> str:
    """A curve of (bytes, loss) for each name, the later the darker; a bound in bytes, a ring around the best."""
    points = [point for line in lines.values() for point in (*line, best)]
    sizes, losses = ([*values] for values in zip(*points, strict=True))
    left, right = math.log(min(*sizes, bound) * 0.95), math.log(max(*sizes, bound) * 1.05)
    low, high = min(losses), max(losses)

    def x(size: float) -> float:
        return _LEFT + 16 + (_WIDTH - _LEFT - 60) * (math.log(size) - left) / (right - left)

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / ((high - low) or 1)

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y(level := low + share * (high - low))
        parts.append(f'<line class=axis x1={_LEFT + 16} x2={_WIDTH} y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x={_LEFT + 8} y="{at + 4:.1f}" text-anchor=end>{level:.2f}</text>')
    ticks = [m * 10.0**power for power in range(6, 13) for m in (1, 2, 5)]
    for size in (t for t in ticks if left < math.log(t) < right):
        parts.append(f'<text x="{x(size):.1f}" y={_HEIGHT - 24} text-anchor=middle>{size / 1e9:g}</text>')
    parts.append(f'<line class=cross x1="{x(bound):.1f}" x2="{x(bound):.1f}" y1={_TOP} y2={_HEIGHT - _BOTTOM} />')
    for number, (name, line) in enumerate(lines.items(), 1):
        path = " ".join(f"{x(size):.1f},{y(loss):.1f}" for size, loss in line)
        parts.append(f'<polyline class=curve style="stroke-opacity:{number / len(lines):.2f}" points="{path}"/>')
        parts.append(f'<text class=name x="{x(line[-1][0]) + 5:.1f}" y="{y(line[-1][1]) + 4:.1f}">{name}</text>')
    parts.append(f'<circle class=cross fill=none cx="{x(best[0]):.1f}" cy="{y(best[1]):.1f}" r=6 />')
    parts.append(f"<text x={_LEFT + 16} y={_HEIGHT - 6}>across: GB on the phone; up: nats per token</text>")
    return f'<div class="scroll">{_svg(_WIDTH, _HEIGHT, "loss over memory", parts)}</div>'


def heat_map(counts: Sequence[Sequence[float]]) -> str:
    """Tokens per expert [layers, experts] as cells coloured by their share over the even share, on a log scale."""
    experts, left = len(counts[0]), 24
    size, cells = (_WIDTH - left) / experts, []
    for layer, row in enumerate(counts):
        mean = sum(row) / experts or 1
        cells.append(f'<text x=0 y="{layer * 15 + 11}" style="font-size:10px">L{layer}</text>')
        for expert, count in enumerate(row):
            load = count / mean
            depth = math.log(max(load, 1e-9)) / math.log(_LOAD_RANGE)
            place = f'x="{left + expert * size:.1f}" y="{layer * 15}" width="{size - 0.8:.1f}" height=14'
            cells.append(
                f"<rect class=cell {place} /><rect class={'hot' if depth > 0 else 'cold'} "
                f'fill-opacity="{min(abs(depth), 1):.2f}" {place} >'
                f"<title>layer {layer}, expert {expert}: {load:.2f}</title></rect>"
            )
    return _svg(_WIDTH, len(counts) * 15, "load per layer and expert", cells)


def heat_legend() -> str:
    """What the colours of `heat_map` mean."""
    keys = (("cold", f"1/{_LOAD_RANGE:.0f} or less"), ("card", "even"), ("hot", f"{_LOAD_RANGE:.0f} times or more"))
    return "".join(
        f'<span class="key"><span class="swatch" style="background:var(--{color})"></span>{text}</span>'
        for color, text in keys
    )


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{inside}</svg>'


def _cross(x: float, y: float, step: int) -> str:
    path = f"M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10"
    return f'<path class=cross d="{path}"><title>SIGKILL at step {step}</title></path>'


def _curve(kind: str, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class={kind} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _short(tokens: float) -> str:
    if tokens >= 1e6:
        return f"{tokens / 1e6:g}M"
    return f"{tokens / 1e3:g}k" if tokens >= 1e3 else f"{tokens:g}"
