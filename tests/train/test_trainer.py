"""What a run refuses, what stops it, and what it tells."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from moe_jax.__main__ import main
from moe_jax.config import SourceConfig
from moe_jax.data.commands import build_tokenizer
from moe_jax.data.pipeline import TrainIterator, heldout_rows
from moe_jax.data.tokenized import tokenize_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import Preempted, UserError
from moe_jax.files import read_lines
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train import evaluate as evaluation
from moe_jax.train import heldout
from moe_jax.train.checkpoint import Checkpoints, checkpoint_path, complete_steps, describe
from moe_jax.train.goodput import KINDS
from moe_jax.train.metrics import Metrics, read_metrics
from moe_jax.train.trainer import fit
from moe_jax.train.watch import Watchdog
from tests.train.conftest import VOCAB, write_corpus
from tests.train.test_metrics import whole_records


def events(run: Path, name: str) -> list[dict]:
    return [line for line in read_lines(run / "events.jsonl") if line["event"] == name]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run)}


RARE = 20  # a byte that no text of the corpus holds


def altered(monkeypatch, number: int, change) -> None:
    """The batch of this number is another one, whenever it comes."""
    take = TrainIterator.__next__

    def altered_take(self):
        due, batch = self.batch_number == number, take(self)
        return change(batch) if due else batch

    monkeypatch.setattr(TrainIterator, "__next__", altered_take)


def poisoned(monkeypatch, *numbers: int) -> None:
    """Batches of these numbers have a loss that is not a number."""
    for number in numbers:
        altered(monkeypatch, number, lambda batch: batch | {"loss_mask": batch["loss_mask"] * np.float32(np.nan)})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def other_tokenizer(folder: Path) -> Path:
    write_corpus(folder / "other.txt", seed=99)
    text = (folder / "other.txt").read_text()[::-1]
    (folder / "other.txt").write_text(text)
    build_tokenizer((SourceConfig(str(folder / "other.txt")),), VOCAB, folder / "other.json")
    return folder / "other.json"


def test_non_finite_loss_stops_the_run_and_names_step_and_batch(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, 7)  # of a step that would have been saved
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"loss is nan at step 8 on batch 7; step 4 stays .* --batch 7"):
        tiny.fit(run)
    assert complete_steps(run) == [4]
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 8))
    (bad,) = events(run, "bad_step")
    assert (bad["quantity"], bad["value"], bad["batch"], bad["action"]) == ("loss", "nan", 7, "stop")
    monkeypatch.undo()
    tiny.fit(run, "log_every=5")  # mended, it goes on; whatever is saved is also logged
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 8, 10, 12]


def test_a_bad_batch_is_skipped_for_good_after_going_back(tiny, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, 5, 9)
    run = tiny.fit(tmp_path / "run", "guard.on_bad_step=skip")
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 13))
    assert [(e["step"], e["batch"]) for e in events(run, "bad_step")] == [(6, 5), (9, 9)]
    assert [e["to"] for e in events(run, "rolled_back")] == [4, 8]
    assert "loss is nan at step 6 on batch 5: back to step 4, past that batch" in capsys.readouterr().err
    stored, _ = describe(checkpoint_path(run, None))
    assert stored["data"]["skipped"] == [5, 9] and stored["data"]["batch_number"] == 14
    # Interrupted between going back and the next checkpoint, it meets the batch again and judges alike.
    other = tmp_path / "other"
    with pytest.raises(Preempted):
        stopped_after(monkeypatch, 7, lambda: tiny.fit(other, "guard.on_bad_step=skip"))
    tiny.fit(other, "guard.on_bad_step=skip")
    assert losses(other) == losses(run)


def stopped_after(monkeypatch, step: int, work) -> None:
    """SIGTERM as soon as `step` is logged."""
    log = Metrics.log

    def signalling(self, at, *args):
        log(self, at, *args)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "log", signalling)
        work()


def test_more_bad_batches_than_allowed_stop_the_run(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, *range(5, 40))
    with pytest.raises(UserError, match=r"loss is nan at step 6 on batch 7; 2 batches were skipped before"):
        tiny.fit(tmp_path / "run", "guard.on_bad_step=skip", "guard.max_skipped=2")
    assert complete_steps(tmp_path / "run") == [4]


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("data.heldout.0.path=nope.jsonl", "no file matches 'nope.jsonl'"),
        ("data.heldout.0.kind=chat", "holds a text where the source says chat"),
    ],
)
def test_held_out_data_that_evaluate_could_not_read_is_told_at_the_start(tiny, tmp_path, capsys, option, why):
    tiny.fit(tmp_path / "run", option, "steps=1")
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "held-out" in line)
    assert said.startswith("held-out data cannot be measured on, as evaluate will: ") and why in said


def test_a_save_may_take_half_an_hour_before_it_counts_as_a_hang(tiny, tmp_path, monkeypatch):
    allowed, last, waited_for = [], {}, threading.Event()
    beat, wait, finish = Watchdog.beat, Checkpoints.wait, Checkpoints._finish

    def beating(self, step, doing="", at_least=0.0):
        last["allowed"] = at_least
        beat(self, step, doing, at_least)

    def waiting(self):
        if self._saver is not None:
            allowed.append(last["allowed"])
            waited_for.set()
        wait(self)

    def finishing(self, *what):
        assert waited_for.wait(60)  # no save is done before somebody waits for it
        waited_for.clear()
        finish(self, *what)

    for owner, name, patched in (
        (Watchdog, "beat", beating), (Checkpoints, "wait", waiting), (Checkpoints, "_finish", finishing)
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, patched)
    poisoned(monkeypatch, 5)
    tiny.fit(tmp_path / "run", "guard.on_bad_step=skip", "checkpoint.every_steps=4", "steps=9")
    assert allowed == [30.0] * 3  # by going back, by the next save and at the end


def test_a_loss_spike_is_a_bad_step(tiny, tmp_path, monkeypatch):
    altered(monkeypatch, 10, lambda batch: batch | {"targets": np.full_like(batch["targets"], RARE)})
    run = tiny.fit(tmp_path / "run", "guard.on_bad_step=skip", "guard.spike_factor=1.3")
    (bad,) = events(run, "bad_step")
    assert (bad["step"], bad["batch"], bad["quantity"]) == (11, 10, "loss")
    assert float(bad["value"]) > 1.3 * max(list(losses(run).values())[8:])


def test_a_preemption_notice_saves_the_step_reached_and_changes_nothing(tiny, finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(Preempted, match=r"SIGTERM: step \d+ is saved"):
        stopped_after(monkeypatch, 5, lambda: tiny.fit(run))
    (event,) = events(run, "preempted")
    assert complete_steps(run)[-1] == event["step"] in (6, 7) and event["signal"] == "SIGTERM"
    tiny.fit(run)
    assert events(run, "start")[-1]["restored"] == event["step"] and events(run, "start")[-1]["lost"] == 0
    assert losses(run) == losses(finished)


def test_no_token_is_lost_from_the_log_by_a_stop_between_its_lines(tiny, tmp_path, monkeypatch):
    whole = tiny.fit(tmp_path / "whole", "log_every=5", "checkpoint.every_steps=100")
    run = tmp_path / "run"
    with pytest.raises(Preempted):
        stopped_after(monkeypatch, 5, lambda: tiny.fit(run, "log_every=5", "checkpoint.every_steps=100"))
    (saved,) = complete_steps(run)
    assert saved % 5 and read_metrics(run)[-1]["step"] == saved
    tiny.fit(run, "log_every=5", "checkpoint.every_steps=100")
    assert sum(line["tokens"] for line in read_metrics(run)) == sum(line["tokens"] for line in read_metrics(whole))


def test_checkpoints_come_by_the_clock_and_the_best_stays(tiny, finished, tmp_path):
    options = ["checkpoint.every_steps=100", "checkpoint.every_minutes=1e-9", "checkpoint.keep=1"]
    run = tiny.fit(tmp_path / "run", *options, "checkpoint.keep_best=True", "optimizer.learning_rate=0.3")
    saved = events(run, "saved")
    assert len(saved) > 3 and saved[-1]["step"] == 12
    best = min(saved, key=lambda event: event["heldout_loss"])
    assert complete_steps(run) == sorted({best["step"], 12})
    for event in events(run, "goodput"):
        assert set(event["seconds"]) == set(KINDS)
    complete = {event["step"]: event for event in events(run, "complete")}
    assert complete.keys() == {event["step"] for event in saved} and complete[12]["bytes"] > 0


def test_the_best_is_what_evaluation_would_call_the_best(tiny, tmp_path, monkeypatch):
    read = []

    def counting(source, *others):
        read.append(source.path)
        return tokenize_source(source, *others)

    monkeypatch.setattr("moe_jax.data.pipeline.tokenize_source", counting)
    options = ["model.moe.dispatch=drop_and_pad", "model.moe.capacity_factor=0.3", "steps=4"]
    options += ["checkpoint.every_steps=1", "checkpoint.keep_best=True", "checkpoint.heldout_batches=1000"]
    run = tiny.fit(tmp_path / "run", *options)
    assert len(read) == 2  # the text and the held-out one, once each
    saved = events(run, "saved")
    assert len(saved) == 4 and sum(read_metrics(run)[-1]["dropped"]) > 0
    assert saved[-1]["heldout_loss"] == pytest.approx(evaluation.evaluate(run)["nats_per_token"], rel=1e-5)
    (curves,) = (run / "tensorboard").iterdir()
    points = [record for record in whole_records(curves.read_bytes()) if b"heldout_loss" in record]
    drawn = [struct.unpack("<f", record[-4:])[0] for record in points]
    assert drawn == pytest.approx([event["heldout_loss"] for event in saved], rel=1e-6)


def test_the_held_out_loss_is_of_the_same_text_whatever_the_microbatch(tiny, monkeypatch):
    def step(_params, _biases, batch):  # a sum that tells texts apart, in place of nats
        return (batch["targets"] * batch["loss_mask"]).sum(), batch["loss_mask"].sum()

    monkeypatch.setattr(heldout, "make_eval_step", lambda *_: step)
    rows = heldout_rows(tiny.cfg.data, Tokenizer.load(tiny.cfg.data.tokenizer))
    state: Any = SimpleNamespace(params=None, biases=None)

    def loss(parts):
        cfg = tiny.variant("checkpoint.heldout_batches=1", f"gradient_accumulation={parts}")
        return heldout.HeldoutLoss(cfg, single_device_mesh(), rows)(state, lambda: None)

    assert loss(1) == loss(2) > 0


def test_a_failed_background_save_stops_the_run_at_once(tiny, tmp_path, monkeypatch):
    save = ocp.save_checkpointables_async

    class Failed:
        def result(self):
            raise OSError(28, "No space left on device")

    def fail_at_8(path, *args, **kwargs):
        return Failed() if Path(path).name == "8" else save(path, *args, **kwargs)

    monkeypatch.setattr(ocp, "save_checkpointables_async", fail_at_8)
    with pytest.raises(UserError, match=r"8 failed .*No space left.*the last good one is step 4"):
        tiny.fit(tmp_path / "run")
    assert complete_steps(tmp_path / "run") == [4]
    assert read_metrics(tmp_path / "run")[-1]["step"] < 12
    monkeypatch.undo()
    tiny.fit(tmp_path / "run")
    assert complete_steps(tmp_path / "run") == [8, 12]


def test_run_folder_tells_what_ran(tiny, finished):
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["devices"] == "1 x cpu"
    assert (finished / "tokenizer.json").read_bytes() == Path(tiny.cfg.data.tokenizer).read_bytes()
    assert not [p for p in finished.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_another_config_in_the_folder_is_refused_with_the_differences(tiny, finished):
    before = contents(finished)
    with pytest.raises(UserError, match=r"model.num_heads was 2, is 1; data.seed was 0, is 1; restore"):
        tiny.fit(finished, "data.seed=1", "model.num_heads=1", "optimizer.b1=0.5")
    assert contents(finished) == before


def test_options_that_change_no_batch_may_change_on_resume_and_are_listed(tiny, finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    tiny.fit(run, "log_every=3", "steps=15", "optimizer.learning_rate=0.001")
    said = "other options: optimizer.learning_rate was 0.01, is 0.001; steps was 12, is 15; log_every was 1, is 3"
    assert said in capsys.readouterr().err
    assert json.loads((run / "config.json").read_text())["log_every"] == 3
    (event,) = events(run, "config_changed")
    assert event["step"] == 12 and event["changes"]["steps"] == [12, 15]
    assert [line["step"] for line in read_metrics(run)][-3:] == [11, 12, 15]
    with pytest.raises(UserError, match=r"at step 15, past steps=12; raise steps"):
        tiny.fit(run)


def test_a_run_without_its_config_says_where_to_find_it(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is gone; put it back \('python -m moe_jax inspect .*--json"):
        tiny.fit(run)


def test_a_finished_run_says_so(tiny, finished, tmp_path, capsys):
    tiny.fit(shutil.copytree(finished, tmp_path / "run"))
    assert capsys.readouterr().err.endswith(f"complete at step 12: {tmp_path / 'run'}\n")


def test_what_all_steps_routed_is_in_the_lines_that_are_written(tiny, finished, tmp_path):
    run = tiny.fit(
        tmp_path / "run", "log_every=4", "model.moe.dispatch=drop_and_pad", "model.moe.capacity_factor=0.5"
    )
    every = tiny.fit(tmp_path / "every", "model.moe.dispatch=drop_and_pad", "model.moe.capacity_factor=0.5")
    lines, all_lines = (read_metrics(folder) for folder in (run, every))
    assert [line["step"] for line in lines] == [4, 8, 12]
    for index, line in enumerate(lines):
        part = all_lines[4 * index : 4 * index + 4]
        assert line["dropped"] == [sum(d) for d in zip(*(p["dropped"] for p in part), strict=True)]
        assert sum(line["dropped"]) > 0


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tiny, tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(UserError, match="name another"):
        tiny.fit(tmp_path)
    assert contents(tmp_path) == {content: b"mine"}


def test_a_file_in_place_of_the_run_folder_is_refused(tiny, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is no run folder"):
        tiny.fit(tmp_path / "run")


def test_a_folder_in_use_is_refused(tiny, tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            tiny.fit(tmp_path)


def test_another_tokenizer_is_refused_on_resume_and_as_a_start(tiny, finished, tmp_path):
    other = other_tokenizer(tmp_path)
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    with pytest.raises(UserError, match="not the one the checkpoint was trained with"):
        tiny.fit(run, f"data.tokenizer={other}")
    assert contents(run) == before
    with pytest.raises(UserError, match="not the one the checkpoint was trained with"):
        tiny.fit(tmp_path / "next", f"data.tokenizer={other}", f"init_from={finished}")


def test_changed_data_is_refused_on_resume(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    corpus = tiny.root / "train.txt"
    kept = corpus.read_text()
    try:
        corpus.write_text(kept + " more alpha")
        with pytest.raises(UserError, match=r"train\.txt"):
            tiny.fit(run, "steps=14")
        with pytest.raises(UserError, match=r"data.sources.0.path was .*, or go on with --new-data"):
            tiny.fit(run, f"data.sources.0.path={tiny.root}/train.*")
        fit(tiny.variant("steps=14"), run, jax.devices()[:1], new_data=True)
    finally:
        corpus.write_text(kept)
    (event,) = events(run, "data_changed")
    assert "train.txt" in event["changes"][0] and complete_steps(run)[-1] == 14


def test_generation_goes_on_with_a_prompt(finished, capsys):
    command = ["generate", str(finished), "--prompt", "alpha beta", "--max-tokens"]
    assert main([*command, "4"]) == 0
    assert len(capsys.readouterr().out) > 1
    assert main([*command, "100"]) == 2
    assert "ask for fewer tokens" in capsys.readouterr().err
