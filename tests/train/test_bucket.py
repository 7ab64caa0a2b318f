"""A run whose folder, data and tokenizer are in a bucket is the run on a disk, also when it is killed."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.files import location, read_lines, sizes_below, write_bytes, write_json
from moe_jax.overrides import to_dict
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train.checkpoint import Checkpoints, complete_steps
from moe_jax.train.metrics import read_metrics
from moe_jax.train.state import abstract_state
from moe_jax.train.tensorboard import EventFile
from tests.object_store import BUCKET, object_store
from tests.train.test_metrics import whole_records

RUN = f"gs://{BUCKET}/runs/a"


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    with object_store() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.items():
            patch.setenv(name, value)
        yield found


def losses(run: str | Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(run)]


def test_curves_of_a_long_run_are_in_files_of_which_only_the_last_is_put_again(environment, monkeypatch):
    monkeypatch.setattr("moe_jax.train.tensorboard._SECONDS", 0.0)
    monkeypatch.setattr("moe_jax.train.tensorboard.PART_BYTES", 500)
    folder = location(f"gs://{BUCKET}/curves")
    events = EventFile(folder, 1)
    seen: dict[str, bytes] = {}
    for step in range(1, 41):
        events.scalars(step, {"loss": float(step)})
        now = {name: (folder / name).read_bytes() for name in sorted(sizes_below(folder))}
        assert now.items() >= seen.items()
        seen = dict(list(now.items())[:-1])  # all but the last are complete
    events.close()
    paths = sorted(folder.iterdir(), key=lambda path: path.name)
    assert len(paths) > 3 and all(path.stat().length < 700 for path in paths)
    records = [record for path in paths for record in whole_records(path.read_bytes())]
    points = [struct.unpack("<f", r[-4:])[0] for r in records if b"loss" in r]
    assert points == [float(step) for step in range(1, 41)]


def test_a_put_of_curves_that_fails_ends_no_run_and_loses_no_point(environment, monkeypatch):
    def refused(*_):
        raise ConnectionError("503")

    monkeypatch.setattr("moe_jax.train.tensorboard._SECONDS", 0.0)
    monkeypatch.setattr("moe_jax.train.tensorboard.PART_BYTES", 300)
    folder = location(f"gs://{BUCKET}/refused")
    events = EventFile(folder, 1)
    with monkeypatch.context() as broken:
        broken.setattr("moe_jax.train.tensorboard.write_bytes", refused)
        for step in range(1, 11):
            events.scalars(step, {"loss": float(step)})
        assert sizes_below(folder) == {}
    events.scalars(11, {"loss": 11.0})
    events.close()
    records = [r for path in sorted(folder.iterdir(), key=str) for r in whole_records(path.read_bytes())]
    assert [struct.unpack("<f", r[-4:])[0] for r in records if b"loss" in r] == [float(i) for i in range(1, 12)]


def test_a_run_in_a_bucket_killed_in_a_save_equals_the_one_on_a_disk(tiny, finished, environment, tmp_path):
    for name in ("train.txt", "tokenizer.json"):
        write_bytes(f"gs://{BUCKET}/{name}", (tiny.root / name).read_bytes())
    cfg = to_dict(tiny.variant(f"data.tokenizer=gs://{BUCKET}/tokenizer.json"))
    cfg["data"]["sources"][0]["path"] = f"gs://{BUCKET}/*.txt"
    write_json(tmp_path / "config.json", cfg)
    script = Path(__file__).with_name("killed.py")
    for where, step, status in (("save", 8, -signal.SIGKILL), ("none", 0, 0)):
        command = [sys.executable, script, tmp_path / "config.json", RUN, where, str(step)]
        result = subprocess.run(command, env=tiny.env | environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == status, result.stderr
        if where == "save":  # neither half of a checkpoint counts, nor the lease of the dead
            assert complete_steps(RUN) == [4] and location(f"{RUN}/.lock").exists()
    assert [line["step"] for line in read_lines(f"{RUN}/events.jsonl") if line["event"] == "start"] == [0, 4]
    assert losses(RUN) == losses(finished) and len(losses(RUN)) == 12
    assert complete_steps(RUN) == [8, 12] and not location(f"{RUN}/.lock").exists()

    newest = f"{RUN}/checkpoints/12"
    sizes = sizes_below(newest)
    shard = max(sizes, key=sizes.__getitem__)
    content = bytearray(location(f"{newest}/{shard}").read_bytes())
    content[len(content) // 2] ^= 1
    write_bytes(f"{newest}/{shard}", bytes(content))
    checkpoints = Checkpoints(RUN, tiny.cfg.checkpoint)
    found = checkpoints.restore_latest(abstract_state(tiny.cfg, single_device_mesh()))
    assert found is not None and found[2] == 8
    (damage,) = checkpoints.set_aside
    assert shard in damage["reason"] and sizes_below(damage["moved_to"]).keys() == sizes.keys()
