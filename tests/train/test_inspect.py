"""`inspect` tells what is in a checkpoint and names the file that is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.model.describe import describe
from moe_jax.overrides import to_dict
from moe_jax.train.inspect import inspect, render


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_folder_shows_its_last_checkpoint_with_every_leaf(tiny, finished):
    found = inspect(finished)
    assert (found["step"], found["final"], found["best"]) == (12, True, False)
    described = describe(tiny.cfg.model)
    assert {name: tuple(leaf["shape"]) for name, leaf in found["trees"]["model"].items()} == {
        name: leaf.shape for name, leaf in described.items()
    }
    assert found["config"] == to_dict(tiny.cfg)
    files = [path for path in (finished / "checkpoints/12").rglob("*") if path.is_file()]
    assert found["files"] == len(files) - 1 and json.loads(json.dumps(found)) == found
    text = render(found)
    assert "step 12, final" in text and "all checksums are right" in text
    assert "embed/embedding" in text and "float32[290, 32]" in text and "model.d_model=32" in text
    assert "step 8: complete" in text


def test_one_checkpoint_can_be_named(finished):
    found = inspect(finished / "checkpoints/8")
    assert (found["step"], found["final"]) == (8, False)


def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(run):
    target = max(
        (p for p in (run / "checkpoints/12/optimizer").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    content = target.read_bytes()
    target.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{target.name} is not what was written \(checksum\)"):
        inspect(run)
    assert inspect(run / "checkpoints/8")["step"] == 8


def test_what_is_no_checkpoint_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="neither a run folder with checkpoints nor a complete checkpoint"):
        inspect(tmp_path / "nowhere")
    (run / "checkpoints/8/checksums.json").unlink()
    with pytest.raises(UserError, match="neither a run folder with checkpoints nor a complete checkpoint"):
        inspect(run / "checkpoints/8")
