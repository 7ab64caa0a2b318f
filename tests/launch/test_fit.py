"""`python -m launch fit` reports what was compiled, refuses what cannot work, and goes on where it stopped.

One small step is compiled for a real slice; everything that reads a program reads that one.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import configs
import launch.fit
from launch import fit_compile
from launch.fit import add_fit_command, check_fit, on_slices, sized
from launch.fit_compile import Compiled, compile_kept, device_count
from launch.fit_estimate import estimated_bytes
from launch.fit_program import count_between_slices, count_grouped, visited_rows
from launch.fit_report import available_bytes, first_knob, fit_record, render, stage_cost
from launch.fit_search import Candidate, plan, render_search, search
from launch.fit_table import ROWS, Row, make_table, render_table
from launch.hlo import read_program
from launch.hlo_text import nested, parse, schedule
from launch.roofline import roofline
from launch.slices import parse_slice
from moe_jax.__main__ import guarded
from moe_jax.chips import chip_named
from moe_jax.errors import UserError

SMALL = ("model.num_layers=2", "model.vocab_size=2048")
MESH = {"slices": 1, "data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
NAMES = {
    "fits", "temp_gb", "args_gb", "hbm_headroom_gb", "estimated_gcycles_outside_kernels", "gmm_flops_over_ideal",
    "model_tflops_per_device", "hardware_tflops_per_device", "collectives", "kernels", "roofline",
    "compile_seconds",
}  # fmt: skip
SHORT = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) exceeds "
    "available HBM (15.75G)."
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_fit_command(parser.add_subparsers(required=True))
    arguments, rest = parser.parse_known_args(["fit", *words])
    arguments.overrides += rest
    return guarded(arguments.command, arguments)


def small(*overrides: str):
    return configs.load("mobilemoe_s", [*SMALL, "data.seq_len=512", "data.global_batch_size=4", *overrides])


class Once:
    """The one compile: what the command wrote, printed and compiled."""

    record: dict[str, Any]
    text: str
    compiled: Compiled


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    path, result = tmp_path_factory.mktemp("fit") / "fit.json", Once()
    with pytest.MonkeyPatch.context() as patch:

        def remember(*words):
            result.compiled = fit_compile.compile_step(*words)
            return result.compiled

        printed: list[str] = []
        patch.setattr(launch.fit, "compile_kept", remember)
        patch.setattr("builtins.print", lambda *words, **_: printed.extend(map(str, words)))
        status = run(
            "mobilemoe_s", "--topology", "v5e:2x2", "--seq-len", "512", "--per-device-batch", "1", "--top", "3",
            "--json", str(path), *SMALL, "mesh.fsdp=2", "mesh.data=2",
        )  # fmt: skip
    assert status == 0
    result.record, result.text = json.loads(path.read_text()), "".join(printed)
    return result


def test_the_json_has_the_fixed_names_and_says_what_was_compiled(once):
    record = once.record
    assert record.keys() >= NAMES
    assert record["fits"] is True and record["topology"] == "v5e:2x2" and record["compile_seconds"] > 0
    assert {k: v for k, v in record["mesh"].items() if v > 1} == {"data": 2, "fsdp": 2}
    assert record["versions"].keys() == {"jax", "jaxlib", "libtpu"}
    assert record["per_device_batch"] == 1 and record["seq_len"] == 512
    line = record["roofline"]
    assert line["step_seconds"] == max(line["seconds"].values()) == line["seconds"][line["bound_by"]]
    assert 0 < line["mfu_ceiling"] <= line["hfu"] <= 1
    assert line["tokens_per_second_per_chip"] == pytest.approx(512 / line["step_seconds"])
    assert record["hardware_tflops_per_device"] > record["model_tflops_per_device"] > 0
    left = record["hbm_available_gb"] - record["args_gb"] - record["temp_gb"]
    assert record["hbm_headroom_gb"] == pytest.approx(left)


def test_the_program_has_the_grouped_and_the_attention_kernels_and_moves_weights(once):
    kernels = once.record["kernels"]
    assert kernels["gmm"] >= 2 * 2 * 2 and kernels["tgmm"] == 2 * 2  # two products of two layers
    assert {"splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"} <= kernels.keys()
    moved = once.record["collectives"]
    assert moved["all-gather"]["count"] > 0 and moved["all-gather"]["gb"] > 0 and moved["all-gather"]["dcn_gb"] == 0


def test_weights_are_gathered_one_layer_at_a_time(once):
    """A gather moved out of the loop over layers would hold all of them at once."""
    module, model = parse(once.compiled.text), small().model
    assert model.moe is not None
    runs = [inner for i, *_ in schedule(module) for inner in (i, *(x for x, _ in nested(i, module)))]
    gathered = [a.dims for i in runs if i.opcode.startswith("all-gather") for a in i.out]
    gate_up = model.moe.num_experts * model.d_model * 2 * model.moe.expert_width
    assert model.num_layers == 2 and gate_up > model.vocab_size * model.d_model
    assert gate_up <= max(map(math.prod, gathered)) < 2 * gate_up
    assert all(dims[0] != model.num_layers for dims in gathered), gathered


def test_grouped_products_are_counted_as_visited(once):
    # 512 tokens to 4 of 60 experts: a tile of 128 rows for each expert, 60 * 128 rows for 2048 pairs.
    assert once.record["gmm_flops_over_ideal"] == pytest.approx(3.75)


def test_rows_are_whole_tiles_of_every_expert_and_one_row_to_spare():
    assert visited_rows(10, 4, 4) == 16  # each of four experts leaves 0, 1, 2 or 3 rows of its last tile empty
    assert visited_rows(16, 4, 1) == 16
    assert visited_rows(65536, 60, 128) / 65536 == pytest.approx(1.058, abs=1e-3)


def test_columns_and_reduction_run_in_whole_tiles(once, monkeypatch):
    # Tiles of 512 make 1024 of 768, and 512 of 384; each call multiplies 768 by 768, or 384 by 768.
    monkeypatch.setattr("launch.fit_program.tile_sizes", lambda m, k, n: (128, 512, 512))
    text, cfg = once.compiled.text, small("mesh.fsdp=2", "mesh.data=2")
    program, over = count_grouped(read_program(text), text, cfg, once.compiled.mesh)
    wide, narrow = 1024 * 1024 / (768 * 768), 512 * 1024 / (384 * 768)
    assert wide == narrow and over == pytest.approx(3.75 * wide)
    # Two layers; gate|up and down each forward, for their input, and gate|up again.
    assert program.kernels["gmm"].flops == pytest.approx(2 * 2 * 2048 * (3 * 768 * 768 + 2 * 384 * 768))


BETWEEN = """\
HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (p: bf16[10,8,128]) -> bf16[10,8,128] {
  %p = bf16[10,8,128]{2,1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[10,8,128]{2,1,0}, u32[], token[]) send(%p, %after-all), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %copy = bf16[10,8,128]{2,1,0} copy(%p)
}
"""


def test_what_slices_exchange_crosses_the_data_centre_network():
    program = count_between_slices(read_program(BETWEEN, 4), BETWEEN, 2)
    (found,) = program.collectives
    assert (found.kind, found.slices, found.count, found.bytes) == ("all-reduce", 2, 1, 2 * 10 * 8 * 128)
    chip = chip_named("v5e")
    seconds = roofline(program, chip, (2, 2), 1.0, 1.0).seconds["interconnect"]
    assert seconds == pytest.approx(found.bytes / chip.dcn_bandwidth)  # of two slices, each sends its sum once


def test_the_report_names_what_binds_and_what_is_large(once):
    line = once.record["roofline"]
    for words in (
        "FITS", "data=2 fsdp=2", f"bound by {line['bound_by']}", "tokens/s per chip", "chip-hours", "gmm",
        "all-gather", "Largest buffers", "['experts']['gate_up']", "libtpu", "Costliest outside kernels",
    ):  # fmt: skip
        assert words in once.text.replace("\\", ""), words


def test_estimated_state_is_what_the_compiler_allocates(once):
    args, _ = estimated_bytes(small(), MESH | {"data": 2, "fsdp": 2})
    assert args == pytest.approx(once.record["args_gb"] * 1e9, rel=0.02)


def test_two_days_of_24_chips_are_1152_chip_hours():
    assert stage_cost(10 * 3600 * 1152, 10.0, 24) == {"chip_hours": 1152, "days": 2}


@needs_libtpu
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--topology", "v5e:2x4", "mesh.expert=8", "mesh.fsdp=1"), "use one of 1, 2, 3, 4, 5, 6"),
        (
            ("--topology", "v5e:2x4", "mesh.tensor=8"),
            "num_heads 12 does not divide over mesh.tensor=8; use one of 1",
        ),
        (("--topology", "v5e:2x2", "mesh.fsdp=3"), "does not fit 4 device(s)"),
        (("--topology", "v5e:3x3"), "the nearest are"),
        (("--topology", "v9:2x2"), "write a family (v4, v5e, v5p, v6e, tpu7x)"),
        (("--topology", "v5e:2x2", "--per-device-batch", "0.3"), "makes 1.2 sequences on 4 devices"),
        (("--topology", "v5e:2x2", "--slices", "2", "mesh.slices=3"), "say it once"),
        ((), "needs a config and --topology"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(words, said, capsys):
    assert run("mobilemoe_s", *words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_without_libtpu_the_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("mobilemoe_s", "--topology", "v5e:2x2") == 2
    assert "pip install -r requirements/tpu.txt" in capsys.readouterr().err


def test_batch_and_length_set_the_global_batch():
    cfg = configs.load("mobilemoe_s")
    assert sized(cfg, 16, None, 8).data.global_batch_size == 128
    longer = sized(cfg, 16, 8192, None)
    assert longer.tokens_per_step == cfg.tokens_per_step and longer.data.seq_len == 8192
    assert sized(cfg, 16, 8192, 0.5).data.global_batch_size == 8
    micro = sized(replace(cfg, gradient_accumulation=4), 16, None, 2)
    assert micro.data.global_batch_size == 2 * 16 * 4
    assert on_slices(cfg, 2).mesh.slices == 2


GB = 10**9


@pytest.mark.parametrize(
    ("overrides", "mesh", "args", "needed", "knob"),
    [
        (["remat=full"], {"data": 4, "fsdp": 4}, 9, 20, "mesh.fsdp=8"),
        (["remat=full"], {"fsdp": 16}, 9, 20, "optimizer.offload=true"),
        (["remat=full", "optimizer.offload=true"], {"fsdp": 16}, 9, 20, "larger slice"),
        (["remat=save_dispatch"], {"fsdp": 16}, 1, 20, "remat=full"),
        (["remat=full", "loss_chunk=32768"], {"fsdp": 16}, 1, 20, "loss_chunk=16384"),
        (["remat=full"], {"fsdp": 16}, 1, 31, "gradient_accumulation=2 for the same step, or in launch fit "),
        (["remat=full"], {"fsdp": 16}, 1, 31, "--per-device-batch 4"),
        (["remat=full"], {"fsdp": 8, "context": 2}, 1, 31, "--per-device-batch 4"),
        (["remat=full", "data.global_batch_size=16"], {"fsdp": 16}, 1, 20, "mesh.context=2"),
        (["remat=full", "data.global_batch_size=2"], {"fsdp": 2, "context": 8}, 1, 20, "larger slice"),
    ],
)
def test_the_first_knob_is_what_costs_least_of_what_is_large(overrides, mesh, args, needed, knob):
    cfg = configs.load("mobilemoe_s", ["data.global_batch_size=128", *overrides])
    assert knob in first_knob(cfg, MESH | {"fsdp": 1} | mesh, args * GB, needed * GB, 16 * GB)


def test_a_step_that_does_not_fit_ends_with_2_and_still_writes_its_json(once, monkeypatch, tmp_path, capsys):
    refused = replace(once.compiled, text="", message=SHORT, temp=0)
    answers = [refused, once.compiled]  # the second is for the chip with more HBM
    monkeypatch.setattr(launch.fit, "compile_kept", lambda *_: answers.pop(0))
    path = tmp_path / "fit.json"
    words = ("--topology", "v5e:2x2", "--seq-len", "512", "--per-device-batch", "4", "--json", str(path), *SMALL)
    assert run("mobilemoe_s", *words) == 2
    record, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert record.keys() >= NAMES and record["fits"] is False and record["roofline"] is None
    assert record["peak_gb"] == pytest.approx(20 * 2**30 / 1e9) and record["hbm_headroom_gb"] < 0
    assert record["largest"] == once.record["largest"] and record["first_knob"]
    assert "DOES NOT FIT" in printed and "First knob to turn" in printed and "Largest buffers" in printed


# ---- search ---------------------------------------------------------------------------------------


def candidate(speed: float, policy: str, temp: float) -> Candidate:
    return Candidate(replace(small(), remat=policy), 1e9, temp, speed, 1.0)


def outcome(once, speed: float, temp: float, fits: bool = True) -> dict[str, Any]:
    line = {**once.record["roofline"], "tokens_per_second_per_chip": speed}
    return {**once.record, "fits": fits, "temp_gb": temp / 1e9, "roofline": line if fits else None}


def test_the_search_learns_from_what_it_compiles_and_ends_when_nothing_promises_more(once):
    many = [
        candidate(100, "nothing", 9e9), candidate(99, "nothing", 6e9), candidate(90, "nothing", 4e9),
        candidate(80, "full", 2e9), candidate(40, "full", 1e9),
    ]  # fmt: skip
    compiled: list[float] = []

    def measure(cfg):
        chosen = next(c for c in many if c.cfg is cfg)
        compiled.append(chosen.tokens_per_second)
        # "nothing" takes twice the estimate; of speed, all reach 60 %.
        temp = chosen.temp * (2 if cfg.remat == "nothing" else 1)
        return outcome(once, 0.6 * chosen.tokens_per_second, temp, fits=temp + 1e9 <= 12e9)

    records = search(many, 12 * 10**9, measure, max_compiles=6)
    # 9 GB proves to be 18: 6 GB is not tried any more, 4 GB is; then 40 promises less than the 54 that are reached.
    assert compiled == [100, 90, 80]
    speeds = [r["roofline"] and r["roofline"]["tokens_per_second_per_chip"] for r in records]
    assert speeds == [pytest.approx(54), pytest.approx(48), None]
    compiled.clear()
    search(many, 12 * 10**9, measure, max_compiles=6, first_fit=True)
    assert compiled == [100, 90]


def test_when_no_estimate_fits_the_smallest_is_tried_and_a_dead_compiler_counts(once):
    tried: list[float] = []

    def measure(cfg):
        tried.append(1)
        raise UserError("the compiler ended with status -9")

    assert search([candidate(9, "full", 50e9), candidate(5, "full", 40e9)], 10**9, measure, max_compiles=2) == []
    assert len(tried) == 2


def test_a_plan_keeps_the_tokens_of_a_step_and_counts_what_it_puts_aside():
    kind = parse_slice("v5e:16x16")
    cfg = sized(on_slices(configs.load("mobilemoe_l"), 1), device_count(kind, 1), 8192, None)
    planned = plan(cfg, kind, 1)
    assert planned.candidates and sum(planned.pruned.values()) > 100 and len(planned.pruned) == 3
    for found in planned.candidates:
        assert found.cfg.tokens_per_step == cfg.tokens_per_step
        assert found.args + found.temp / 2 <= available_bytes(kind)
        mesh = found.cfg.mesh
        assert mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor == 256
    speeds = [found.tokens_per_second for found in planned.candidates]
    assert speeds == sorted(speeds, reverse=True)
    plain = plan(cfg, kind, 1, plain=True)
    assert {(c.cfg.mesh.expert, c.cfg.mesh.context, c.cfg.mesh.tensor) for c in plain.candidates} == {(1, 1, 1)}
    given = plan(cfg, kind, 1, per_device_batch=1).candidates
    assert {c.cfg.data.global_batch_size // c.cfg.gradient_accumulation for c in given} == {256}


def test_what_is_kept_takes_memory_and_to_keep_everything_takes_more_traffic_than_it_saves():
    kind, cfg = parse_slice("v5e:4x4"), sized(configs.load("mobilemoe_s"), 16, 2048, 8)
    policies = ("full", "save_attention", "save_dispatch", "nothing")
    found = [replace(cfg, remat=policy) for policy in policies]
    memory = [estimated_bytes(c, MESH | {"fsdp": 16})[1] for c in found]
    assert memory == sorted(memory) and len(set(memory)) == 4
    speed = {c.cfg.remat: c.tokens_per_second for c in reversed(plan(cfg, kind, 1, 8).candidates)}
    # As compiled for v5e:16x16: ceilings of 56 % (full), 58 % and 48 % (nothing).
    assert speed["nothing"] < speed["full"] < speed["save_attention"]


def test_the_ranking_shows_what_fits_what_does_not_and_what_was_not_compiled(once):
    kind, cfg = parse_slice("v5e:4x4"), sized(configs.load("mobilemoe_s"), 16, 2048, 8)
    planned = plan(cfg, kind, 1)
    text = render_search([outcome(once, 50_000, 1e9), outcome(once, 0, 40e9, fits=False)], planned)
    assert (
        "50,000" in text and "does not fit" in text and f"{len(planned.candidates)} candidates, 2 compiled" in text
    )
    assert all(reason in text for reason in planned.pruned)


# ---- the table ------------------------------------------------------------------------------------


def test_the_table_has_every_size_slice_and_length_once():
    assert len(set(ROWS)) == len(ROWS) == 39
    assert {row.topology for row in ROWS} >= {"v5e:16x16", "v5p:8x8x8", "tpu7x:4x4x4"}


def test_a_table_shows_figures_refusals_and_failures_in_rows_of_one_width(once):
    kind = parse_slice("v5e:2x2")
    refused = replace(once.compiled, text="", message=SHORT, temp=0)
    no_room = fit_record("mobilemoe_s", small(), kind, 1, refused, 6e12)
    rows = [Row("mobilemoe_s", "v5e:2x2", 512)] * 3
    text = render_table(list(zip(rows, [once.record, no_room, None], strict=True)))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| yes |" in lines[2] and f"{once.record['stage']['chip_hours']:,.0f}" in lines[2]
    assert "| no |" in lines[3] and "the compiler failed" in lines[4]
    assert once.record["date"] in text and "libtpu" in text and "python -m launch fit --table" in text


@needs_libtpu
def test_a_table_goes_on_with_what_is_kept_and_compiles_nothing_twice(once, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kind, row = parse_slice("v5e:2x2"), Row("mobilemoe_s", "v5e:2x2", 512)
    base = configs.load(row.config, list(SMALL))
    cfg = sized(on_slices(base, 1), device_count(kind, 1), row.seq_len, None)
    room = available_bytes(kind)
    chosen = next(c for c in plan(cfg, kind, 1, plain=True).candidates if c.args + c.temp <= 0.97 * room)
    path = fit_compile.cache_path(chosen.cfg, kind, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(json.dumps(asdict(once.compiled)).encode()))

    started: list[Any] = []

    def no_process(*words, **_):
        started.append(words)
        raise UserError("a process was started")

    monkeypatch.setattr(fit_compile.subprocess, "run", no_process)
    assert make_table([row], Path("docs/fit.md"), SMALL) == 0
    assert not started and "| yes |" in Path("docs/fit.md").read_text()
    assert check_fit(chosen.cfg, kind, 1) > 0
    assert fit_compile.cache_path(replace(chosen.cfg, loss_chunk=512), kind, 1) != path
    make_table([row._replace(seq_len=1024)], Path("docs/fit.md"), SMALL)
    assert started  # another row is not taken for it


@needs_libtpu
def test_a_child_that_refuses_hands_its_sentence_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"60 does not divide over mesh\.expert=8"):
        compile_kept(small("mesh.expert=8", "mesh.fsdp=1", "data.global_batch_size=8"), parse_slice("v5e:2x4"))
    assert not list(tmp_path.rglob("*.gz"))


def test_the_report_of_a_step_too_large_says_how_much_too_large():
    compiled = Compiled("", SHORT, 4 * GB, 0, MESH, 1.0, {"jax": "1"}, "2026-01-01")
    record = fit_record("mobilemoe_s", small("remat=full"), parse_slice("v5e:2x2"), 1, compiled, 1e12)
    assert "DOES NOT FIT: 21.47 of 16.91 GB, 4.56 GB too much" in render(record)
