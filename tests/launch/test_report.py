"""The report says what was measured, alone and without lies."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from launch import pictures, report

VOID = {"meta", "line", "rect", "path", "polyline"}


class Tags(HTMLParser):
    """Collects attributes, and checks that what opens closes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: dict[str, list[str | None]] = {}
        self.names: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in VOID or tag == "rect":
            self.open.append(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID and tag != "rect":
            return
        assert self.open and self.open.pop() == tag, tag


def test_page_is_well_formed_and_holds_everything_itself(result, curves):
    page = report.render(result, curves)
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "link", "img", "iframe"} & set(tags.names)
    assert not {"src", "href", "onload"} & set(tags.attributes)
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page


def test_every_result_stands_on_the_page(result, curves):
    page = report.render(result, curves)
    for text in ("1.91", "1.82", "2.05", "123,456", "2.0e-05", "0.0030", "99.1%", "400", "a CPU"):
        assert text in page, text
    assert "All promises kept" in page and "✗" not in page


def test_what_the_model_says_cannot_become_markup(result, curves):
    page = report.render(result, curves)
    assert "Joins &lt;b&gt;paths&lt;/b&gt; &amp; more." in page and "<b>paths" not in page


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("resume", "bit_exact", False),
        ("resume", "kills", 1),
        ("export", "mismatches", 1),
        ("export", "codes_checked", 0),
        ("parity", "jax_torch_max_abs", 2e-4),
        ("parity", "torch_tflite_median_abs", float("nan")),
        ("parity", "engine_nll_diff_nats", -0.03),
        ("parity", "engine_top1_agreement", 0.97),
    ],
)
def test_a_broken_promise_is_named_everywhere(result, curves, group, name, value):
    assert report.broken_promises(result) == []
    result[group][name] = value
    assert len(report.broken_promises(result)) == 1
    assert "✗" in report.render(result, curves) and "BROKEN" in report.table(result)


def test_loss_picture_has_every_stage_and_both_kills(result, curves):
    page = report.render(result, curves)
    assert page.count("<path class=cross") == 2
    assert all(f">{stage}</text>" in page for stage in report.STAGES)


def test_heat_map_has_a_cell_per_layer_and_expert(curves):
    drawn = pictures.heat_map([[30, 10, 0], [10, 10, 10]])
    assert len(re.findall("<title>layer", drawn)) == 6
    assert "layer 0, expert 0: 2.25" in drawn and "layer 0, expert 2: 0.00" in drawn
    assert drawn.count('fill-opacity="0.00"') == 3  # the even layer is blank


def test_model_without_experts_still_has_a_report(result, curves):
    for lines in curves.values():
        for line in lines:
            line.pop("expert_tokens", None)
    assert "No routed experts" in report.render(result, curves)


def test_report_has_the_promised_keys(result, curves, tmp_path):
    for stage, lines in curves.items():
        (tmp_path / stage).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / stage / "metrics.jsonl").write_text(text + '{"step": 11, "lo')  # cut by a kill
    parts: dict[str, dict[str, Any]] = {name: {"seconds": 1.0} for name in result["parts_seconds"]}
    parts["sft"] |= {"killed_at": [3, 7], "resumed_from": [2, 6]}
    parts["compare"] |= {"different": ["step 9"]}
    parts["chat"] |= {"reply": "yes"}
    bits = result["heldout_bits_per_byte"]
    written = {
        "evaluate": {"bytes": 5000}
        | {f"bits_per_byte_{k}": bits[v] for k, v in
           (("model", "model_qat"), ("gzip9", "gzip9"), ("xz9", "xz9"))},
        "export": {"bytes": 99},
        "verify": {"export": result["export"], "parity": result["parity"], "failed": []},
        "bench": {"speed": result["speed"]},
        "layer": result["layer"],
    }  # fmt: skip
    for name, value in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    record = {"started": "now", "parts": parts}
    found = report.collect(tmp_path, record, "What?")
    assert set(found["stages"]) == {"pretrain", "midtrain", "sft", "qat"}
    for stage in found["stages"].values():
        assert {"loss_first", "loss_last", "tokens", "seconds"} <= set(stage)
    assert found["stages"]["qat"]["tokens"] == 1000
    assert found["stages"]["qat"]["loss_last"] == pytest.approx(sum(8 / n for n in range(6, 11)) / 5)
    assert {"model_qat", "gzip9", "xz9"} <= set(found["heldout_bits_per_byte"])
    assert found["resume"]["kills"] == 2 and found["resume"]["bit_exact"] is False
    assert {"codes_checked", "scales_checked", "mismatches"} <= set(found["export"])
    assert {"jax_torch_max_abs", "engine_nll_diff_nats", "engine_top1_agreement"} <= set(found["parity"])
    for name in ("decode_tok_s", "prefill_tok_s"):
        assert {name, f"dense_{name}"} <= set(found["speed"])
    assert found["reply"] == "yes"
    assert found.keys() == result.keys()
    json.dumps(found, allow_nan=False)
    report.write_html(tmp_path / "report.html", found, report.read_curves(tmp_path))
    assert "1 of 6 promises broken" in (tmp_path / "report.html").read_text()
