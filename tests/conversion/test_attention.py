"""Attention over levels of the cache gives what attention over all of it gives, on both sides of every edge."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from conversion import weights
from conversion.litert import attention, lower
from conversion.litert.attention import Attention, attend, chunks, levels
from conversion.litert.flatbuffer import BUILTIN_NAMES, Graph, Model
from conversion.torch_model import MobileMoE, Reference
from moe_jax.config import ModelConfig
from tests.conversion.conftest import MOE

LENGTH, GROUPS, HEADS, WIDTH = 1024, 2, 6, 8
CONTEXT, PREFILL = 400, 16  # of a model


class Both:
    """A file with attention over levels, in chunks, and over everything in one piece, on random caches."""

    def __init__(self, folder: Path, tokens: int, chunk: int = 256) -> None:
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
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention, "_CHUNK", chunk if name == "levels" else LENGTH)
                if name == "levels":
                    form = Attention(g, inputs["positions"], LENGTH, name)
                    # Twice, as by layers, which share the branches.
                    g.outputs = [form.expand([form.expand(around), *around[1:]])]
                else:
                    g.outputs = [attend(g, [attend(g, around, LENGTH), *around[1:]], LENGTH)]
            model.signature(name, g, inputs, {"y": g.outputs[0]})
        self.model = model
        model.write(folder / "attention.tflite")
        runtime = Interpreter(str(folder / "attention.tflite"), num_threads=1)
        self._calls = {name: runtime.get_signature_runner(name) for name in ("levels", "all")}

    def run(self, name: str, positions: np.ndarray, **changed: np.ndarray) -> np.ndarray:
        seen = np.arange(LENGTH)[None] <= positions[:, None]
        mask = np.where(seen, 0, -1e30).astype(np.float32)[None, None]
        given = self.given | changed
        return self._calls[name](positions=positions.astype(np.int32), mask=mask, **given)["y"]


def ops(g: Graph) -> list[tuple[str, int]]:
    """Name and number of inputs of each op."""
    return [(BUILTIN_NAMES[g.model.t.operatorCodes[op.opcodeIndex].builtinCode], len(op.inputs)) for op in g.ops]


@pytest.fixture(scope="module", params=[1, 5, 200], ids="T={}".format)
def both(request, tmp_path_factory) -> Both:
    return Both(tmp_path_factory.mktemp("attention"), request.param)


def test_levels_rise_to_the_whole_cache_and_hold_a_call():
    assert levels(96, 1) == [96] and levels(1024, 1) == [128, 192, 288, 384, 480, 608, 736, 896, 1024]
    assert levels(8320, 200)[:2] == [224, 320]
    for length in (32, 128, 1000, 131_072):
        for tokens in (1, 31):
            found = levels(length, tokens)
            assert found == sorted(set(found)) and found[-1] == length and found[0] >= tokens


def test_little_of_what_is_read_is_not_in_use_and_levels_are_few():
    found = levels(8320, 1)
    assert len(found) == 33 and found[0] == 128
    assert all(b - a <= a / 2 for a, b in pairwise(found)) and all(b - a <= a / 8 for a, b in pairwise(found[12:]))


@pytest.mark.parametrize("n", [1, 32, 1000, 3072, 3073, 8320, 40_001])
def test_chunks_cover_all_positions_and_are_about_equal(n):
    found = chunks(n)
    assert [start for start, _ in found] == [0, *np.cumsum([size for _, size in found])[:-1]]
    assert sum(size for _, size in found) == n
    assert max(size for _, size in found) <= 1.5 * 2048 and (n < 3072 or min(size for _, size in found) >= 1024)


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
    branches = count + 1 if both.tokens == 1 else 2 * count - 2  # a chain and its skip, or a tree without its root
    assert len(names) == len(set(names)) == 2 + branches


def test_no_branch_of_one_token_holds_an_if_that_entering_it_would_prepare(tmp_path):
    main, *branches = Both(tmp_path, 1).model.graphs
    assert ("IF", 6) in ops(main) and not any("IF" in dict(ops(g)) for g in branches)


def test_many_chunks_are_joined_in_order_by_as_few_inputs_at_once_as_xnnpack_takes(tmp_path):
    many = Both(tmp_path, 1, chunk=32)
    joins = [inputs for g in many.model.graphs for op, inputs in ops(g) if op == "CONCATENATION"]
    assert max(joins) == 5 and joins.count(5) > len(levels(LENGTH, 1))
    for end in ends(1):
        got, want = (many.run(name, np.array([end - 1])) for name in ("levels", "all"))
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6, err_msg=f"{end} positions in use")


def test_the_mask_of_many_heads_to_a_group_is_joined_so_too():
    g = Model().graph("seven heads to a group")
    shapes = (1, 1, 7 * 2, 8), (1, 1, 32, 8), (1, 1, 32, 8), (1, 1, 2, 32)
    attend(g, [g.input(shape, "float32") for shape in shapes], 32)
    assert [inputs for op, inputs in ops(g) if op == "CONCATENATION"] == [5, 2, 2]


def test_only_the_scores_of_one_token_come_in_chunks(both):
    products = {op.count(("BATCH_MATMUL", 2)) for op in map(ops, both.model.graphs[1:-1])} - {0}
    assert products == ({2, 4, 6, 8} if both.tokens == 1 else {2})


def test_no_level_is_made_where_the_cache_is_short(exported):
    assert not any("attention" in str(g.t.name) for g in Model.read(exported.tflite).graphs)


def test_a_model_writes_the_same_logits_at_every_position(tmp_path, monkeypatch):
    config = dataclasses.replace(MOE, max_position_embeddings=CONTEXT)
    source, length = weights.random(config), lower.cache_length(CONTEXT, (PREFILL,))
    assert len(levels(length, PREFILL)) > 2
    tokens = np.random.default_rng(3).integers(0, 300, (1, CONTEXT)).astype(np.int32)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_CHUNK", 128)
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
