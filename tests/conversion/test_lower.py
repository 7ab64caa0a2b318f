"""The exported .tflite, run by the stock runtime (XNNPACK through AUTO, never BUILTIN_REF)."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter

from conversion import readback, weights
from conversion.litert import lower
from conversion.litert.flatbuffer import Model
from conversion.torch_model import MobileMoE, Reference
from moe_jax.errors import UserError
from tests.conversion.conftest import CONTEXT, DENSE, PREFILL

TOKENS = np.random.default_rng(1).integers(0, 300, (1, 12)).astype(np.int32)
LENGTH = lower.cache_length(CONTEXT, PREFILL)


def inputs(start: int, tokens: np.ndarray) -> dict[str, np.ndarray]:
    positions = np.arange(start, start + tokens.shape[1], dtype=np.int32)
    seen = np.arange(LENGTH)[None] <= positions[:, None]
    mask = np.where(seen, 0, -1e30).astype(np.float32)[None, None]
    return {"tokens": tokens, "input_pos": positions, "mask": mask}


def test_prefill_and_decode_give_the_logits_of_the_torch_model(exported):
    want = MobileMoE(exported.weights, Reference(exported.weights), 16)(torch.from_numpy(TOKENS))
    runtime = Interpreter(str(exported.tflite), num_threads=1)
    prefill = runtime.get_signature_runner("prefill_8")
    decode = runtime.get_signature_runner("decode")
    kinds = lower.inputs(exported.weights.config, 1, LENGTH)
    cache = {name: np.zeros(*kind) for name, kind in kinds.items() if name.startswith("kv_cache")}
    cache = prefill(**inputs(0, TOKENS[:, :8]), **cache)
    assert "logits" not in cache
    for position in range(8, 12):
        out = decode(**inputs(position, TOKENS[:, position : position + 1]), **cache)
        logits = out.pop("logits")
        cache = out
        assert np.abs(logits[0, 0] - want[0, position].numpy()).max() < 1e-4


def test_every_code_and_scale_of_the_file_is_the_checkpoints(exported):
    weights_of = {name: exported.weights.int4(name) for name in exported.weights.int4_names()}
    expected = {name: (weight.codes, weight.scales) for name, weight in weights_of.items()}
    found = readback.compare(memoryview(exported.tflite.read_bytes()), expected)
    assert found.reports == [] and found.mismatches == 0
    assert found.codes_checked == sum(weight.codes.size for weight in weights_of.values())
    assert found.scales_checked == sum(weight.scales.size for weight in weights_of.values())


def test_no_marker_and_no_float_copy_of_a_weight_is_left(exported):
    model = Model.read(exported.tflite)
    assert not any(code.customCode for code in model.t.operatorCodes)
    largest = exported.weights.config.d_model * LENGTH  # no larger than a rotary table
    for graph in model.graphs:
        for index, tensor in enumerate(graph.t.tensors):
            data = model.t.buffers[tensor.buffer].data
            if data is not None and graph.like(index)[1] == "float32":
                assert len(data) <= 4 * largest, tensor.name


def test_signatures_share_one_copy_of_each_weight(exported):
    size = sum(
        exported.weights.packed(name).size + 2 * exported.weights.scales(name).size
        for name in exported.weights.int4_names()
    )
    buffers = Model.read(exported.tflite).t.buffers
    assert sum(len(b.data) for b in buffers if b.data is not None) < size + 60_000


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_the_runtime_finds_a_calls_tensors_before_it_walks_over_branches(exported):
    names = [graph.t.name.decode() for graph in Model.read(exported.tflite).graphs]
    assert names[: 1 + len(PREFILL)] == ["decode", *(f"prefill_{n}" for n in sorted(PREFILL, reverse=True))]


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_the_same_weights_give_the_same_file(exported, tmp_path):
    lower.export_tflite(exported.weights, tmp_path / "again.tflite", CONTEXT, PREFILL)
    assert (tmp_path / "again.tflite").read_bytes() == exported.tflite.read_bytes()


def test_lowering_leaves_jax_at_32_bits(exported):
    assert jax.numpy.ones(1).dtype == np.float32


def test_the_cache_has_room_for_a_padded_prefill_and_no_prime_length():
    for context, prefill in ((64, (8,)), (71, (1,)), (512, (16, 128)), (97, (97,))):
        length = lower.cache_length(context, prefill)
        assert length % 32 == 0 and length >= context + max(prefill) - 1


@pytest.mark.parametrize("context, prefill", [(0, (1,)), (32, ()), (32, (0,)), (32, (64,))])
def test_lengths_that_cannot_be_are_refused(context, prefill, tmp_path):
    with pytest.raises(UserError, match=r"context|prefill"):
        lower.export_tflite(weights.random(DENSE), tmp_path / "x", context, prefill)
    assert not list(tmp_path.iterdir())
