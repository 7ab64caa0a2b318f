"""Checkpoints of two processes of two devices each: every leaf bit for bit, damage and failure agreed on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax.config import MeshConfig
from moe_jax.train.checkpoint import complete_steps, health
from moe_jax.train.state import abstract_state
from moe_jax.train.stored import _shard_bytes
from tests.tiny import mesh_of, run_config
from tests.train.conftest import restore
from tests.train.sharded import digests

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The run folder and, for each process, all that it told."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_ADDRESS": address}
    env = os.environ | common | {"JAX_NUM_PROCESSES": "2", "PYTHONPATH": str(ROOT)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.sharded", run],
            env=env | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        second = children[1].communicate(timeout=200)[0]
    finally:  # as the supervisor does: the first waits for a peer that is gone
        for child in children:
            child.kill()
    said = [children[0].communicate()[0], second]
    return run, [dict(_named(line) for line in text.splitlines() if line.startswith("{")) for text in said]


def _named(line: str) -> tuple[str, dict[str, Any]]:
    """A finding's first key names it, for a save with the step."""
    finding = json.loads(line)  # gloo's own lines are none
    name, value = next(iter(finding.items()))
    return f"saved {value}" if name == "saved" else name, finding


def test_both_complete_the_same_checkpoints(story):
    _, told = story
    for process in told:
        assert [entry["step"] for entry in process["completed"]["completed"]] == [1, 2]


def test_damage_that_one_process_sees_is_damage_for_both(story):
    run, told = story
    for process in told:
        (entry,) = process["restored"]["set_aside"]
        assert entry["reason"].startswith("model/ocdbt.process_1/") and "(checksum)" in entry["reason"]
    assert told[0]["restored"]["set_aside"] == told[1]["restored"]["set_aside"]
    assert [(e["step"], e["state"]) for e in health(run)][:2] == [(1, "complete"), (2, "damaged")]


def test_two_processes_restore_every_leaf_on_another_mesh(story):
    _, told = story
    assert told[0]["saved 1"]["digests"] != told[0]["saved 2"]["digests"]
    for process in told:
        assert process["restored"]["restored"] == 1
        assert process["restored"]["digests"] == process["saved 1"]["digests"]


@pytest.mark.parametrize("sizes", [MeshConfig(1, 1, 1), MeshConfig(data=1, fsdp=2, expert=2, tensor=2)])
def test_one_process_restores_every_leaf_of_two(story, sizes):
    run, told = story
    restored, _ = restore(run, abstract_state(run_config(mesh=sizes), mesh_of(sizes)), 1)
    assert jax.process_count() == 1 and digests(restored) == told[0]["saved 1"]["digests"]


def test_a_shard_is_counted_as_all_bytes_of_the_chunks_that_it_touches():
    """Rows 3 to 6 of the second shard lie in the chunks of rows 0 to 4 and 4 to 8."""
    sharding = NamedSharding(mesh_of(MeshConfig(fsdp=4)), PartitionSpec("fsdp"))
    leaf = jax.ShapeDtypeStruct((12, 5), np.float32, sharding=sharding)
    chunks = SimpleNamespace(chunk_shape=(4, 5))
    stored = SimpleNamespace(shape=leaf.shape, dtype=leaf.dtype, storage_metadata=chunks)
    assert _shard_bytes(leaf, stored) == 8 * 5 * 4


def test_a_save_that_fails_in_one_process_is_told_by_it(story):
    run, told = story
    assert f"{run}/checkpoints/3 failed (process 1: " in told[1]["failed"]["failed"]
    assert "the last good one is step 1" in told[1]["failed"]["failed"]
    assert complete_steps(run) == [1]
