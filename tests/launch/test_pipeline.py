"""Four stages in one command: trained in two real processes, killed in the third, gone on with, then skipped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import configs
from launch.status import render, run_status
from moe_jax.errors import UserError
from moe_jax.files import read_lines
from moe_jax.train.catalogue import final_checkpoint
from tests.launch.pod_jobs import run

STAGES = ["pretrain", "midtrain", "sft", "qat"]
SMALL = [
    "model.num_layers=1", "model.d_model=32", "model.num_heads=2", "model.num_kv_heads=1", "model.head_dim=16",
    "model.vocab_size=290", "model.max_position_embeddings=64", "model.moe=none", "model.ffn_width=64",
    "data.seq_len=32", "data.global_batch_size=4", "mesh.fsdp=2", "steps=40", "checkpoint.every_steps=20",
]  # fmt: skip
# All float stages compile to one program.
SMALL += ["optimizer.learning_rate=0.01", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
PODS = ["--topology", "v5e-256", "--bucket", "gs://b", "--image", "i"]


@pytest.mark.parametrize("family", ["mobilemoe_s", "mobilemoe_m", "mobilemoe_l", "demo"])
def test_a_family_is_its_four_stages_in_order(family):
    names = configs.stages(family)
    assert [configs.get(name).stage for name in names] == STAGES
    assert not any(name.removesuffix("_" + configs.get(name).stage) != family for name in names)


def test_single_configs_are_no_families_and_a_mistyped_family_is_answered_with_one_that_is():
    assert set(configs.families()) == {"mobilemoe_s", "mobilemoe_m", "mobilemoe_l", "demo"}
    with pytest.raises(UserError, match="mobilemoe_s"):
        configs.stages("mobilmoe_s")


def pods(capfd, *words: str) -> list[str]:
    """The command of the pods of a pipeline."""
    assert run("pipeline", *words, *PODS, check_fit=lambda *_: 1e6) == 0
    found = yaml.safe_load(capfd.readouterr().out)["spec"]["replicatedJobs"][0]["template"]["spec"]
    return found["template"]["spec"]["containers"][0]["command"][4:]


def test_on_pods_one_job_trains_the_stages_that_were_chosen(capfd):
    names = configs.stages("mobilemoe_s")
    where = ["--run", "gs://b/mobilemoe-s"]
    assert pods(capfd, "mobilemoe_s", "seed=3") == [",".join(names), "seed=3", *where]
    start = ["init_from=gs://b/mobilemoe-s/midtrain"]
    assert pods(capfd, "mobilemoe_s", "--from", "sft") == [",".join(names[2:]), *start, *where]
    only = pods(capfd, "mobilemoe_s", "--from", "qat", "--until", "qat", "--mount", "--run", "a")
    assert only == [names[3], "init_from=/bucket/a/sft", "--run", "/bucket/a/qat"]
    assert (
        pods(capfd, "mobilemoe_s", "--from", "sft", "--until", "sft", "init_from=gs://c/d")[1]
        == "init_from=gs://c/d"
    )


def test_the_price_of_each_stage_and_of_all_is_printed(capfd):
    assert run("pipeline", "mobilemoe_s", *PODS, check_fit=lambda *_: 1e6) == 0
    said = capfd.readouterr().err
    assert (
        said.index("pretrain: at least 1,667 chip-hours")
        < said.index("qat: at least 6")
        < said.index("in all: at least 1,846")
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["demo", "--from", "rl"], "--from 'rl'"),
        (["demo", "--from", "qat", "--until", "sft"], "comes after"),
        (["demo", "--bucket", "gs://b"], "add --topology"),
        (["demo", "--slices", "2"], "--slices means nothing on this machine"),
        (["demo", "--spot"], "--spot means nothing on this machine"),
        (["demo", "--on", "queued"], "--on means nothing on this machine"),
        (["demo", "--env", "A=b"], "--env means nothing on this machine"),
        (["demo", "--no-fit"], "--no-fit means nothing on this machine"),
        (["demo", *PODS, "--new-data"], "--new-data means nothing on pods"),
        (["demo", *PODS, "--processes", "2"], "--processes means nothing on pods"),
        (["demo", *PODS, "--devices", "2"], "--devices-per-process means nothing on pods"),
        (["nothing"], "no family"),
        (["demo", *PODS, "--zone", "z"], "--zone means nothing to gke"),
        (["demo", *PODS, "--on", "xpk", "--mount"], "--mount means nothing to xpk"),
    ],
)
def test_what_cannot_be_meant_is_refused(capfd, words, sentence):
    assert run("pipeline", *words) == 2
    out, error = capfd.readouterr()
    assert out == "" and sentence in error and error.count("\n") == 1


def starts(run: Path) -> dict[str, int]:
    events = {stage: read_lines(run / stage / "events.jsonl") for stage in STAGES}
    return {stage: sum(line["event"] == "start" for line in lines) for stage, lines in events.items()}


def test_four_stages_killed_in_the_third_go_on_and_are_skipped_when_complete(tiny, tmp_path):
    folder = tmp_path / "run"
    source = json.dumps([{"path": str(tiny.root / "train.txt"), "weight": 1.0, "kind": "text"}])
    data = [f"data.sources={source}", f"data.tokenizer={tiny.root / 'tokenizer.json'}", "data.cache_dir="]
    words = ["pipeline", "demo", "--run", str(folder), "--processes", "2", "--devices-per-process", "1"]
    command = [sys.executable, "-m", "launch", *words, *SMALL, *data]
    first = subprocess.Popen(command, env=tiny.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not read_lines(folder / "sft/metrics.jsonl"):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    again = subprocess.run(command, env=tiny.env, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [final_checkpoint(folder / stage).name for stage in STAGES] == ["40"] * 4
    assert starts(folder) == {"pretrain": 1, "midtrain": 1, "sft": 2, "qat": 1}
    status = run_status(str(folder))
    assert [stage["stage"] for stage in status["stages"]] == STAGES and status["complete"]
    assert status["stages"][2]["restarts"] == {"killed or crashed": 1} and "processes 2" in render(status)
    last = subprocess.run(command, env=tiny.env, capture_output=True, text=True, check=False)
    assert last.returncode == 0 and starts(folder)["qat"] == 1, last.stdout + last.stderr
