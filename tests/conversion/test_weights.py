"""Weights in memory and in safetensors files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conversion import weights
from conversion.int4 import Int4
from moe_jax.errors import UserError
from tests.conversion.conftest import DENSE, MOE
from tests.conversion.folders import TINY, WIDE, random_parameters


def save(model: weights.Weights, path: Path) -> None:
    arrays = ((name, model.array(name)) for name in weights.layout(model.config, model.group))
    weights.write_safetensors(arrays, model.config, model.group, path)


@pytest.mark.parametrize(
    ("config", "group"), [(MOE, 32), (DENSE, 32), (WIDE, 64)], ids=["moe", "dense", "groups of 64"]
)
def test_a_file_gives_back_every_code_scale_and_float(config, group, tmp_path):
    model = weights.random(config, group=group)
    save(model, tmp_path / "model.safetensors")
    back = weights.load_safetensors(tmp_path / "model.safetensors")
    assert (back.config, back.group, back.names()) == (config, group, model.names())
    for name in model.names():
        if name in model.int4_names():
            assert np.array_equal(back.packed(name), model.packed(name))
            assert np.array_equal(back.scales(name), model.scales(name))
        else:
            assert np.array_equal(back.float(name), model.float(name))


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in "ab":
        save(weights.random(MOE, seed=3), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_random_weights_are_alike_in_every_process():
    code = (
        "from conversion import weights\n"
        "from moe_jax.config import ModelConfig\n"
        "print(weights.random(ModelConfig()).float('model.norm.weight').tobytes().hex())"
    )

    def told(seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert told("1") == told("2") != ""


def test_rounding_in_pieces_leaves_no_row_out(monkeypatch):
    parameters = random_parameters(TINY)
    want = dict(weights.quantised(parameters, TINY))
    monkeypatch.setattr(weights, "_ROUNDED", 7 * 64)  # a piece of 7 rows, or of fewer where the rows do not divide
    found = dict(weights.quantised(parameters, TINY))
    assert found.keys() == want.keys() and all(np.array_equal(found[name], want[name]) for name in want)


def test_fused_weights_are_their_rows_in_order():
    model = weights.random(DENSE)
    names = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    fused = model.fused(names)
    assert isinstance(fused, Int4) and fused.codes.shape == (64 + 32 + 32, 64)
    assert np.array_equal(fused.codes[64:96], model.int4(names[1]).codes)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype"])
def test_a_damaged_file_is_refused_by_the_name_that_is_wrong(damage, tmp_path):
    path, name = tmp_path / "model.safetensors", "model.embed_tokens.qweight"
    save(weights.random(DENSE), path)
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    if damage == "missing":
        del arrays[name]
    elif damage == "extra":
        name = "model.layers.9.self_attn.q_proj.qweight"
        arrays[name] = np.zeros((2, 2), np.uint8)
    else:
        arrays[name] = arrays[name][:-1] if damage == "shape" else arrays[name].astype(np.float16)
    save_file(arrays, path, metadata)
    with pytest.raises(UserError, match=name):
        weights.load_safetensors(path)


def test_what_is_no_safetensors_file_is_refused_in_words(tmp_path):
    (tmp_path / "x").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"the header of .*x is damaged \(it is longer than the file\)"):
        weights.load_safetensors(tmp_path / "x")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "y")
    with pytest.raises(UserError, match="not of format"):
        weights.load_safetensors(tmp_path / "y")
    for damaged in ("{", "[]", '{"format": "mobilemoe-int4"}'):
        save_file({"a": np.zeros(2, np.float32)}, tmp_path / "y", {"mobilemoe": damaged})
        with pytest.raises(UserError, match="not of format"):
            weights.load_safetensors(tmp_path / "y")


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "missing" / "model.safetensors"
    with pytest.raises(FileNotFoundError):
        save(weights.random(DENSE), path)
    assert not path.parent.exists()
