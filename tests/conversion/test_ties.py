"""The reference's other roundings explain a tie that fell otherwise, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conversion import weights
from conversion.torch_model import MobileMoE
from conversion.weights import Weights
from tests.conversion import ties
from tests.conversion.conftest import MOE

IDS = np.random.default_rng(6).integers(0, 300, 40).tolist()
CLOSE = 1e-5


@pytest.fixture(scope="module")
def source() -> Weights:
    return weights.random(MOE, seed=3)


def scores(source: Weights, *swayed: ties.Tie) -> tuple[np.ndarray, set[ties.Tie]]:
    ops = ties.Tied(source, frozenset(swayed))
    rows = torch.log_softmax(MobileMoE(source, ops, 64)(torch.tensor([IDS], dtype=torch.int32))[0], -1)
    return rows[range(len(IDS) - 1), IDS[1:]].numpy(), ops.met


def test_a_tie_that_fell_the_other_way_is_found(source):
    plain, met = scores(source)
    tried = 0
    # The last token's likelihoods are not asked for.
    for tie in sorted(tie for tie in met if tie.token < len(IDS) - 1):
        got, _ = scores(source, tie)
        if np.abs(got - plain).max() < CLOSE:
            continue
        tried += 1
        want, swayed = ties.nearest(source, IDS, got, CLOSE)
        assert swayed == {tie}
        assert np.abs(got - want).max() < CLOSE
        assert np.abs(got - plain)[: tie.token].max(initial=0) < CLOSE <= np.abs(got - plain)[tie.token]
    assert tried > 3


def test_ties_are_few(source):
    values = []

    class Counted(ties.Tied):
        def rounded(self, x, product, tokens=None):
            values.append(x.numel())
            return super().rounded(x, product, tokens)

    ops = Counted(source)
    MobileMoE(source, ops, 64)(torch.tensor([IDS], dtype=torch.int32))
    assert 0 < len(ops.met) < 1e-3 * sum(values)


@pytest.mark.parametrize("what", ["one code", "one scale", "one norm", "half a score"])
def test_a_defect_is_not_taken_for_a_tie(source, what):
    arrays = {name: source.array(name).copy() for name in weights.layout(MOE, source.group)}
    if what == "one code":
        arrays["model.layers.0.self_attn.o_proj.qweight"][3, 5] ^= 1
    elif what == "one scale":
        arrays["model.layers.1.feed_forward.experts.down_proj.weight_scale"][2, 7, 0] *= 1.01
    elif what == "one norm":
        arrays["model.norm.weight"][9] *= 1.001
    got, _ = scores(Weights(MOE, source.group, arrays))
    if what == "half a score":
        got[20] += 1e-3
    want, _ = ties.nearest(source, IDS, got, CLOSE)
    assert np.abs(got - want).max() >= CLOSE
