"""The optimizer against AdamW in NumPy, and the schedules on their way."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_jax.config import OptimizerConfig
from moe_jax.model.describe import describe
from moe_jax.paths import flatten_paths, unflatten_paths
from moe_jax.train.optimizer import make_optimizer, make_schedule
from tests.tiny import DENSE, quick


@pytest.mark.parametrize(
    ("kind", "rate"),
    [("cosine", 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), ("linear", 1 - 0.9 / 4), ("constant", 1.0)],
    ids=["cosine", "linear", "constant"],
)
def test_a_quarter_of_the_way_each_schedule_stands_where_its_curve_does(kind, rate):
    cfg = OptimizerConfig(learning_rate=1.0, schedule=kind, warmup_steps=4, final_fraction=0.1)
    assert float(np.asarray(make_schedule(cfg, 20)(4 + 4))) == pytest.approx(rate, rel=1e-6)


def test_updates_are_those_of_adamw_on_clipped_gradients():
    cfg = OptimizerConfig(
        learning_rate=0.1, schedule="constant", b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.5, clip_norm=2.0
    )
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=leaf.shape) for path, leaf in describe(DENSE).items()}
    count = sum(value.size for value in params.values())
    # The first gradient is clipped, the second is not: another norm in another place would show.
    grads = [{k: size * rng.normal(size=v.shape) for k, v in params.items()} for size in (1.0, 1 / count**0.5)]
    optimizer = make_optimizer(cfg, 10, DENSE)
    got, update = unflatten_paths({k: v.astype(np.float32) for k, v in params.items()}), quick(optimizer.update)
    state, m, v = optimizer.init(got), *({k: np.zeros_like(p) for k, p in params.items()} for _ in range(2))
    for step, grad in enumerate(grads, 1):
        given = unflatten_paths({k: g.astype(np.float32) for k, g in grad.items()})
        updates, state = update(given, state, got)
        norm = math.sqrt(sum((g**2).sum() for g in grad.values()))
        assert (norm > 2) == (step == 1)
        for path, update_by_path in flatten_paths(updates).items():
            g = grad[path] * min(1.0, 2.0 / norm)
            m[path], v[path] = 0.8 * m[path] + 0.2 * g, 0.9 * v[path] + 0.1 * g**2
            want = m[path] / (1 - 0.8**step) / (np.sqrt(v[path] / (1 - 0.9**step)) + 1e-3)
            want = want + (0 if path.endswith("scale") else 0.5 * params[path])
            np.testing.assert_allclose(update_by_path, -0.1 * want, rtol=1e-4, atol=1e-6, err_msg=path)
