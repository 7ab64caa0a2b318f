"""Attention over levels of the cache gives what attention over all of it gives, on both sides of every edge."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from conversion import weights
from conversion.litert import attention, lower
from conversion.litert.attention import Attention, attend, levels
from conversion.litert.flatbuffer import Model
from conversion.torch_model import MobileMoE, Reference
from moe_jax.config import ModelConfig
from tests.conversion.conftest import MOE

LENGTH, GROUPS, HEADS, WIDTH = 1024, 2, 6, 8
CONTEXT, PREFILL = 400, 16  # of a model


class Both:
    """A file with attention over levels and over everything, on random caches."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.tokens, rng = tokens, np.random.default_rng(tokens)
        rows = HEADS // GROUPS * tokens
        shapes = {"q": (1, GROUPS, rows, WIDTH), "mask": (1, 1, tokens, LENGTH)}
        shapes |= dict.fromkeys("kv", (1, GROUPS, LENGTH, WIDTH))
        self.given = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in "qkv"}
        model = Model()
        for name in ("levels", "all"):
            g = model.graph(name)
            inputs = {"positions": g.input((tokens,), "int32")}
            inputs |= {part: g.input(shapes[part], "float32") for part in ("q", "k", "v", "mask")}
            around = [inputs[part] for part in ("q", "k", "v", "mask")]
            if name == "levels":
                form = Attention(g, inputs["positions"], name)
                # Twice, as by layers, which share the branches.
                g.outputs = [form.expand([form.expand(around), *around[1:]])]
            else:
                g.outputs = [attend(g, [attend(g, around, LENGTH), *around[1:]], LENGTH)]
            model.signature(name, g, inputs, {"y": g.outputs[0]})
        self.model = model
        model.write(folder / f"attention_{tokens}.tflite")
        runtime = Interpreter(str(folder / f"attention_{tokens}.tflite"), num_threads=1)
        self._calls = {name: runtime.get_signature_runner(name) for name in ("levels", "all")}

    def run(self, name: str, positions: np.ndarray, **changed: np.ndarray) -> np.ndarray:
        seen = np.arange(LENGTH)[None] <= positions[:, None]
        mask = np.where(seen, 0, -1e30).astype(np.float32)[None, None]
        given = self.given | changed
        return self._calls[name](positions=positions.astype(np.int32), mask=mask, **given)["y"]


@pytest.fixture(scope="module", params=[1, 5, 200], ids="T={}".format)
def both(request, tmp_path_factory) -> Both:
    return Both(tmp_path_factory.mktemp("attention"), request.param)


def test_levels_rise_to_the_whole_cache_and_hold_a_call():
    assert levels(96, 1) == [96] and levels(1024, 1) == [128, 192, 256, 384, 512, 1024]
    assert levels(8320, 1)[-3:] == [3072, 4096, 8320]  # one token's copy of 6,144 costs what it saves
    assert levels(8320, 200)[:2] == [256, 384] and levels(8320, 200)[-2:] == [6144, 8320]
    for length in (32, 128, 1000, 131_072):
        for tokens in (1, 31):
            found = levels(length, tokens)
            assert found == sorted(set(found)) and found[-1] == length and found[0] >= tokens


def ends(tokens: int) -> list[int]:
    """Positions in use after a call: both sides of each edge, the first and the last possible."""
    edges = levels(LENGTH, tokens)
    return sorted({tokens, LENGTH} | {e + d for e in edges for d in (-1, 0, 1) if tokens <= e + d <= LENGTH})


def test_outputs_equal_attention_over_everything_on_both_sides_of_each_edge(both):
    for end in ends(both.tokens):
        positions = np.arange(end - both.tokens, end)
        got, want = both.run("levels", positions), both.run("all", positions)
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=f"{end} positions in use")


def test_outputs_equal_softmax_attention_in_float64(both):
    end = levels(LENGTH, both.tokens)[0] + 1
    positions = np.arange(end - both.tokens, end)
    want, (k, v) = both.given["q"].astype(np.float64), (both.given[name].astype(np.float64) for name in "kv")
    rows = np.tile(positions, HEADS // GROUPS)
    for _ in range(2):
        scores = want @ k.swapaxes(2, 3)
        scores[..., np.arange(LENGTH)[None] > rows[:, None]] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        want = scores / scores.sum(-1, keepdims=True) @ v
    np.testing.assert_allclose(both.run("levels", positions), want, rtol=0, atol=1e-5)


def test_nothing_beyond_the_level_is_read(both):
    for n in levels(LENGTH, both.tokens)[:-1]:
        positions = np.arange(n - both.tokens, n)
        spoilt = {name: both.given[name].copy() for name in "kv"}
        for cache in spoilt.values():
            cache[:, :, n:] = np.nan  # 0 * NaN would show
        np.testing.assert_array_equal(both.run("levels", positions, **spoilt), both.run("levels", positions))


def test_unused_places_of_a_call_may_have_any_smaller_position(both):
    # Engines fill a last, short prefill call with zeros, so its last position says nothing.
    used, end = both.tokens // 2 + 1, levels(LENGTH, both.tokens)[0] + 1
    positions = np.zeros(both.tokens, int)
    positions[:used] = np.arange(end - used, end)
    got, want = (both.run(name, positions).reshape(GROUPS, -1, both.tokens, WIDTH) for name in ("levels", "all"))
    np.testing.assert_allclose(got[:, :, :used], want[:, :, :used], rtol=0, atol=2e-6)


def test_layers_share_the_branches(both):
    names = [g.t.name for g in both.model.graphs]
    count = len(levels(LENGTH, both.tokens))
    assert len(names) == len(set(names)) == 2 + 2 * count - 2  # a binary tree without its root


def test_no_level_is_made_where_the_cache_is_short(exported):
    assert not any("attention" in str(g.t.name) for g in Model.read(exported.tflite).graphs)


def test_a_model_writes_the_same_logits_at_every_position(tmp_path, monkeypatch):
    config = dataclasses.replace(MOE, max_position_embeddings=CONTEXT)
    source, length = weights.random(config), lower.cache_length(CONTEXT, (PREFILL,))
    assert len(levels(length, PREFILL)) > 2
    tokens = np.random.default_rng(3).integers(0, 300, (1, CONTEXT)).astype(np.int32)
    lower.export_tflite(source, tmp_path / "levels.tflite", CONTEXT, (PREFILL,))
    got = logits(tmp_path / "levels.tflite", config, tokens, length)
    monkeypatch.setattr(attention, "levels", lambda length, tokens: [length])
    lower.export_tflite(source, tmp_path / "all.tflite", CONTEXT, (PREFILL,))
    assert not any("attention" in str(g.t.name) for g in Model.read(tmp_path / "all.tflite").graphs)
    want = logits(tmp_path / "all.tflite", config, tokens, length)
    reference = MobileMoE(source, Reference(source), CONTEXT)(torch.from_numpy(tokens)).numpy()[0]
    assert got.keys() == want.keys() and max(got) > levels(length, 1)[-2]
    # Sums in another order may round an activation to the next INT8 step, and later positions see that one.
    difference = [np.abs(got[i] - want[i]).max() for i in got]
    assert np.median(difference) < 1e-5 and max(difference) < 0.1
    assert max(np.abs(got[i] - reference[i]).max() for i in got) < 0.1


def logits(path: Path, config: ModelConfig, tokens: np.ndarray, length: int) -> dict[int, np.ndarray]:
    """What a file writes after each decoded position of a text taken in by calls of both sizes."""
    runtime, found, start = Interpreter(str(path), num_threads=1), {}, 0
    calls = {PREFILL: runtime.get_signature_runner(f"prefill_{PREFILL}"), 1: runtime.get_signature_runner("decode")}
    kinds = lower.inputs(config, 1, length)
    cache = {name: np.zeros(*kind) for name, kind in kinds.items() if name.startswith("kv_cache")}
    for size in [*[PREFILL] * 7, *[1] * 20, *[PREFILL] * 4, *[1] * 30, *[PREFILL] * 10, 1]:
        positions = np.arange(start, start + size, dtype=np.int32)
        mask = np.where(np.arange(length) <= positions[:, None], 0, -1e30).astype(np.float32)[None, None]
        cache = calls[size](tokens=tokens[:, start : start + size], input_pos=positions, mask=mask, **cache)
        start += size
        if size == 1:
            found[start - 1] = cache.pop("logits")[0, 0]
    return found
