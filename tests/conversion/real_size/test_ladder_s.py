"""The parity ladder at the true widths of MobileMoE-S, on random weights whose routing reaches every expert.

Two layers: random ones make a model so sensitive that at 20 one INT8 rounding the other way decides everything (of
PyTorch's own logits, which spread by 3.0, 1e-6 more of an embedding moved some by 1 to 4, and none without INT8).
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from configs.mobilemoe import SMALL
from conversion import export, heldout, readback, torch_ops, verify, weights
from conversion.kernel import build
from conversion.litert.engine import Engine
from moe_jax.config import QuantConfig, SourceConfig
from moe_jax.generate import Generator
from tests.conversion.folders import parameters_of_random_weights

CONFIG = replace(SMALL, num_layers=2)
TOKENS, TEXTS = 250, 2


@pytest.fixture(scope="module", params=["sparse", "kernel"])
def sections(request, tmp_path_factory):
    """Path and parts of a bundle of random weights."""
    if request.param == "kernel" and build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp(request.param) / "s.litertlm"
    export.export_random(CONFIG, path, context=512, experts=request.param)
    return path, readback.sections(path)


def test_every_rung_holds(sections):
    path, parts = sections
    tokenizer = parts.tokenizer
    pieces = heldout.pieces((SourceConfig("stdlib:heldout"),), tokenizer, TEXTS, TOKENS)
    parameters, source = parameters_of_random_weights(CONFIG), weights.random(CONFIG)
    ids = [tokenizer.bos, *pieces[0]]
    parity = verify.jax_torch(parameters, source, ids) | verify.torch_tflite(source, parts.tflite, ids)
    generator = Generator(CONFIG, parameters, QuantConfig())
    with Engine(path, measured=True) as engine:
        parity |= verify.engine_jax(engine, generator, tokenizer, pieces, probes=20)
        parity |= verify.chat_template(engine, tokenizer)
    print(parity)
    assert parity["jax_torch_max_abs"] < verify.BOUNDS["jax_torch_max_abs"][1]
    # Where roundings to INT8 decide, the file is held to what they make of JAX and PyTorch between themselves.
    assert parity["torch_tflite_median_abs"] < 1.5 * parity["jax_torch_int8_median_abs"]
    assert parity["engine_nll_diff_nats"] < verify.BOUNDS["engine_nll_diff_nats"][1]
    assert parity["engine_top1_agreement"] > 0.95
    assert (parity["chat_start_tokens"], parity["chat_wrong_ids"]) == (1, 0)


def test_the_texts_reach_every_expert_of_every_layer(sections):
    _, parts = sections
    pieces = heldout.pieces((SourceConfig("stdlib:heldout"),), parts.tokenizer, 8 * TEXTS, TOKENS)
    hit, top_k = [], torch_ops.top_k

    def noted(scores: torch.Tensor, k: int) -> torch.Tensor:
        hit.append(ids := top_k(scores, k))
        return ids

    with mock.patch.object(torch_ops, "top_k", noted):
        for piece in pieces:
            verify._torch_logits(weights.random(CONFIG), piece, True)
    count = CONFIG.num_layers
    layers = [np.concatenate([ids.ravel() for ids in hit[i::count]]) for i in range(count)]
    assert CONFIG.moe is not None
    assert [len(np.unique(layer)) for layer in layers] == [CONFIG.moe.num_experts] * count
