"""Checkpoints are whole or refused, and a save that fails says so."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.errors import UserError
from moe_jax.model.describe import describe
from moe_jax.overrides import to_dict
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train.checkpoint import Checkpoints, complete_steps, load_parameters
from moe_jax.train.state import abstract_state, init_state


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


def test_every_leaf_returns_bit_for_bit_and_the_donated_state_is_safe(tiny, state, tmp_path):
    kept = jax.tree.map(np.asarray, jax.tree.leaves(state.params))
    stored = {"config": to_dict(tiny.cfg), "data": {"position": {"next_index": 3}}}
    copy = jax.tree.map(lambda leaf: leaf.copy(), state)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, copy, stored)
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(add(copy.params))  # what the next step does while the save is under way
    checkpoints.wait()
    restored, metadata = checkpoints.restore(abstract_state(tiny.cfg, single_device_mesh()))
    for got, want in zip(jax.tree.leaves(restored.params), kept, strict=True):
        np.testing.assert_array_equal(got, want)
    assert jax.random.key_data(restored.rng).tolist() == jax.random.key_data(state.rng).tolist()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert metadata["data"] == stored["data"]


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
        Checkpoints(run, 2).restore(abstract)
    assert all(name in str(caught.value) for name in names)
    assert files(run) == before


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(run, damage):
    target = largest(run / "checkpoints/12")
    if damage == "delete":
        target.unlink()
    else:
        target.write_bytes(target.read_bytes()[:100])
    with pytest.raises(UserError, match=rf"{target.name}.*remove it to fall back to step 8"):
        load_parameters(run)
    assert load_parameters(run, 8)


def test_damage_is_found_without_the_list_of_sizes(run):
    (run / "checkpoints/12/sizes.json").unlink()
    largest(run / "checkpoints/12/model").write_bytes(b"")
    with pytest.raises(UserError, match="truncated or damaged"):
        load_parameters(run)


def test_half_written_folders_do_not_count(run):
    (run / "checkpoints/12/commit_success.txt").unlink()
    (run / "checkpoints/16.orbax-checkpoint-tmp").mkdir()
    assert complete_steps(run) == [8]


def test_a_foreign_checkpoint_is_refused(tmp_path):
    from orbax.checkpoint import v1 as ocp

    tree: Any = {"w": np.ones(3)}
    ocp.save(str(tmp_path / "checkpoints/3"), tree)
    with pytest.raises(UserError, match="no checkpoint of this trainer"):
        load_parameters(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint; train it first"):
        load_parameters(tmp_path / "nowhere")


def test_a_checkpoint_with_an_unknown_option_is_refused(tiny, state, tmp_path):
    config = to_dict(tiny.cfg) | {"new_option": 1}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {"config": config, "data": {}})
    checkpoints.wait()
    with pytest.raises(UserError, match="new_option"):
        load_parameters(tmp_path)


def test_a_save_that_fails_in_the_background_is_an_error_and_the_last_good_one_stays(tiny, state, tmp_path):
    stored = {"config": to_dict(tiny.cfg), "data": {}}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, stored)
    checkpoints.wait()
    before = files(tmp_path / "checkpoints/1")
    # A limit on file size fails the same write calls as a full disk, and needs no disk to fill.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(UserError) as caught:
            checkpoints.save(2, state, stored)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert str(tmp_path / "checkpoints/2") in message and "free disk space" in message
    assert "the last good one is step 1" in message and "\n" not in message
    assert complete_steps(tmp_path) == [1] and files(tmp_path / "checkpoints/1") == before
    checkpoints = Checkpoints(tmp_path, keep=1)  # the next start: room again, leftovers go
    checkpoints.clean()
    checkpoints.save(3, state, stored)
    checkpoints.wait()
    checkpoints.clean()  # in this process the writers of the failed save may have outlived the first time
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_save_that_cannot_start_names_path_and_mend(tiny, state, tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=r"checkpoints/1 failed .*there is no earlier one"):
        Checkpoints(tmp_path, 1).save(1, state, {"config": to_dict(tiny.cfg)})


def test_stored_json_holds_config_data_and_tokenizer(tiny, finished):
    stored = Checkpoints(finished, 1).metadata()
    assert set(stored) == {"format", "config", "data", "tokenizer"}
    assert stored["config"] == json.loads((finished / "config.json").read_text())
    assert stored["data"]["position"] == {"next_index": 12}
