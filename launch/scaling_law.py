"""The loss of a sparse model from its active parameters, its training tokens and its number of experts.

    L(N, D, E) = A e^delta N^(alpha + gamma ln e) + B e^omega D^(beta + zeta ln e) + c
    1 / e      = 1 / (E - 1 + 1 / (1 - 1/32)) + 1 / 32

N active parameters and D tokens, both in billions. E is how many times wider all feed-forwards of a layer are than
those that one token passes (1: a dense model; 8: MobileMoE). e saturates at 32 as E grows (Clark et al. 2022,
arXiv 2202.01169); with it the form is the joint law of Ludziejewski et al. (2025, arXiv 2502.05172), which
MobileMoE fits (arXiv 2605.27358, section 3). With one E it is Chinchilla's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from moe_jax.config import ModelConfig
from moe_jax.errors import UserError

_MOST_EXPERTS = 32.0
_HUBER = 1e-3  # log-loss from which a point counts linearly: Chinchilla's delta (arXiv 2203.15556, appendix D.2)
_STARTS = 12
_LEAST = 10  # models for nine coefficients
_DISTINCT = 3  # values of N, D and E each without which the nine coefficients are not determined
Span = tuple[float, float]


class Point(NamedTuple):
    """A trained model: N and D (not in billions), E, and its loss in nats per token."""

    active: float
    tokens: float
    expansion: float
    loss: float


class Law(NamedTuple):
    """Coefficients of the form above, and the least and largest N, D and E of the models that they come from."""

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float
    spans: tuple[Span, Span, Span]

    def loss(self, active: float, tokens: float, expansion: float) -> float:
        """Nats per token of a model with `active` parameters after `tokens`; neither is in billions."""
        return float(_loss(np.array(self[:9]), *(np.array([v]) for v in (active, tokens, expansion)))[0])

    def covers(self, active: float, tokens: float, expansion: float) -> bool:
        """Whether such a model lies within what the law comes from, a twentieth more or less."""
        values = zip((active, tokens, expansion), self.spans, strict=True)
        return all(low / 1.05 <= value <= high * 1.05 for value, (low, high) in values)


# Table A.2 of the paper as reading notes give it; billions as units are inferred from the losses that it reports.
# Its models had whole experts: finer and shared ones, which the paper found later, move the loss itself and, as is
# assumed here, not which shape has the least.
PUBLISHED = Law(
    0.2388, 0.0906, -0.2833, 0.0387, 0.6019, 1.0593, -0.3210, -0.3684, 1.9730,
    spans=((0.3e9, 0.9e9), (100e9, 500e9), (1.0, 32.0)),
)  # fmt: skip


def expansion(cfg: ModelConfig) -> float:
    """E of a model: width of all its feed-forwards over that of those that one token passes."""
    if cfg.moe is None:
        return 1.0
    shared, each = cfg.moe.shared_expert_width, cfg.moe.expert_width
    return (shared + cfg.moe.num_experts * each) / (shared + cfg.moe.num_experts_per_tok * each)


def fit_law(points: Sequence[Point]) -> tuple[Law, float]:
    """The law that trained models follow, and the root mean square of what it misses them by, in nats.

    Minimises the Huber loss of the logarithms from several starts, because the form has several minima.

    Raises:
        UserError: points too few, or too much alike, to determine it.
    """
    columns = np.array([point[:3] for point in points], float).reshape(-1, 3).T
    distinct = [len(np.unique(column.round(6))) for column in columns]
    if len(points) < _LEAST or min(distinct) < _DISTINCT:
        raise UserError(
            f"{len(points)} models with {distinct[0]} sizes, {distinct[1]} token counts and {distinct[2]} numbers "
            f"of experts do not determine the law; train {_LEAST} or more, {_DISTINCT} or more of each"
        )
    found = np.log([point.loss for point in points])

    def missed(theta: np.ndarray) -> np.ndarray:
        return np.log(_loss(_unlogged(theta), *columns)) - found

    generator, low = np.random.default_rng(0), min(found)
    best, least = None, np.inf
    for _ in range(_STARTS):
        slopes = generator.uniform(-0.6, 0.0, 2), generator.normal(0, 0.1, 4)
        (alpha, beta), (delta, gamma, omega, zeta) = slopes
        A, B = generator.uniform(-3, 1, 2)
        start = [A, delta, alpha, gamma, B, omega, beta, zeta, low - generator.uniform(0.05, 1.0)]
        tried = least_squares(missed, start, loss="huber", f_scale=_HUBER, max_nfev=2000, x_scale="jac")
        if tried.cost < least:
            best, least = tried.x, tried.cost
    assert best is not None
    spans = [(float(column.min()), float(column.max())) for column in columns]
    law = Law(*map(float, _unlogged(best)), spans=(spans[0], spans[1], spans[2]))
    errors = [law.loss(*point[:3]) - point.loss for point in points]
    return law, float(np.sqrt(np.mean(np.square(errors))))


def _unlogged(theta: np.ndarray) -> np.ndarray:
    """Coefficients, of which A, B and c are positive, from what is fitted."""
    theta = theta.copy()
    theta[[0, 4, 8]] = np.exp(np.clip(theta[[0, 4, 8]], -50, 50))
    return theta


def _loss(coefficients: np.ndarray, active: np.ndarray, tokens: np.ndarray, expansion: np.ndarray) -> np.ndarray:
    A, delta, alpha, gamma, B, omega, beta, zeta, c = coefficients
    saturated = 1 / (1 / (expansion - 1 + 1 / (1 - 1 / _MOST_EXPERTS)) + 1 / _MOST_EXPERTS)
    log_e = np.log(saturated)
    size = delta * log_e + (alpha + gamma * log_e) * np.log(active / 1e9)
    text = omega * log_e + (beta + zeta * log_e) * np.log(tokens / 1e9)
    # A fit that strays must not overflow: nothing that it seeks lies so far out.
    return A * np.exp(np.clip(size, -50, 50)) + B * np.exp(np.clip(text, -50, 50)) + c
