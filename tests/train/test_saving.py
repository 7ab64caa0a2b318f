"""What a run does around each save, and what a checkpoint tells the guard of the run that goes on from it."""

from __future__ import annotations

import contextlib
import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from moe_jax.errors import UserError
from moe_jax.train import trainer
from moe_jax.train.checkpoint import Checkpoints, checkpoint_path, describe
from moe_jax.train.metrics import Metrics, read_metrics
from moe_jax.train.trainer import _Pending, _Trainer
from tests.train.test_trainer import RARE, altered, losses


def test_before_each_save_the_log_is_where_it_is_kept_and_the_folder_still_this_runs(tiny, tmp_path, monkeypatch):
    done = []

    def spied(owner: type, name: str) -> None:
        work = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kw: done.append(name) or work(*args, **kw))

    @contextlib.contextmanager
    def exclusive(_):
        yield lambda: done.append("still ours")

    spied(Metrics, "flush")
    spied(Checkpoints, "save")
    monkeypatch.setattr(trainer, "exclusive", exclusive)
    tiny.fit(tmp_path / "run")
    assert done == ["flush", "still ours", "save"] * 3


def test_a_run_whose_folder_was_taken_over_saves_no_more(tiny, tmp_path, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def exclusive(run_dir):
        def check() -> None:
            asked.append(len(asked))
            if len(asked) == 2:
                raise UserError(f"{run_dir} was taken over")

        yield check

    monkeypatch.setattr(trainer, "exclusive", exclusive)
    with pytest.raises(UserError, match="was taken over"):
        tiny.fit(tmp_path / "run")
    assert read_metrics(tmp_path / "run")[-1]["step"] == 8
    assert not list((tmp_path / "run/checkpoints").glob("8*"))


def test_a_resumed_run_judges_a_spike_by_the_losses_before_its_checkpoint(tiny, finished, tmp_path, monkeypatch):
    stored = describe(checkpoint_path(finished, None))[0]["recent_losses"]
    assert stored == list(losses(finished).values())
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")
    altered(monkeypatch, 9, lambda batch: batch | {"targets": batch["targets"] * 0 + RARE})
    with pytest.raises(UserError, match=r"loss is \S+ at step 10 on batch 9"):  # two losses after the resume
        tiny.fit(run, "guard.spike_factor=1.3")


@pytest.mark.parametrize(("ready", "kind"), [(None, "data"), (True, "data"), (False, "step")])
def test_preparing_a_batch_loses_time_only_where_no_step_is_at_work(ready, kind):
    loss: Any = SimpleNamespace(is_ready=lambda: ready)
    waiting: Any = SimpleNamespace(pending=None if ready is None else _Pending(1, {"loss": loss}, 0))
    assert _Trainer._data_or_step(waiting) == kind
