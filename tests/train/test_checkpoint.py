"""Checkpoints are whole or refused, and a save that fails says so."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError
from moe_jax.files import location
from moe_jax.model.describe import describe
from moe_jax.overrides import to_dict
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train import checkpoint, stored
from moe_jax.train.catalogue import checkpoint_path, remove
from moe_jax.train.checkpoint import Checkpoints, complete_steps, final_checkpoint, health, load_parameters
from moe_jax.train.checksums import Record, digest, file_sizes, read_record, write_record
from moe_jax.train.evaluate import evaluate
from moe_jax.train.state import TrainState, abstract_state, init_state, state_shardings
from tests.train.conftest import restore


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def state(tiny):
    return init_state(tiny.cfg, single_device_mesh())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: Path) -> str:
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:100])
    return f"{path.name} has 100 bytes instead of {size}"


def delete(path: Path) -> str:
    path.unlink()
    return f"{path.name} is missing"


def flip(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return rf"{path.name} is not what was written \(checksum\)"


DAMAGES = {"truncated": truncate, "deleted": delete, "flipped": flip}


def test_every_leaf_returns_bit_for_bit_and_the_donated_state_is_safe(tiny, state, tmp_path):
    kept = jax.tree.map(np.asarray, jax.tree.leaves(state.params))
    stored = {"config": to_dict(tiny.cfg), "data": {"position": {"next_index": 3}}}
    copy = jax.tree.map(lambda leaf: leaf.copy(), state)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2))
    checkpoints.save(3, copy, stored)
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(add(copy.params))  # what the next step does while the save is under way
    checkpoints.wait()
    restored, metadata = restore(tmp_path, abstract_state(tiny.cfg, single_device_mesh()))
    for got, want in zip(jax.tree.leaves(restored.params), kept, strict=True):
        np.testing.assert_array_equal(got, want)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert metadata["data"] == stored["data"]


@pytest.mark.parametrize("saved", [False, True])
def test_moments_kept_in_the_hosts_memory_or_not_go_on_either_way(tiny, state, tmp_path, saved):
    mesh, variants = (
        single_device_mesh(),
        {kept: tiny.variant(f"optimizer.offload={kept}") for kept in (False, True)},
    )
    waves = jax.tree.map(
        lambda leaf: (9 * jnp.sin(jnp.arange(leaf.size))).reshape(leaf.shape).astype(leaf.dtype), state.opt_state
    )
    filled = jax.device_put(replace(state, opt_state=waves), state_shardings(variants[saved], mesh))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, filled, {"config": to_dict(tiny.cfg), "data": {}})
    checkpoints.wait()
    for kept, cfg in variants.items():
        restored, _ = restore(tmp_path, abstract_state(cfg, mesh))
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(filled), strict=True):
            np.testing.assert_array_equal(got, want)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.opt_state) if leaf.ndim}
        assert kinds == {"pinned_host" if kept else "device"}


def test_a_checkpoint_of_an_earlier_version_with_a_leaf_that_is_gone_is_read(tiny, state, tmp_path):
    @jax.tree_util.register_dataclass
    @dataclass
    class Former(TrainState):
        rng: jax.Array

    former = Former(**vars(state), rng=jnp.zeros(2, jnp.uint32))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(3, former, {"config": to_dict(tiny.cfg), "data": {}})
    checkpoints.wait()
    restored, _ = restore(tmp_path, abstract_state(tiny.cfg, single_device_mesh()))
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(got, want)


def test_loaded_parameters_are_every_described_leaf_and_nothing_else(tiny, finished):
    cfg, parameters = load_parameters(finished)
    assert cfg == tiny.cfg
    described = {path: leaf.shape for path, leaf in describe(cfg.model).items()}
    assert {path: leaf.shape for path, leaf in parameters.items()} == described
    assert all(isinstance(leaf, np.ndarray) for leaf in parameters.values())


def test_an_earlier_step_can_be_named(finished):
    early, late = load_parameters(finished, 8)[1], load_parameters(finished)[1]
    assert any((early[name] != late[name]).any() for name in late)
    with pytest.raises(UserError, match="no complete checkpoint of step 5; it has 8, 12"):
        load_parameters(finished, 5)


@pytest.mark.parametrize(
    "override, names",
    [
        ("model.d_model=64", ["embed/embedding is float32[290, 32] instead of float32[290, 64]"]),
        ("model.moe=none", ["layers/ffn/gate_up is missing", "layers/ffn/router/bias is unknown"]),
        ("model.moe.shared_expert_width=0", ["layers/ffn/shared/down is unknown"]),
    ],
)
def test_leaves_that_do_not_fit_are_named(tiny, run, override, names):
    abstract = abstract_state(tiny.variant(override), single_device_mesh())
    before = files(run)
    with pytest.raises(UserError) as caught:
        restore(run, abstract)
    assert all(name in str(caught.value) for name in names)
    assert files(run) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parameters_are_refused_and_the_one_before_named(run, damage):
    reason = DAMAGES[damage](largest(run / "checkpoints/12/model"))
    with pytest.raises(UserError, match=rf"{reason}.*remove it to fall back to step 8"):
        load_parameters(run)
    assert load_parameters(run, 8)


def test_parameters_are_read_from_a_checkpoint_whose_moments_are_damaged(run, finished):
    flip(largest(run / "checkpoints/12/optimizer"))
    theirs = load_parameters(finished)[1]
    assert all((leaf == theirs[name]).all() for name, leaf in load_parameters(run)[1].items())


def test_neither_a_next_stage_nor_an_evaluation_starts_from_damaged_parameters(tiny, run, tmp_path):
    reason = flip(largest(run / "checkpoints/12/model"))
    with pytest.raises(UserError, match=reason):
        tiny.fit(tmp_path / "next", f"init_from={run}")
    with pytest.raises(UserError, match=reason):
        evaluate(run)


@pytest.mark.parametrize("gone", ["all", "record"])
def test_a_checkpoint_that_goes_while_it_is_read_is_told(run, monkeypatch, gone):
    described = stored.describe

    def retained_no_longer(path):
        found = described(path)
        remove(path) if gone == "all" else (path / "checksums.json").unlink()
        return found

    monkeypatch.setattr(stored, "describe", retained_no_longer)
    with pytest.raises(UserError, match="was removed while it was read"):
        load_parameters(run)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("tree", ["model", "optimizer", "."])
def test_damage_is_named_and_set_aside_and_the_one_before_is_restored(tiny, run, tree, damage):
    if tree == ".":
        target = run / "checkpoints/12/_CHECKPOINT_METADATA"
    else:
        target = largest(run / "checkpoints/12" / tree)
    before = files(run / "checkpoints/8")
    reason = DAMAGES[damage](target)
    after = files(run / "checkpoints/12")
    checkpoints = Checkpoints(run)
    found = checkpoints.restore_latest(abstract_state(tiny.cfg, single_device_mesh()))
    assert found is not None and found[2] == 8 == int(found[0].step)
    (entry,) = checkpoints.set_aside
    assert entry["path"] == str(run / "checkpoints/12") and re.search(reason, entry["reason"])
    moved = Path(entry["moved_to"])
    assert moved.name.startswith("12.damaged-") and files(moved) == after
    assert files(run / "checkpoints/8") == before and complete_steps(run) == [8]
    assert [e["state"] for e in health(run)] == ["complete", "damaged"]


def test_a_file_in_place_of_a_folder_is_damage(tiny, run):
    shutil.rmtree(run / "checkpoints/12/model")
    (run / "checkpoints/12/model").write_text("")
    checkpoints = Checkpoints(run)
    found = checkpoints.restore_latest(abstract_state(tiny.cfg, single_device_mesh()))
    assert found is not None and found[2] == 8
    assert checkpoints.set_aside[0]["reason"].endswith("is missing")


def test_an_altered_record_is_damage(tiny, run):
    path = run / "checkpoints/12/checksums.json"
    path.write_text(path.read_text().replace('"final": true', '"final": false'))
    checkpoints = Checkpoints(run)
    found = checkpoints.restore_latest(abstract_state(tiny.cfg, single_device_mesh()))
    assert found is not None and found[2] == 8
    assert checkpoints.set_aside[0]["reason"] == "checksums.json is not what was written"


def test_a_run_of_damaged_checkpoints_alone_is_refused_until_they_are_removed(tiny, run):
    abstract = abstract_state(tiny.cfg, single_device_mesh())
    for step in (8, 12):
        flip(largest(run / "checkpoints" / str(step)))
    for reason in ("is not what was written", "damaged-"):  # also when it is started again
        with pytest.raises(UserError, match=rf"only damaged checkpoints .*12.damaged-.*{reason}.*another folder"):
            Checkpoints(run).restore_latest(abstract)
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    assert Checkpoints(run).restore_latest(abstract) is None


def test_another_shape_is_no_damage(tiny, run):
    before = files(run)
    with pytest.raises(UserError, match=r"does not fit this config.*use its own config"):
        Checkpoints(run).restore_latest(abstract_state(tiny.variant("model.d_model=64"), single_device_mesh()))
    assert files(run) == before


def test_half_written_folders_do_not_count_and_are_cleaned(run):
    (run / "checkpoints/12/checksums.json").unlink()  # killed between Orbax's commit and the record
    (run / "checkpoints/16.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints/20.damaged-1").mkdir()
    assert complete_steps(run) == [8]
    assert sorted(Checkpoints(run).clean()) == ["12", "16.orbax-checkpoint-tmp"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20.damaged-1", "8"]


def test_a_checkpoint_whose_removal_is_killed_no_longer_counts(run, monkeypatch):
    path = checkpoint_path(run, 12)

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(path)
    assert complete_steps(run) == [8]


def test_marking_a_checkpoint_final_changes_nothing_else_of_its_record(run):
    path = checkpoint_path(run, 8)
    before = read_record(path)
    Checkpoints(run).mark_final(8)
    assert not before.final and read_record(path) == replace(before, final=True)


def test_the_newest_final_checkpoint_is_found(run):
    assert final_checkpoint(run).name == "12"
    shutil.rmtree(run / "checkpoints/12")
    with pytest.raises(UserError, match="stopped at step 8 and has no final checkpoint; finish it first"):
        final_checkpoint(run)


def test_a_foreign_checkpoint_is_refused(tmp_path):
    from orbax.checkpoint import v1 as ocp

    tree: Any = {"w": np.ones(3)}
    path = location(tmp_path / "checkpoints/3")
    ocp.save(str(path), tree)
    contents = {name: (size, digest(path / name)) for name, size in file_sizes(path).items()}
    write_record(path, Record(contents, 3, False, None, 0.0))
    with pytest.raises(UserError, match="no checkpoint of this trainer"):
        load_parameters(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint; train it first"):
        load_parameters(tmp_path / "nowhere")


def test_a_checkpoint_with_an_unknown_option_is_refused(tiny, state, tmp_path):
    config = to_dict(tiny.cfg) | {"new_option": 1}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    checkpoints.save(1, state, {"config": config, "data": {}})
    checkpoints.wait()
    with pytest.raises(UserError, match="new_option"):
        load_parameters(tmp_path)


def test_a_save_that_fails_in_the_background_is_an_error_and_the_last_good_one_stays(tiny, state, tmp_path):
    script = Path(__file__).with_name("full_disk.py")
    child = subprocess.run(
        [sys.executable, script, tiny.root / "config.json", tmp_path], env=tiny.env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    message = child.stdout
    assert f"{tmp_path / 'checkpoints/2'} failed (process 0: " in message and "free disk space" in message
    assert "the last good one is step 1" in message and message.count("\n") == 1
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    assert complete_steps(tmp_path) == [1]
    restore(tmp_path, abstract_state(tiny.cfg, single_device_mesh()))
    checkpoints.save(3, state, {"config": to_dict(tiny.cfg), "data": {}})  # room again: what was left behind goes
    checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_nothing_older_goes_before_the_new_one_is_complete(tiny, state, tmp_path, monkeypatch):
    seen: list[list[int]] = []
    write = checkpoint.write_record

    def look(path, record):
        seen.append(complete_steps(tmp_path))
        write(path, record)

    monkeypatch.setattr(checkpoint, "write_record", look)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    for step in (1, 2, 3):
        checkpoints.save(step, state, {}, final=step == 1)
    checkpoints.wait()
    assert seen == [[], [1], [1, 2]] and complete_steps(tmp_path) == [1, 3]
    assert [entry["step"] for entry in checkpoints.completed] == [1, 2, 3]


def test_a_save_that_cannot_start_names_path_and_mend(tiny, state, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoints/1 failed .*there is no earlier one"):
        Checkpoints(tmp_path).save(1, state, {"config": to_dict(tiny.cfg)})


def test_stored_json_holds_config_data_and_tokenizer(tiny, finished):
    metadata, _ = stored.describe(checkpoint_path(finished, None))
    assert {"format", "config", "data", "tokenizer"} <= set(metadata)
    assert metadata["config"] == json.loads((finished / "config.json").read_text())
    assert metadata["data"]["position"] == {"next_index": 12}
