"""Before a job costs money: what does not fit is refused with its numbers, answers are kept, and nothing else is
asked for."""

from __future__ import annotations

import gzip
import importlib.util
import json
from dataclasses import asdict

import pytest

import configs
from launch import fit_compile
from launch.fit_compile import Compiled, versions
from launch.fit_first import _step_alone, fit_first
from launch.slices import parse_slice
from tests.launch.pod_jobs import run

SMALL = ["model.num_layers=1", "model.d_model=128", "model.num_heads=2", "model.num_kv_heads=1", "model.moe=none"]
SMALL += ["model.vocab_size=512", "data.seq_len=256", "data.global_batch_size=8"]
KIND = parse_slice("v5e:2x4")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(fit_compile, "CACHE", tmp_path / "fit")


@needs_libtpu
def test_a_step_is_compiled_once_for_all_jobs_that_have_it(capfd):
    cfg = configs.load("mobilemoe_s", SMALL)
    first = fit_first(cfg, KIND, 1, "1 of 4")
    said = capfd.readouterr()
    assert first and first > 0 and said.out == ""
    assert "pretrain (1 of 4): compiling for 1 x v5e:2x4" in said.err and "the answer is kept" in said.err
    other = configs.load("mobilemoe_s", [*SMALL, "seed=3", "checkpoint.keep=9", "data.tokenizer=gs://b/t.json"])
    assert fit_first(other, KIND, 1, "1 of 1") == first
    assert capfd.readouterr().err == ""
    words = ["--topology", "v5e:2x4", "--bucket", "gs://b", "--image", "i"]
    assert run("gke", "mobilemoe_s", *SMALL, *words, check_fit=fit_first) == 0
    assert "chip-hours" in capfd.readouterr().err


@needs_libtpu
def test_what_does_not_fit_is_refused_with_its_numbers_unless_told_otherwise(capfd):
    cfg = _step_alone(configs.load("mobilemoe_s", SMALL))
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) "
        "exceeds available HBM (15.75G)."
    )
    mesh = {"slices": 1, "data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}
    stored = Compiled("", message, 10**9, 0, mesh, 1.0, versions(), "2026-01-01")
    path = fit_compile.cache_path(cfg, KIND, 1)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps(asdict(stored)).encode()))
    words = ["gke", "mobilemoe_s", *SMALL, "--topology", "v5e:2x4", "--bucket", "gs://b", "--image", "i"]
    assert run(*words, check_fit=fit_first) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "pretrain needs 2" in error and "GB per device" in error and "--no-fit" in error
    assert run(*words, "--no-fit", check_fit=fit_first) == 0
    assert "JobSet" in capfd.readouterr().out


def test_without_libtpu_that_is_said_and_the_job_is_printed(monkeypatch, capfd):
    monkeypatch.setattr("launch.fit_first.importlib.util.find_spec", lambda name: None)
    words = ["gke", "mobilemoe_s", "--topology", "v5e:2x4", "--bucket", "gs://b", "--image", "i"]
    assert run(*words, check_fit=fit_first) == 0
    out, error = capfd.readouterr()
    assert "JobSet" in out and "not known without libtpu" in error
