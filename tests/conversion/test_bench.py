"""Measuring: exact token counts, ratios, memory, a profile whose sums hold, and mistakes in one sentence."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conversion import bench, bench_layer, bench_profile, readback
from conversion.bench_process import Candidate, Texts
from conversion.bench_runtime import Runtime
from conversion.memory import memory
from conversion.torch_model import MobileMoE, Reference
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from tests.conversion.conftest import CONTEXT

KINDS = pytest.mark.parametrize("exported", ["moe"], indirect=True)
SMALL = {"prefill": [8], "contexts": [24, 48], "texts": 1, "decode": 4, "threads": 1}


@pytest.fixture
def source(run_dir) -> str:
    return str(run_dir / "heldout.txt")


@KINDS
def test_ratios_are_ours_over_theirs_and_every_figure_has_its_length(exported, source, tmp_path):
    result = bench.bench(exported.bundle, exported.bundle, text=source, cache=tmp_path, **SMALL)
    other = result["against"]
    assert set(result["decode_tok_s"]) == {24, 48} and set(result["prefill_tok_s"]) == {8}
    for name in ("decode_tok_s", "prefill_tok_s"):
        for n, ratio in other["ratio"][name].items():
            assert ratio == pytest.approx(result[name][n] / other[name][n])
    assert result["ttft_s"] == result["ttft_by_prompt_s"][8] > 0
    assert result["peak_rss_gb"] >= result["anonymous_gb"] > 0 and result["load_s"] > 0
    assert result["threads"]["decode_tok_s"] == {24: 1, 48: 1} and len(result["by_threads"]) == 1
    assert list(tmp_path.glob("*.xnnpack_cache"))
    assert "decode at 48" in bench.table(result) and "ratio" in bench.table(result)


@KINDS
def test_contexts_that_do_not_hold_all_rounds_are_reached_afresh(exported, source, tmp_path, monkeypatch):
    asked, ask = [], Candidate.ask

    def noted(self, do, **order):
        asked.append((do, order))
        return ask(self, do, **order)

    monkeypatch.setattr(Candidate, "ask", noted)
    options: Any = SMALL | {"contexts": [14, 48], "decode": 8}
    result = bench.bench(exported.bundle, text=source, cache=tmp_path, **options)
    assert set(result["decode_tok_s"]) == {14, 48}
    ends, length = [], 0  # of the text whenever an answer is written
    for do, order in asked:
        length = 0 if do in ("start", "prefill") else length + len(order["ids"])
        ends += [length] if do == "write" else []
    assert ends == [14, 14, 36, 48]


@KINDS
def test_a_model_reads_and_writes_as_many_tokens_as_it_is_asked_to(exported, source, tmp_path):
    texts = Texts(source, exported.tokenizer)
    with Candidate("litert", exported.bundle, 1, str(tmp_path)) as model:
        (prompt,) = texts.prompts(20, 1)
        assert len(prompt["ids"]) == 20 and model.ask("prefill", **prompt)["tokens"] == 20
        model.ask("start", decode=3)
        pieces = texts.way(0, 15)
        assert sum(len(piece["ids"]) for piece in pieces) == 15
        assert sum(model.ask("read", **piece)["tokens"] for piece in pieces) == 15
        assert model.ask("write", ids=[])["tokens"] <= 3
        (more,) = texts.pieces(4, 1)
        assert model.ask("read", **more)["tokens"] == 4
        with pytest.raises(UserError, match="context may be too short"):
            model.ask("read", **texts.pieces(CONTEXT, 1)[0])


@KINDS
def test_paths_are_those_of_the_folder_that_the_command_runs_in(exported, tmp_path, monkeypatch):
    shutil.copy(exported.bundle, tmp_path / "m.litertlm")
    monkeypatch.chdir(tmp_path)
    with Candidate("litert", "m.litertlm", 1, "cache") as model:
        assert model.load_s > 0
    assert list((tmp_path / "cache").glob("m.litertlm*"))


@KINDS
@pytest.mark.parametrize(
    ("kind", "number", "sentence"),
    [
        ("litert", signal.SIGKILL, "died with status -9; free memory"),
        ("litert", signal.SIGILL, "died with status -4; free memory"),
        ("llama", signal.SIGILL, "died with status -4; see requirements/gguf.txt"),
    ],
)
def test_a_process_that_dies_is_named(exported, tmp_path, kind, number, sentence):
    with Candidate("litert", exported.bundle, 1, str(tmp_path)) as model:
        model._kind = kind
        os.kill(model._process.pid, number)
        with pytest.raises(UserError, match=sentence):
            model.ask("start", decode=1)


@KINDS
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [({"prefill": [64]}, "of 64"), ({"contexts": [65]}, "of 64"), ({"decode": 20}, "answers of 20")],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_loaded(exported, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.bench(exported.bundle, **SMALL | changed)


@KINDS
@pytest.mark.parametrize(("package", "sentence"), [(None, "requirements/gguf.txt"), (bench, "conversion gguf")])
def test_a_comparison_with_llama_cpp_wants_its_package_and_a_file(
    exported, tmp_path, monkeypatch, package, sentence
):
    monkeypatch.setattr(bench, "find_spec", {"llama_cpp": package}.get)
    with pytest.raises(UserError, match=sentence):
        bench.bench(exported.bundle, llama_cpp=tmp_path / "m.gguf", **SMALL)


class Silent(Candidate):
    """A model that ends every answer at once."""

    def __init__(self):
        self.path: str | Path = "m.litertlm"
        self.threads, self.load_s, self.memory = 1, 1.0, {}

    def ask(self, do, **order):
        return {"tokens": 8, "seconds": 0.0 if do == "write" else 1.0, "ttft": 1.0}


@KINDS
def test_a_model_that_writes_nothing_is_named(exported, source):
    texts = Texts(source, exported.tokenizer)
    with pytest.raises(UserError, match=r"m\.litertlm wrote nothing at context 24"):
        bench._Work(texts, [8], [24], 1, 4, print).run([Silent()])


@KINDS
def test_bundles_of_different_tokenizers_are_not_compared(exported, source, tmp_path):
    from conversion.litert import bundle

    Tokenizer.train([Path(source).read_text()], 280).save(tmp_path / "tokenizer.json")
    bundle.write_bundle(exported.tflite, tmp_path / "tokenizer.json", tmp_path / "m.litertlm", CONTEXT)
    with pytest.raises(UserError, match="cut text differently"):
        bench.bench(exported.bundle, tmp_path / "m.litertlm", text=source, **SMALL)


def test_own_memory_is_told_from_pages_of_files():
    before = memory()
    grown = np.ones(64 << 20, np.uint8)
    assert memory()["anonymous_gb"] - before["anonymous_gb"] > 0.9 * grown.nbytes / 1e9
    assert memory()["peak_rss_gb"] >= memory()["anonymous_gb"] + memory()["files_gb"] - 0.01


def test_the_runtime_computes_what_the_torch_model_does(exported, tmp_path):
    ids = [exported.tokenizer.bos, *exported.tokenizer.encode("def add(first, second):")]
    runtime = Runtime(readback.sections(exported.bundle).tflite, 1, tmp_path / "weights")
    runtime.prefill(ids[:-2])
    got = [runtime.decode(token).copy() for token in ids[-2:]]
    model = MobileMoE(exported.weights, Reference(exported.weights), CONTEXT)
    want = model(torch.tensor([ids], dtype=torch.int32))[0, -2:].numpy()
    assert runtime.tokens == len(ids) and np.median(np.abs(np.stack(got) - want)) < 1e-2


def test_a_profile_puts_every_layer_in_its_place_and_is_drawn(exported, source, tmp_path):
    result = bench_profile.profile(exported.bundle, context=16, calls=6, text=source)
    decode, moe = result["decode"], exported.weights.config.moe is not None
    assert set(result) == {"prefill_8", "decode", "context", "threads"}
    assert len(decode["layers"]) == exported.weights.config.num_layers
    assert {"attention", "shared expert", "head", bench_profile.REST} <= set(decode["parts"])
    assert moe == ("experts" in decode["parts"]) == ("router" in decode["parts"])
    for layer in decode["layers"]:
        assert {"attention", "shared expert"} <= set(layer)
    products = sum(n for op, (_, n) in decode["ops"].items() if "QB4W" in op)
    experts = 2 * 2 * exported.weights.config.num_layers if moe else 0  # two products of two experts
    assert products == exported.weights.config.num_layers * 4 + 1 + experts
    bench_profile.draw(result, tmp_path / "p.svg")
    assert "layer 1" in "".join(ElementTree.parse(tmp_path / "p.svg").getroot().itertext())
    assert "decode:" in bench_profile.table(result)


def test_one_layer_is_measured_against_the_dense_one():
    result = bench_layer.bench_layer((1, 4), threads=1, shape=(64, 32, 4, 2), seconds=0.02)
    assert result["decode_over_dense"] == result["tokens_1"]["sparse"]["median_ratio"] > 0
    assert result["prefill4_over_dense"] == result["tokens_4"]["sparse"]["median_ratio"] > 0
    assert result["tokens_1"]["dense"]["median_ratio"] == 1 and "streamed" in bench_layer.table(result)


def test_the_runtimes_own_talk_is_not_heard_beside_the_figures():
    words = ["bench-layer", "--tokens", "1", "--threads", "1", "--seconds", "0.02"]
    words += ["--d-model", "64", "--expert-width", "32", "--num-experts", "4"]
    done = subprocess.run([sys.executable, "-m", "conversion", *words], capture_output=True, text=True, check=True)
    assert done.stderr == "1 tokens\n" and done.stdout.startswith("1 tokens; rows of")


@pytest.mark.parametrize("shape", [(64, 32, 2, 4), (40, 32, 4, 2), (64, 16, 4, 2)], ids=str)
def test_a_shape_that_no_layer_has_is_refused(shape):
    with pytest.raises(UserError, match="make no layer"):
        bench_layer.bench_layer((1,), threads=1, shape=shape)
