"""The law of loss over size, text and experts: its form, the paper's findings, and what a fit gets back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import get
from configs.mobilemoe import LARGE, MEDIUM, SMALL, family
from launch.scaling_law import PUBLISHED, Law, Point, expansion, fit_law
from moe_jax.errors import UserError

SIZES, TEXTS, EXPERTS = (0.3e9, 0.5e9, 0.9e9), (100e9, 300e9, 500e9), (1, 4, 16)
BETWEEN = [(n, d, e) for n in (0.4e9, 0.8e9) for d in (150e9, 450e9) for e in (2, 8)]


def trained(law: Law, noise: float = 0.0) -> list[Point]:
    """A sweep whose losses follow a law, each off by a random share."""
    generator = np.random.default_rng(0)
    cells = [(n, d, e) for n in SIZES for d in TEXTS for e in EXPERTS]
    return [Point(*cell, law.loss(*cell) * math.exp(generator.normal(0, noise))) for cell in cells]


@pytest.mark.parametrize(
    ("model", "wanted"),
    [(SMALL, 8), (MEDIUM, 8), (LARGE, 8), (family(12, coarse_experts=2), 2), (get("dense_twin").model, 1)],
)
def test_expansion_is_the_number_of_coarse_experts(model, wanted):
    assert expansion(model) == wanted


@given(st.floats(1e8, 5e9), st.floats(1e10, 1e13))
def test_of_a_dense_model_the_law_is_chinchillas(active, tokens):
    law = PUBLISHED
    wanted = law.A * (active / 1e9) ** law.alpha + law.B * (tokens / 1e9) ** law.beta + law.c
    assert PUBLISHED.loss(active, tokens, 1) == pytest.approx(wanted, rel=1e-12)


def test_the_published_law_shows_what_the_paper_found():
    dense, *sparse, most = (PUBLISHED.loss(0.3e9, 500e9, e) for e in (1, 2, 4, 8, 16, 32))
    assert 2.3 < dense < 2.45
    assert max(sparse) < dense  # experts help
    assert min(sparse) == min(sparse[1:3])  # 4 or 8 of them most,
    assert abs(sparse[1] - sparse[2]) < 0.001  # alike,
    assert most > sparse[2]  # and 32 are too many


def test_a_fit_finds_the_law_that_the_losses_follow():
    law, error = fit_law(trained(PUBLISHED))
    assert error < 1e-5
    for cell in BETWEEN:
        assert law.loss(*cell) == pytest.approx(PUBLISHED.loss(*cell), abs=1e-4)
    assert law.spans == ((0.3e9, 0.9e9), (100e9, 500e9), (1, 16))


def test_a_fit_to_noisy_losses_says_how_far_off_it_is_and_is_nearer_to_the_truth():
    law, error = fit_law(trained(PUBLISHED, noise=1e-3))
    assert 0.3e-3 < error < 3e-3  # a share of 0.1 % of losses near 2.4
    assert max(abs(law.loss(*cell) - PUBLISHED.loss(*cell)) for cell in BETWEEN) < 3e-3


def test_one_diverged_run_does_not_bend_the_law():
    points = trained(PUBLISHED)
    points[7] = points[7]._replace(loss=6.0)
    law, _ = fit_law(points)
    assert max(abs(law.loss(*cell) - PUBLISHED.loss(*cell)) for cell in BETWEEN) < 1e-3


@pytest.mark.parametrize("column", [0, 1, 2])
def test_runs_that_do_not_differ_enough_determine_no_law(column):
    points = [p for p in trained(PUBLISHED) if p[column] != (SIZES, TEXTS, EXPERTS)[column][0]]
    with pytest.raises(UserError, match="do not determine the law; train 10 or more, 3 or more of each"):
        fit_law(points)


def test_what_lies_outside_of_the_sweep_is_not_covered():
    assert PUBLISHED.covers(0.29e9, 500e9, 8)
    assert not PUBLISHED.covers(0.1e9, 500e9, 8)
    assert not PUBLISHED.covers(0.3e9, 6e12, 8)
    assert not PUBLISHED.covers(0.3e9, 500e9, 64)
