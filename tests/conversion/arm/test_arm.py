"""The stock engine's Arm build reads the same bundles as here, on processors with and without i8mm.

Its products sum floats in another order than x86's; where that makes a value round to the next INT8 code, all that
follows differs, so likelihoods are held against the reference with each such tie resolved as the engine did.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from configs.mobilemoe import SMALL
from conversion import export, verify
from conversion.arm.engine import RemoteEngine
from conversion.arm.machine import Machine, arm
from conversion.litert.engine import Engine
from moe_jax.errors import UserError
from tests.conversion import ties
from tests.conversion.test_engine import CLOSE

# Of 2018 with dot products, of 2021 with i8mm and SVE2, and all that the emulator knows.
PROCESSORS = ("cortex-a76", "cortex-a710", "max")
TEXT = "def add(first):\n    return first + 1  # and on"
WIDE = dataclasses.replace(SMALL, num_layers=2)


@pytest.fixture(scope="module", params=PROCESSORS)
def machine(request) -> Machine:
    return arm(request.param)


@pytest.fixture(scope="module", params=["sparse", "kernel"])
def bundle(request, exported, tmp_path_factory) -> Path:
    if request.param == "sparse":
        return exported.bundle
    return exported.again(tmp_path_factory.mktemp("kernel"), "kernel")


def test_every_likelihood_is_the_references_or_hangs_on_a_tie(exported, bundle, machine):
    ids = [exported.tokenizer.bos, *exported.tokenizer.encode(TEXT)]
    with Engine(bundle, threads=1) as here, RemoteEngine(bundle, here, machine, threads=2) as there:
        got = there.score(TEXT)
        assert there.next_token(TEXT) == here.next_token(TEXT)
    want, _ = ties.nearest(exported.weights, ids, got, CLOSE)
    assert np.abs(got - want).max() < CLOSE


def test_a_processor_that_the_emulator_does_not_know_is_told_before_anything_runs():
    with pytest.raises(UserError, match=r"no program runs on cortex-z99 \(.*cortex-z99.*\); .* -cpu help"):
        arm("cortex-z99")


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_the_ladder_asks_it_too(exported, run_dir):
    result = verify.verify(run_dir, exported.bundle, texts=2, tokens=20, probes=6, threads=1, arm="cortex-a76")
    assert [sentence for sentence in result["failed"] if "top1" not in sentence] == []  # random logits tie
    parity = result["parity"]
    assert parity["arm_tokens"] == parity["engine_tokens"] == 40
    assert parity["arm_top1_asked"] == parity["engine_top1_asked"] > 6
    assert abs(parity["arm_nll_nats"] - parity["engine_nll_nats"]) < 1e-3
    assert parity["arm_top1_agreement"] > 0.9


@pytest.mark.parametrize("experts", ["sparse", "kernel"])
def test_at_the_true_widths_of_size_s_the_engines_agree(experts, machine, tmp_path):
    path = tmp_path / "s.litertlm"
    export.export_random(WIDE, path, context=256, experts=experts)
    text = Path(verify.__file__).read_text()[:200]
    with Engine(path, threads=1) as here, RemoteEngine(path, here, machine, threads=2) as there:
        got, want = there.score(text), here.score(text)
        chosen = [engine.next_token(text[:length]) for length in (40, 90, 150) for engine in (there, here)]
    assert len(got) == len(want) > 30 and np.median(np.abs(got - want)) < 0.05
    assert abs(got.mean() - want.mean()) < verify.BOUNDS["arm_nll_diff_nats"][1]
    assert sum(a == b for a, b in zip(chosen[::2], chosen[1::2], strict=True)) >= 2
