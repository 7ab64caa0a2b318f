"""One run in two real processes, whose collectives are gloo's, against the same run in one."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.errors import MISTAKEN, PREEMPTED, UserError
from moe_jax.files import read_lines
from moe_jax.overrides import to_dict
from moe_jax.train import agreement, trainer
from moe_jax.train.checkpoint import complete_steps, load_parameters
from moe_jax.train.metrics import read_metrics
from moe_jax.train.trainer import fit

MESH = ["mesh.fsdp=2", "mesh.expert=2"]
CONSTANT = "optimizer.schedule=constant"  # else another number of steps is another schedule


def start(
    tiny, run: Path, *options: str, processes: int = 2, devices: int = 2, folders: Sequence[Path | None] = ()
) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "moe_jax", "train", str(tiny.root / "config.json"), "--run", str(run)]
    common = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_COORDINATOR_ADDRESS": address}
    return [
        subprocess.Popen(
            [*command, *MESH, *options],
            env=tiny.env | common | {"JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)},
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, folder in enumerate(folders or [None] * processes)
    ]


def finish(children: list[subprocess.Popen]) -> tuple[list[int], str]:
    said = "".join(child.communicate(timeout=240)[1] for child in children)
    return [child.returncode for child in children], said


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run)]


@pytest.fixture(scope="module")
def in_two(tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("processes") / "run"
    statuses, said = finish(start(tiny, run))
    assert statuses == [0, 0], said
    return run


def test_two_processes_train_what_one_trains(tiny, in_two, tmp_path):
    one = fit(tiny.variant(*MESH), tmp_path / "one", jax.devices()[:4])
    np.testing.assert_allclose(losses(in_two), losses(Path(one)), rtol=2e-5)
    for name, array in load_parameters(one)[1].items():
        np.testing.assert_allclose(load_parameters(in_two)[1][name], array, rtol=1e-3, atol=2e-4, err_msg=name)
    environment = json.loads((in_two / "environment.json").read_text())
    assert (environment["processes"], environment["devices"]) == (2, "4 x cpu")
    assert [line["step"] for line in read_metrics(in_two)] == list(range(1, 13))  # one writer
    for mine, its in zip(read_metrics(in_two), read_metrics(Path(one)), strict=True):
        counts = [line["tokens_per_second"] * line["seconds"] for line in (mine, its)]
        assert round(counts[0]) == round(counts[1]) >= mine["tokens"] == its["tokens"]


def test_processes_of_other_options_or_held_out_text_are_told_apart(tiny, monkeypatch):
    def differ(*others, text=("a",)):
        shares = [{"data": "1", "heldout": ["a"], "config": to_dict(tiny.cfg)}]
        shares += [{"data": "1", "heldout": list(text), "config": to_dict(tiny.variant(*others))}]
        monkeypatch.setattr(trainer, "together", lambda name, work, minutes: shares)
        trainer._require_same_everywhere(tiny.cfg, data="1", heldout=["a"])

    differ()
    differ("data.cache_dir=/local/1", "data.tokenizer=/local/t.json", "data.sources.0.path=/local/1.txt")
    with pytest.raises(UserError, match=r"process 1 differs from process 0 in its optimizer\.b1; start all with"):
        differ("optimizer.b1=0.5")
    with pytest.raises(UserError, match=r"in its heldout, steps; start"):
        differ("steps=7", text=("b",))


def test_a_host_waits_days_for_one_that_still_reads_all_text(tiny, monkeypatch):
    waited = {}

    class Service:
        def wait_at_barrier(self, name, milliseconds):
            waited[name] = milliseconds / 3_600_000
            raise TimeoutError

        def key_value_set(self, *_):
            pass

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.distributed.global_state, "client", Service())
    for options, hours in (((), 168), (("data.cache_dir=gs://b/tokens",), 2)):
        with pytest.raises(TimeoutError):
            trainer._require_same_everywhere(tiny.variant(*options))
        assert waited.popitem()[1] == hours
    with pytest.raises(TimeoutError):
        agreement.together("other", lambda: None)
    assert waited.popitem()[1] == 0.5


def test_processes_that_read_different_text_do_not_start(tiny, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "text.txt").write_text((tiny.root / "train.txt").read_text() + f"\n\nonly in {folder.name}")
    options = ["data.sources.0.path=text.txt", f"data.cache_dir={tmp_path}/tokens"]
    statuses, said = finish(start(tiny, tmp_path / "run", *options, folders=folders))
    assert MISTAKEN in statuses and 0 not in statuses, said
    assert "process 1 differs from process 0 in its data; start all with the same command" in said
    assert not (tmp_path / "run/config.json").exists()


def test_a_notice_to_one_process_is_granted_by_both_at_one_step(tiny, in_two, tmp_path):
    run = tmp_path / "run"
    children = start(tiny, run)
    while not read_lines(run / "events.jsonl"):  # it has started, and compiles
        assert all(child.poll() is None for child in children)
        time.sleep(0.02)
    children[1].send_signal(signal.SIGTERM)
    statuses, said = finish(children)
    assert statuses == [PREEMPTED, PREEMPTED] and said.count("is saved in") == 2, said
    step = complete_steps(run)[-1]
    statuses, said = finish(start(tiny, run))
    assert statuses == [0, 0], said
    assert [e["step"] for e in read_lines(run / "events.jsonl") if e["event"] == "start"] == [0, step]
    assert losses(run) == losses(in_two)


@pytest.fixture(scope="module")
def half_and_whole(tiny, tmp_path_factory) -> tuple[Path, Path]:
    """8 steps in two processes, and all 12 in one."""
    folder = tmp_path_factory.mktemp("others")
    statuses, said = finish(start(tiny, folder / "half", "steps=8", CONSTANT))
    assert statuses == [0, 0], said
    return folder / "half", Path(fit(tiny.variant(*MESH, CONSTANT), folder / "whole", jax.devices()[:4]))


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (4, 1)])
def test_a_run_goes_on_in_another_number_of_processes(tiny, half_and_whole, tmp_path, processes, devices):
    half, whole = half_and_whole
    run = shutil.copytree(half, tmp_path / "run")
    statuses, said = finish(start(tiny, run, CONSTANT, processes=processes, devices=devices))
    assert set(statuses) == {0}, said
    assert complete_steps(run)[-1] == 12
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-4)


def test_what_one_process_refuses_ends_all(tiny, in_two):
    statuses, said = finish(start(tiny, in_two, "data.seed=3"))
    assert MISTAKEN in statuses and 0 not in statuses
    assert "data.seed was 0, is 3" in said
