"""The parity ladder at MobileMoE-S's true shapes, on random weights whose routing reaches every expert.

JAX holds all weights in float32: about 12 GB of memory, and some minutes.
"""

from __future__ import annotations

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

TOKENS, TEXTS = 250, 2


@pytest.fixture(scope="module", params=["sparse", "kernel"])
def sections(request, tmp_path_factory):
    """Path and parts of a bundle of random weights."""
    if request.param == "kernel" and build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp(request.param) / "s.litertlm"
    export.export_random(SMALL, path, context=512, experts=request.param)
    return path, readback.sections(path)


@pytest.fixture(scope="module")
def parameters():
    """JAX's, of the same weights."""
    return weights.random_parameters(SMALL)


def test_every_rung_holds(sections, parameters):
    path, parts = sections
    source, tokenizer = weights.random(SMALL), parts.tokenizer
    pieces = heldout.pieces((SourceConfig("stdlib:heldout"),), tokenizer, TEXTS, TOKENS)
    ids = [tokenizer.bos, *pieces[0]]
    parity = verify.jax_torch(parameters, source, ids) | verify.torch_tflite(source, parts.tflite, ids)
    generator = Generator(SMALL, parameters, QuantConfig())
    with Engine(path, measured=True) as engine:
        parity |= verify.engine_jax(engine, generator, tokenizer, pieces, probes=20)
        parity |= verify.chat_template(engine, tokenizer)
    print(parity)
    assert verify.broken(parity) == []


def test_the_texts_reach_every_expert_of_every_layer(sections):
    _, parts = sections
    pieces = heldout.pieces((SourceConfig("stdlib:heldout"),), parts.tokenizer, TEXTS, TOKENS)
    hit, top_k = [], torch_ops.top_k

    def noted(scores: torch.Tensor, k: int) -> torch.Tensor:
        hit.append(ids := top_k(scores, k))
        return ids

    with mock.patch.object(torch_ops, "top_k", noted):
        for piece in pieces:
            verify._torch_logits(weights.random(SMALL), piece, True)
    layers = [np.concatenate([ids.ravel() for ids in hit[i :: SMALL.num_layers]]) for i in range(SMALL.num_layers)]
    assert SMALL.moe is not None
    assert [len(np.unique(layer)) for layer in layers] == [SMALL.moe.num_experts] * SMALL.num_layers
