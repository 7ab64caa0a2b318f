"""Attention over levels of the cache: the same as over all of it, at every position and on both sides of an edge."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from conversion import weights
from conversion.litert import lower
from conversion.litert.attention import Attention, attend, levels
from conversion.litert.flatbuffer import Model
from conversion.torch_model import MobileMoE, Reference
from tests.conversion.conftest import MOE

LENGTH, GROUPS, HEADS, WIDTH = 1024, 2, 6, 8


class Both:
    """A file with attention over levels and over everything, on random caches."""

    def __init__(self, folder, tokens: int) -> None:
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
                attention = Attention(g, inputs["positions"], name)
                once = attention.expand(*around)
                # Twice, as layers do, which share the branches.
                g.outputs = [attention.expand(once, *around[1:])]
            else:
                g.outputs = [attend(g, attend(g, *around, LENGTH), *around[1:], LENGTH)]
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
    assert levels(8320, 1)[-3:] == [3072, 4096, 8320] and levels(8320, 200)[0] == 256
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


def test_unused_places_of_a_call_may_have_any_smaller_position():
    """Engines fill a last, short prefill call with zeros, so the last position says nothing."""


def test_layers_share_the_branches(both):
    names = [g.t.name for g in both.model.graphs]
    count = len(levels(LENGTH, both.tokens))
    assert len(names) == len(set(names)) == 2 + 2 * count - 2  # a binary tree without its root


def test_no_level_is_made_where_the_cache_is_short(tmp_path):
    lower.export_tflite(weights.random(MOE), tmp_path / "short.tflite", 64, (8,))
    assert not any("attention" in str(g.t.name) for g in Model.read(tmp_path / "short.tflite").graphs)


def test_a_model_attends_the_same_at_every_position(tmp_path):
    context, prefill = 400, 16
    config = dataclasses.replace(MOE, max_position_embeddings=context)
    source = weights.random(config)
    lower.export_tflite(source, tmp_path / "model.tflite", context, (prefill,))
    length = lower.cache_length(context, (prefill,))
    assert len(levels(length, prefill)) > 2
    tokens = np.random.default_rng(3).integers(0, 300, (1, context)).astype(np.int32)
    want = MobileMoE(source, Reference(source), context)(torch.from_numpy(tokens)).numpy()[0]
    runtime = Interpreter(str(tmp_path / "model.tflite"), num_threads=1)
    calls = {prefill: runtime.get_signature_runner(f"prefill_{prefill}"), 1: runtime.get_signature_runner("decode")}
    kinds = lower.inputs(config, 1, length)
    cache = {name: np.zeros(*kind) for name, kind in kinds.items() if name.startswith("kv_cache")}
    start, differences = 0, []
    for size in [*[prefill] * 7, *[1] * 20, *[prefill] * 4, *[1] * 30, *[prefill] * 10, 1]:
        positions = np.arange(start, start + size, dtype=np.int32)
        mask = np.where(np.arange(length)[None] <= positions[:, None], 0, -1e30).astype(np.float32)[None, None]
        cache = calls[size](tokens=tokens[:, start : start + size], input_pos=positions, mask=mask, **cache)
        logits = cache.pop("logits", None)
        start += size
        if logits is not None:
            differences.append(np.abs(logits[0, 0] - want[start - 1]).max())
    assert start > 2 * levels(length, 1)[-2] // 2 and np.median(differences) < 1e-4 and max(differences) < 0.1
