"""Whatever stops a run, its successor repeats the lost steps bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.files import read_lines
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train import trainer
from moe_jax.train.checkpoint import complete_steps, load_parameters
from moe_jax.train.metrics import Metrics, read_metrics
from moe_jax.train.state import abstract_state
from tests.train.conftest import restore


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run)]


def starts(run: Path) -> list[int]:
    return [line["step"] for line in read_lines(run / "events.jsonl") if line["event"] == "start"]


def final_bytes(tiny, run: Path) -> list[bytes]:
    """Every leaf of the last checkpoint: parameters, biases, moments, step."""
    state, _ = restore(run, abstract_state(tiny.cfg, single_device_mesh()))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def test_run_killed_twice_equals_the_uninterrupted_run_bit_for_bit(tiny, finished, tmp_path):
    run = tmp_path / "run"
    script = Path(__file__).with_name("killed.py")
    for where, step, status in (("log", 7, -signal.SIGKILL), ("save", 8, -signal.SIGKILL), ("none", 0, 0)):
        command = [sys.executable, script, tiny.root / "config.json", run, where, str(step)]
        result = subprocess.run(command, env=tiny.env, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr
        if where == "save":  # the kill left a half-written checkpoint and it does not count
            assert complete_steps(run) == [4]
            assert any("tmp" in path.name for path in (run / "checkpoints").iterdir())
    assert starts(run) == [0, 4, 4]
    assert losses(run) == losses(finished)
    assert final_bytes(tiny, run) == final_bytes(tiny, finished)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["12", "8"]


def test_second_resume_continues_the_same_batches(tiny, finished, tmp_path, monkeypatch):
    seen: dict[int, bytes] = {}
    put_batch, log = trainer.put_batch, Metrics.log

    class Interrupted(Exception):
        pass

    def fit(stop: int) -> list[bytes]:
        batches: list[bytes] = []

        def put(batch, mesh):
            batches.append(batch["tokens"].tobytes())
            return put_batch(batch, mesh)

        def stopping_log(self, step, *args):
            log(self, step, *args)
            if step == stop:
                raise Interrupted

        monkeypatch.setattr(trainer, "put_batch", put)
        monkeypatch.setattr(Metrics, "log", stopping_log)
        try:
            tiny.fit(tmp_path / "run")
        except Interrupted:
            saved = (stop - 1) // 4 * 4  # once that is complete, the next start is known
            while max(complete_steps(tmp_path / "run"), default=0) < saved:
                time.sleep(0.01)
        return batches

    for start, stop in ((0, 5), (4, 9), (8, 12)):
        for index, batch in enumerate(fit(stop), start + 1):
            assert seen.setdefault(index, batch) == batch
    assert starts(tmp_path / "run") == [0, 4, 8]
    assert sorted(seen) == list(range(1, 13)) and len(set(seen.values())) == 12
    assert losses(tmp_path / "run") == losses(finished)


def test_finished_run_started_again_does_nothing(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "checkpoints/12/checksums.json").stat().st_mtime_ns
    tiny.fit(run)
    assert (run / "checkpoints/12/checksums.json").stat().st_mtime_ns == before
    assert losses(run) == losses(finished)


def test_another_accumulation_is_another_balance_loss(tiny, finished, tmp_path):
    """It is a product of two means of a microbatch, so that a resumed run would train for something else."""
    run = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["moe"]["aux_loss"] = 0.01
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gradient_accumulation was 1, is 2"):
        tiny.fit(run, "model.moe.aux_loss=0.01", "gradient_accumulation=2")


def test_a_run_whose_checkpoints_are_gone_does_not_go_over_its_log(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints is empty, where step 12 was saved; put a checkpoint back"):
        tiny.fit(run)
    assert losses(run) == losses(finished)


def launch(tiny, run: Path, *options: str) -> subprocess.Popen:
    command = ["-m", "launch", "local", str(tiny.root / "config.json"), "--run", str(run), *options]
    return subprocess.Popen(
        [sys.executable, *command], env=tiny.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_launcher_restarts_a_killed_trainer_on_two_devices_from_its_checkpoint(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")  # as a kill after the save of step 8 would have left it
    launcher = launch(tiny, run, "--max-restarts", "1", "--devices", "2")
    deadline = time.monotonic() + 200
    while len(starts(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)  # it resumed and is still compiling
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, output
    assert "process 0 was killed by SIGKILL; going on from the checkpoint of step 8" in output
    assert starts(run) == [0, 8, 8]
    np.testing.assert_allclose(np.array(losses(run)), np.array(losses(finished)), rtol=1e-4)
    theirs = load_parameters(finished)[1]
    for name, leaf in load_parameters(run)[1].items():
        np.testing.assert_allclose(leaf, theirs[name], atol=1e-3, err_msg=name)


def test_launcher_does_not_restart_what_the_user_must_mend(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    launcher = launch(tiny, tmp_path / "run")
    output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 2
    assert "notes.txt" not in output and "no run folder; name another" in output and "try 2" not in output
