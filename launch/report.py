"""The demo's result: report.json from what its parts wrote, and report.html from report.json and the logs.

The page holds everything itself: no script, no font, no picture from elsewhere. Bounds stand here once, for the
table on the page and for the demo's exit status.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from launch import pictures
from moe_jax.files import read_lines, write_bytes

STAGES = ("pretrain", "midtrain", "sft", "qat")
_AVERAGED = 5  # steps behind each end of a loss curve: one batch alone is chance
_PACKAGES = (
    "jax", "flax", "orbax-checkpoint", "grain", "torch", "litert-torch", "ai-edge-litert", "litert-lm-api",
)  # fmt: skip
Report = dict[str, Any]


class Rung(NamedTuple):
    """What must hold: in words, as measured, its bound, and whether it is kept."""

    name: str
    measured: str
    bound: str
    kept: bool


def ladder(result: Report) -> list[Rung]:
    """Every promise of the demo."""
    resume, export, parity = result["resume"], result["export"], result["parity"]
    bits = f"{resume['kills']} kills, {'same' if resume['bit_exact'] else 'other'} bits"
    codes, scales, wrong = (export[k] for k in ("codes_checked", "scales_checked", "mismatches"))
    logits, runtime = parity["jax_torch_max_abs"], parity["torch_tflite_median_abs"]
    nats, top1 = abs(parity["engine_nll_diff_nats"]), parity["engine_top1_agreement"]
    checked = f"{wrong} of {codes:,} codes and {scales:,} scales"
    return [
        Rung("training, killed against left alone", bits, "same bits",
             resume["kills"] == 2 and resume["bit_exact"]),
        Rung("checkpoint against .tflite", checked, "0 differ", wrong == 0 < codes),
        Rung("JAX against PyTorch, logits", f"{logits:.1e}", "≤ 1e-4", logits <= 1e-4),
        Rung("PyTorch against XNNPACK, median of logits", f"{runtime:.1e}", "≤ 1e-2", runtime <= 1e-2),
        Rung("JAX against engine, nats per token", f"{nats:.4f}", "≤ 0.02", nats <= 0.02),
        Rung("JAX against engine, same likeliest token", f"{top1:.1%}", "≥ 98%", top1 >= 0.98),
    ]  # fmt: skip


def starts(run: Path) -> list[int]:
    """The step at which each process of a run began: 0, then the checkpoints it was resumed from."""
    return [line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "start"]


def read_curves(demo: Path) -> dict[str, list[dict[str, Any]]]:
    """The step lines of each stage."""
    return {stage: read_lines(demo / stage / "metrics.jsonl") for stage in STAGES}


def collect(demo: Path, record: dict[str, Any], prompt: str) -> Report:
    """The content of report.json, from the logs and from the JSON that each part wrote in the folder `demo`.

    `record` is demo.json: start, and per part its seconds and findings.
    """
    parts = record["parts"]
    found = {
        name: json.loads((demo / f"{name}.json").read_text())
        for name in ("evaluate", "export", "verify", "bench", "layer")
    }
    stages = {}
    for stage, lines in read_curves(demo).items():
        losses = [line["loss"] for line in lines]
        stages[stage] = {
            "loss_first": sum(losses[:_AVERAGED]) / len(losses[:_AVERAGED]),
            "loss_last": sum(losses[-_AVERAGED:]) / len(losses[-_AVERAGED:]),
            "steps": lines[-1]["step"],
            "tokens": sum(line["tokens"] for line in lines),
            "seconds": parts[stage]["seconds"],
        }
    bits, sft = found["evaluate"], parts["sft"]
    return {
        "stages": stages,
        "heldout_bits_per_byte": {
            "model_qat": bits["bits_per_byte_model"],
            "gzip9": bits["bits_per_byte_gzip9"],
            "xz9": bits["bits_per_byte_xz9"],
            "bytes": bits["bytes"],
        },
        "resume": {
            "kills": len(sft["killed_at"]),
            "bit_exact": not parts["compare"]["different"],
            "killed_at": sft["killed_at"],
            "resumed_from": sft["resumed_from"],
            "different": parts["compare"]["different"],
        },
        "export": found["verify"]["export"] | {"bytes": found["export"]["bytes"]},
        "parity": found["verify"]["parity"],
        "speed": found["bench"]["speed"],
        "layer": found["layer"],
        "reply": parts["chat"]["reply"],
        "prompt": prompt,
        "losses_averaged_over_steps": _AVERAGED,
        "parts_seconds": {name: part["seconds"] for name, part in parts.items()},
        "seconds": round(sum(part["seconds"] for part in parts.values()), 1),
        "started": record["started"],
        "machine": _machine(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def broken_promises(result: Report) -> list[str]:
    """What does not hold, in words; empty when all is well."""
    return [f"{r.name}: {r.measured}, must be {r.bound}" for r in ladder(result) if not r.kept]


def table(result: Report) -> str:
    """The short table at the end of the demo."""
    bits, speed = result["heldout_bits_per_byte"], result["speed"]
    rows = [
        (name, f"loss {s['loss_first']:.2f} -> {s['loss_last']:.2f}, {s['tokens']:,} tokens, {s['seconds']:.0f} s")
        for name, s in result["stages"].items()
    ]  # fmt: skip
    compared = f"model {bits['model_qat']:.2f}, gzip -9 {bits['gzip9']:.2f}, xz -9 {bits['xz9']:.2f}"
    rows.append(("held-out bits per byte", compared))
    for r in ladder(result):
        rows.append((r.name, f"{r.measured} ({r.bound}) {'ok' if r.kept else 'BROKEN'}"))
    for kind, sparse, dense in _SPEEDS:
        text = f"{speed[sparse]:,.0f} tokens/s ({speed[dense]:,.0f} with all experts)"
        rows.append((f"engine, {kind}", text))
    decode, prefill = (result["layer"][kind]["sparse"]["median_ratio"] for kind, _ in _LAYER)
    text = f"decode {decode:.1f}x, prefill of 128 {prefill:.1f}x the time of a dense layer of the active size"
    rows.append(("one layer of size S", text))
    rows.append(("reply", " ".join(result["reply"].split())[:70]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


_SPEEDS = (("decode", "decode_tok_s", "dense_decode_tok_s"), ("prefill", "prefill_tok_s", "dense_prefill_tok_s"))


_LAYER = (("tokens_1", "one token"), ("tokens_128", "128 tokens"))
_FORMS = (("dense", "dense, active size"), ("sparse", "chosen experts"), ("all", "all experts"))


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.is_file() else ())
        if line.startswith("model name")
    ]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "system": platform.platform(),
    }


def write_html(path: Path, result: Report, curves: dict[str, list[dict[str, Any]]]) -> None:
    """Write the page: `result` as in report.json, `curves` as from `read_curves`."""
    write_bytes(path, render(result, curves).encode())


def render(result: Report, curves: dict[str, list[dict[str, Any]]]) -> str:
    """The whole page as HTML."""
    machine, broken = result["machine"], broken_promises(result)
    verdict = f"{len(broken)} of {len(ladder(result))} promises broken" if broken else "All promises kept"
    sections = (
        ("The line", _line(result)),
        ("Loss", _loss(result, curves)),
        ("Who works: load of the experts", _load(curves)),
        ("Parity ladder", _ladder(result)),
        ("Speed in the engine", _speed(result)),
        ("Held-out bits per byte", _bits(result)),
        ("What it answers", _reply(result)),
        ("Time", _time(result)),
    )
    body = "\n".join(f"<section><h2>{escape(t)}</h2>\n{content}</section>" for t, content in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>MobileMoE demo</title><style>{pictures.STYLE}</style></head>
<body><main><header><h1>MobileMoE, from text to the engine</h1>
<p><span class="chip {"bad" if broken else "good"}">{verdict}</span>
{escape(result["started"])} · {result["seconds"] / 60:.1f} minutes · {machine["cores"]} cores,
{escape(machine["cpu"])}</p></header>
{body}
<footer><details><summary>Versions</summary><p>{
        escape(" · ".join(f"{k} {v}" for k, v in result["versions"].items()))
    } · {escape(machine["system"])}</p></details></footer></main></body></html>
"""


def _line(result: Report) -> str:
    stages, seconds, kills = (result["stages"], result["parts_seconds"], result["resume"]["killed_at"])
    at = " and ".join(map(str, kills))
    notes = {
        "pretrain": "next token of Python's sources",
        "midtrain": "longer sequences, some conversations",
        "sft": f"answers only; killed at step {at}",
        "qat": "INT4 weights, INT8 activations",
    }
    boxes = [("text", "Python's standard library", None), ("tokenizer", "byte-level BPE", "tokenizer")]
    for name, stage in stages.items():
        boxes.append((name, f"{notes[name]}; {stage['tokens']:,} tokens", name))
    boxes += [
        ("INT4 .litertlm", "codes and scales as trained", "export"),
        ("verify", "file, PyTorch, engine against JAX", "verify"),
        ("engine", "stock LiteRT-LM answers", "chat"),
    ]
    cells = []
    for name, note, part in boxes:
        time = f"<small>{max(seconds[part], 1):.0f} s</small>" if part else ""
        hit = '<b class="kill">✕✕</b>' if name == "sft" else ""
        cells.append(f"<li><strong>{escape(name)}{hit}</strong><span>{escape(note)}</span>{time}</li>")
    return f'<ol class="line">{"".join(cells)}</ol>'


def _loss(result: Report, curves: dict[str, list[dict[str, Any]]]) -> str:
    resume = result["resume"]
    return (
        f"{pictures.loss_curves(curves, resume['killed_at'])}"
        '<p><b class="kill">✕</b> killed with SIGKILL, resumed from checkpoints '
        f"{' and '.join(map(str, resume['resumed_from']))}. Each stage has its own mixture, so levels differ.</p>"
    )


def _load(curves: dict[str, list[dict[str, Any]]]) -> str:
    counted = [
        (f"{stage}, step {line['step']}", line["expert_tokens"])
        for stage, lines in curves.items()
        for line in lines
        if line.get("expert_tokens")
    ]
    if not counted:
        return "<p>No routed experts.</p>"
    maps = "".join(
        f"<figure>{pictures.heat_map(counts)}<figcaption>{escape(name)}</figcaption></figure>"
        for name, counts in (counted[0], counted[-1])
    )
    return (
        "<p>Each row is a layer, each cell an expert: its share of one step's tokens over the even share. "
        f"{pictures.heat_legend()}</p>{maps}"
    )


def _ladder(result: Report) -> str:
    rows = "".join(
        f"<tr><td>{r.name}</td><td class=n>{r.measured}</td><td class=n>{r.bound}</td>"
        f'<td class="{"good" if r.kept else "bad"}">{"✓" if r.kept else "✗"}</td></tr>'
        for r in ladder(result)
    )
    head = "<tr><th>rung</th><th class=n>measured</th><th class=n>bound</th><th></th></tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _speed(result: Report) -> str:
    speed, drawn = result["speed"], ""
    for kind, sparse, dense in _SPEEDS:
        rows = (("chosen experts", speed[sparse], True), ("all experts", speed[dense], False))
        ratio = f"{speed[f'{kind}_speedup']:.1f}x"
        drawn += f"<h3>{kind}, tokens/s <small>{ratio}</small></h3>{pictures.bars(rows, '{:,.0f}')}"
    drawn += (
        "<p>The demo's experts are so narrow that computing all of them costs little. One layer of MobileMoE-S "
        "(60 experts of 384, 4 chosen, width 768), against a dense layer of the active size, shows the rest:</p>"
    )
    for kind, name in _LAYER:
        times = result["layer"][kind]
        rows = [(text, times[form]["median_us"], form == "sparse") for form, text in _FORMS]
        ratio = f"{times['sparse']['median_ratio']:.1f}x dense"
        drawn += f"<h3>{name}, µs <small>{ratio}</small></h3>{pictures.bars(rows, '{:,.0f}')}"
    return drawn


def _bits(result: Report) -> str:
    bits = result["heldout_bits_per_byte"]
    bars = (
        ("this model, INT4", bits["model_qat"], True),
        ("xz -9", bits["xz9"], False),
        ("gzip -9", bits["gzip9"], False),
    )
    note = f"On the same {bits['bytes']:,} bytes of held-out files; less is better."
    return f"{pictures.bars(bars, '{:.2f}')}<p>{note}</p>"


def _reply(result: Report) -> str:
    return (
        f'<p class="says you">{escape(result["prompt"])}</p><p class="says it">{escape(result["reply"])}</p>'
        "<p>Greedy, from the stock engine. The model is tiny and a few minutes old.</p>"
    )


def _time(result: Report) -> str:
    parts = [(name.replace("_", " "), s, True) for name, s in result["parts_seconds"].items()]
    return pictures.bars(parts, "{:.0f} s")
