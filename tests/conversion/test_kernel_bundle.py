"""A bundle with the kernel's op: the same codes, the same answers, damage found by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as tflite

from conversion import bench, bench_profile, readback, roofline, verify
from conversion.__main__ import main
from conversion.export import export
from conversion.kernel import NAMES, build, register
from conversion.litert import bank, container
from conversion.litert.engine import Engine
from tests.conversion import ties
from tests.conversion.conftest import CONTEXT, PREFILL, answer
from tests.conversion.folders import read_run, share_buffer
from tests.conversion.test_engine import CLOSE

pytestmark = [
    pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler"),
    pytest.mark.parametrize("exported", ["moe"], indirect=True),
]
TEXT = "def add(first):\n    return first + 1  # and on"
EXPERTS = "model.layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def kernel_bundle(run_dir, tmp_path_factory) -> Path:
    """`exported`'s weights with the op, written by the command."""
    path = tmp_path_factory.mktemp("kernel") / "m.litertlm"
    words = [str(run_dir), str(path), "--experts", "kernel", "--context", str(CONTEXT)]
    assert main(["export", *words, "--prefill", ",".join(map(str, PREFILL))]) == 0
    return path


def rung_1(run_dir: Path, path: Path) -> readback.Findings:
    run, parameters, source = read_run(run_dir)
    return verify.codes_and_scales(container.tflite(path), run.model, parameters, source.group)


def test_only_a_bundle_with_the_op_needs_the_kernel(exported, kernel_bundle):
    assert register.needed(container.tflite(kernel_bundle))
    assert not register.needed(container.tflite(exported.bundle))


def test_the_engine_gives_the_references_answers(exported, kernel_bundle):
    ids = [exported.tokenizer.bos, *exported.tokenizer.encode(TEXT)]
    with Engine(exported.bundle, threads=1) as engine:
        stock = answer(engine, "add one", 12)
    with Engine(kernel_bundle, threads=1) as engine:
        assert answer(engine, "add one", 12) == stock and stock
        got = engine.score(TEXT)
    want, _ = ties.nearest(exported.weights, ids, got, CLOSE)
    assert np.abs(got - want).max() < CLOSE


def test_prompts_read_token_by_token_get_the_references_answers(exported, run_dir, tmp_path):
    """A prefill call of one token has no use for the last layer's attention, whose op is fused with its cache."""
    export(run_dir, tmp_path / "m.litertlm", experts="kernel", context=CONTEXT, prefill=(1,))
    ids = [exported.tokenizer.bos, *exported.tokenizer.encode(TEXT)]
    with Engine(tmp_path / "m.litertlm", threads=1) as engine:
        got = engine.score(TEXT)
    want, _ = ties.nearest(exported.weights, ids, got, CLOSE)
    assert np.abs(got - want).max() < CLOSE


def test_a_stock_bundle_runs_as_before_once_the_kernel_is_there(exported, kernel_bundle):
    register.in_engine()
    with Engine(exported.bundle, threads=1) as engine:
        assert len(engine.score(TEXT)) == len(exported.tokenizer.encode(TEXT))


def test_the_parity_ladder_holds(run_dir, kernel_bundle):
    result = verify.verify(run_dir, kernel_bundle, texts=2, tokens=20, probes=6, threads=1)
    assert [s for s in result["failed"] if "top1" not in s] == []  # random logits tie; see test_verify
    source = read_run(run_dir)[2]
    sizes = [source.int4(name) for name in source.int4_names()]
    assert result["export"]["codes_checked"] == sum(weight.codes.size for weight in sizes)
    assert result["export"]["scales_checked"] == sum(weight.scales.size for weight in sizes)
    assert result["parity"]["engine_top1_agreement"] > 0.9


# Of an expert's bytes, with D 64 and F 32: gate|up is 4 groups of 64 + 2 * 288 bytes, then comes down.
DOWN = 4 * (64 + 2 * (32 + 256))


@pytest.mark.parametrize(
    ("byte", "mask", "report"),
    [
        (128, 0x01, "gate_up_proj[3]: 1 of 4096 codes differ"),
        (DOWN, 0x40, "down_proj[3]: 1 of 64 sums differ"),
        (DOWN + 64, 0x01, "down_proj[3]: 1 of 64 scales differ"),
        (DOWN + 96, 0x01, "down_proj[3]: 1 of 2048 codes differ"),
        (DOWN + 96 + 255, 0x80, "down_proj[3]: 1 of 2048 codes differ"),
    ],
)
def test_a_flipped_bit_of_one_expert_is_named(run_dir, exported, kernel_bundle, tmp_path, byte, mask, report):
    gate_up, down = (exported.weights.int4(f"{EXPERTS}.{part}_proj") for part in ("gate_up", "down"))
    raw, wanted = bytearray(kernel_bundle.read_bytes()), bank.pack_experts(gate_up, down)[3].tobytes()
    assert raw.count(wanted) == 1
    raw[raw.index(wanted) + byte] ^= mask
    (tmp_path / "damaged.litertlm").write_bytes(raw)
    found = rung_1(run_dir, tmp_path / "damaged.litertlm")
    assert (found.mismatches, found.reports) == (1, [f"{EXPERTS}.{report}"])


@pytest.mark.parametrize("part", ["self_attn.o_proj", "feed_forward.experts"])
def test_a_second_copy_of_a_weight_is_compared_too(run_dir, exported, kernel_bundle, part):
    raw, found = bytearray(container.tflite(kernel_bundle)), {}
    model = tflite.Model.GetRootAs(raw, 0)
    for graph in container.entries(model, "Subgraphs"):
        for op in container.entries(graph, "Operators"):
            for tensor, _ in readback.kernel_weights(model, graph, op):
                found.setdefault(tensor.Name().decode(), []).append(tensor)
    name, other = (f"model.layers.{layer}.{part}" for layer in (0, 1))
    assert len(found[name]) > 1  # of decode and of prefill
    share_buffer(raw, found[name][-1], found[other][0])
    run, parameters, source = read_run(run_dir)
    reports = verify.codes_and_scales(memoryview(raw), run.model, parameters, source.group).reports
    assert reports and all(report.startswith(name) and report.endswith("differ") for report in reports)


def test_the_same_weights_give_the_same_bundle(run_dir, kernel_bundle, tmp_path):
    export(run_dir, tmp_path / "m.litertlm", experts="kernel", context=CONTEXT, prefill=PREFILL)
    assert (tmp_path / "m.litertlm").read_bytes() == kernel_bundle.read_bytes()


def test_it_is_measured_profiled_and_predicted_as_any_other(exported, run_dir, kernel_bundle):
    text = str(run_dir / "heldout.txt")
    speed = bench.bench(kernel_bundle, text=text, texts=1, decode=4, prefill=[8], contexts=[24], threads=1)
    assert speed["decode_tok_s"][24] > 0
    found = bench_profile.profile(kernel_bundle, context=10, threads=1, calls=3, text=text)
    layers = exported.weights.config.num_layers
    # The vocabulary of 300 is no multiple of 16, so head and lookup stay with the runtime.
    ran = {name: times for name, (_, times) in found["decode"]["ops"].items() if name in NAMES}
    assert ran == dict.fromkeys(("moe_jax.self_attention", "moe_jax.mixture"), layers)
    assert all({"attention", "experts"} <= layer.keys() for layer in found["decode"]["layers"])
    (prefill,) = (found[name] for name in found if name.startswith("prefill"))
    parts = {"attention", "router", "experts", "shared expert"}
    assert all(parts <= layer.keys() for layer in prefill["layers"][:-1])  # of the last, caches alone are wanted
    assert {"embedding", "head"} <= found["decode"]["parts"].keys()
    stock, kernel = (roofline.config_of(path) for path in (exported.bundle, kernel_bundle))
    assert kernel == stock
