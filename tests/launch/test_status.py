"""`launch status`: what it reads out of logs, checkpoints and locks, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.record import write_record
from launch.status import history, last_steps, render, run_status
from moe_jax.files import location
from moe_jax.run_lock import exclusive, holder
from moe_jax.train import catalogue, checkpoint
from moe_jax.train.catalogue import remove


def event(name: str, time: float, **fields) -> dict:
    return {"event": name, "step": 0, "time": time, **fields}


def test_restarts_are_told_by_what_ended_the_process_before():
    events = [
        event("start", 0, lost=0),
        event("goodput", 8, seconds={"step": 4.0, "compile": 4.0}),
        event("start", 20, lost=3),
        event("bad_step", 21, action="skip"),
        event("rolled_back", 22),
        event("start", 23, lost=2),
        event("goodput", 30, seconds={"step": 6.0, "compile": 4.0}),
        event("preempted", 31),
        event("start", 40, lost=0),
        event("hung", 50),
        event("damaged", 60),
        event("start", 61, lost=1),
        event("end", 62),
        event("start", 70, lost=0),
    ]
    found = history(events)
    assert found["restarts"] == {"killed or crashed": 1, "preempted": 1, "hung": 1}
    assert found["faults"] == {"bad_step": 1, "rolled_back": 1, "preempted": 1, "hung": 1, "damaged": 1}
    assert (found["starts"], found["steps_replayed"]) == (5, 6)
    assert found["seconds"] == {"step": 10.0, "compile": 8.0, "untold": 52.0}
    assert sum(found["goodput"].values()) == pytest.approx(1, abs=1e-3)
    assert history([])["starts"] == 0


def test_a_finished_run_is_shown_with_its_checkpoints(finished, tmp_path, capsys):
    assert main(["status", str(finished), "--json", str(tmp_path / "s.json"), "--verify"]) == 0
    shown = capsys.readouterr().out
    (stage,) = json.loads((tmp_path / "s.json").read_text())["stages"]
    assert (stage["state"], stage["step"], stage["steps"], stage["seconds_left"]) == ("complete", 12, 12, 0)
    assert [c["step"] for c in stage["checkpoints"]] == [8, 12] and stage["checkpoints"][1]["final"]
    assert stage["goodput"].keys() >= {"step", "save", "compile"} and stage["loss"] > 0
    assert "12/12" in shown and shown.count("checksums are right") == 2 and "nobody trains here" in shown


def test_a_checkpoint_that_the_run_keeps_no_longer_is_left_out(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    verify = checkpoint.verify

    def kept_no_longer(path):
        if path.name == "8":
            remove(path)
        verify(path)

    monkeypatch.setattr(checkpoint, "verify", kept_no_longer)
    (stage,) = run_status(str(run), verify=True)["stages"]
    assert [(c["step"], c["state"]) for c in stage["checkpoints"]] == [(12, "complete")]


def test_a_checkpoint_that_goes_while_its_files_are_listed_is_not_damaged(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    wrong_size = catalogue.wrong_size

    def kept_no_longer(path, record):
        if path.name == "8":
            remove(path)
        return wrong_size(path, record)

    monkeypatch.setattr(catalogue, "wrong_size", kept_no_longer)
    (stage,) = run_status(str(run))["stages"]
    assert [(c["step"], c["state"]) for c in stage["checkpoints"]] == [(8, "half-written"), (12, "complete")]


def test_a_flipped_byte_is_seen_by_verify_and_a_short_file_without_it(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    files = [p for p in (run / "checkpoints/12").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    big = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(big.read_bytes())
    data[len(data) // 2] ^= 1
    big.write_bytes(data)
    states = [c["state"] for c in run_status(str(run))["stages"][0]["checkpoints"]]
    verified = run_status(str(run), verify=True)["stages"][0]["checkpoints"]
    assert states == ["complete"] * 2 and [c["state"] for c in verified] == ["complete", "damaged"]
    assert big.name in verified[1]["reason"]
    big.write_bytes(data[:-1])
    status = run_status(str(run))
    assert [c["state"] for c in status["stages"][0]["checkpoints"]] == ["complete", "damaged"]
    assert not status["complete"] and big.name in render(status)


def test_stages_that_have_not_begun_are_waiting(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run/pretrain")
    resolved = {"a": {"stage": "pretrain", "steps": 12}, "b": {"stage": "sft", "steps": 7}}
    record = {"format": "moe_jax launch 1", "launcher": "local", "job": {"processes": 2}, "resolved": resolved}
    write_record(str(tmp_path / "run"), record)
    status = run_status(str(tmp_path / "run"))
    assert [(s["stage"], s["state"]) for s in status["stages"]] == [("pretrain", "complete"), ("sft", "waiting")]
    assert not status["complete"] and "(local: processes 2)" in render(status)


def test_a_run_that_has_only_been_recorded_is_waiting(tmp_path, capsys):
    resolved = {"a": {"stage": "pretrain", "steps": 12}}
    record = {"format": "moe_jax launch 1", "launcher": "gke", "job": {"slices": 2}, "resolved": resolved}
    write_record(str(tmp_path / "run"), record)
    (tmp_path / "run/.compiled").mkdir()
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "waiting" in capsys.readouterr().out


def extended(finished, tmp_path, seconds: list[float]) -> Path:
    """The finished run as one of 20 steps, whose last steps took so many seconds each."""
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"steps": 20}))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    lines = [json.dumps(line | {"seconds": value, "tokens_per_second": 600 / value}) + "\n" for value in seconds]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def test_a_final_checkpoint_of_fewer_steps_than_are_asked_for_by_now_does_not_complete_a_run(finished, tmp_path):
    status = run_status(str(extended(finished, tmp_path, [1.0])))
    assert (status["stages"][0]["state"], status["complete"]) == ("stopped", False)


def test_the_time_left_follows_from_the_usual_one_of_the_last_steps(finished, tmp_path):
    # A slow start is forgotten; a pause that one of the last steps took is not taken for the pace.
    run = extended(finished, tmp_path, [50.0] * 30 + [2.0] * 19 + [600.0])
    (stage,) = run_status(str(run))["stages"]
    assert (stage["seconds_left"], stage["tokens_per_second"]) == ((20 - 12) * 2, 300)


def test_without_a_log_a_run_stands_where_its_newest_checkpoint_does_that_is_not_damaged(finished, tmp_path):
    run = extended(finished, tmp_path, [])
    assert run_status(str(run))["stages"][0]["step"] == 12
    (run / "checkpoints/12/checksums.json").write_text("{}")
    (stage,) = run_status(str(run))["stages"]
    assert [c["state"] for c in stage["checkpoints"]] == ["complete", "damaged"] and stage["step"] == 8


def test_a_run_that_somebody_goes_on_with_is_running_even_if_it_was_complete(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    with exclusive(run):
        assert run_status(str(run))["stages"][0]["state"] == "running"
    assert run_status(str(run))["stages"][0]["state"] == "complete"


@pytest.mark.parametrize(
    "record",
    [
        {"resolved": {"a": {}}},
        {"resolved": [1]},
        {"resolved": None},
        {"format": "of another program", "resolved": {"a": {"stage": "x", "steps": 1}}, "job": 3},
        {"version": "0.2.0", "configurations": []},
    ],
    ids=str,
)
def test_another_programs_record_is_no_record_and_changes_nothing_of_what_is_shown(
    finished, tmp_path, capsys, record
):
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "launch.json").write_text(json.dumps(record))
    assert main(["status", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "holds no run" in error and error.count("\n") == 1
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "launch.json").write_text(json.dumps(record))
    status = run_status(str(run))
    assert status["complete"] and len(status["stages"]) == 1
    assert (status["launcher"], status["where"]) == (None, {})


@pytest.mark.parametrize("config", ['{"architectures: ["X"]}', "[1]", "{"])
def test_a_folder_of_somebody_else_is_no_run(tmp_path, capsys, config):
    (tmp_path / "config.json").write_text(config)
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_trainer_is_seen_by_its_lock_alone_while_it_lives(tmp_path):
    folder = location(tmp_path)
    assert holder(folder) == ""
    with exclusive(tmp_path):
        assert f"process {os.getpid()} on " in holder(folder)
    assert (tmp_path / ".lock").exists() and holder(folder) == ""


def test_a_trainer_of_another_machine_is_seen_while_it_writes(tmp_path):
    lock, log, text = tmp_path / ".lock", tmp_path / "metrics.jsonl", f"process 1 on not-{socket.gethostname()}"
    lock.write_text(text)
    log.write_text("")
    before = time.time() - 3600
    os.utime(lock, (before, before))  # it is written once, at the start
    assert holder(location(tmp_path)) == text
    os.utime(log, (before, before))
    assert holder(location(tmp_path)) == ""


def test_a_run_in_a_bucket_is_read_and_its_holder_seen(finished, bucket):
    run = f"{bucket}/run"
    for path in Path(finished).rglob("*"):
        if path.is_file() and "tensorboard" not in path.parts and not path.name.startswith("."):
            (location(run) / path.relative_to(finished)).write_bytes(path.read_bytes())
    (stage,) = run_status(run)["stages"]
    assert (stage["state"], stage["step"], [c["state"] for c in stage["checkpoints"]]) == (
        "complete",
        12,
        ["complete"] * 2,
    )
    with exclusive(run):
        assert run_status(run)["stages"][0]["holder"].startswith(f"process {os.getpid()} on ")
    assert holder(location(run)) == ""


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    line = json.dumps({"step": 1, "loss": 1.0, "pad": "x" * 1000}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 1000 + '{"step": 2, "lo')
    found = last_steps(tmp_path)
    assert 100 < len(found) < 1000 and found[-1]["step"] == 1 and last_steps(tmp_path / "none") == []


def test_the_last_steps_of_a_log_of_several_files_are_in_the_last_ones(tmp_path):
    lines = [json.dumps({"step": step, "pad": "x" * 1000}) + "\n" for step in range(1000)]
    for name, some in (("", lines[:500]), (".0001", lines[500:998]), (".0002", lines[998:])):
        (tmp_path / f"metrics.jsonl{name}").write_text("".join(some))
    found = [line["step"] for line in last_steps(tmp_path)]
    assert 100 < len(found) < 400 and found == list(range(1000 - len(found), 1000))


@pytest.mark.parametrize("before", [3, 1000])
def test_a_damaged_line_of_the_log_is_named_by_its_number_in_the_file(finished, tmp_path, capsys, before):
    run = shutil.copytree(finished, tmp_path / "run")
    line = json.dumps({"step": 1, "loss": 1.0, "pad": "x" * 1000}) + "\n"
    (run / "metrics.jsonl").write_text(line * before + '{"step": 2, "lo\n' + line)
    assert main(["status", str(run)]) == 2
    error = capsys.readouterr().err
    assert f"{run}/metrics.jsonl line {before + 1} is damaged" in error and error.count("\n") == 1


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
