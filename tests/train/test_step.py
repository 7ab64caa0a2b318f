"""Optimizer, schedule and balancing."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import MeshConfig, OptimizerConfig
from moe_jax.parallel.mesh import make_mesh
from moe_jax.paths import flatten_paths
from moe_jax.train.balance import update_bias
from moe_jax.train.optimizer import make_optimizer, make_schedule
from moe_jax.train.state import init_state
from moe_jax.train.step import make_train_step, put_batch
from tests.tiny import MOE, batch, run_config, with_moe


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end_where_they_say(kind):
    cfg = OptimizerConfig(learning_rate=1.0, schedule=kind, warmup_steps=4, final_fraction=0.1)
    rate = make_schedule(cfg, 20)
    rates = [float(np.asarray(rate(i))) for i in (0, 1, 2, 3, 20)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    assert rates[4] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_norms_do_not_decay_and_the_bias_is_no_parameter():
    params = init_state(run_config(), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])).params
    assert "layers/ffn/router/bias" not in flatten_paths(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 10, MOE)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = cast(Any, optimizer.update(zeros, optimizer.init(params), params)[0])
    for path, update in flatten_paths(updates).items():
        assert bool((update != 0).any()) == (not path.endswith("scale")), path


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8), st.floats(1e-4, 1e-1))
def test_bias_moves_against_the_load_and_keeps_its_sum(counts, rate):
    counts_LE = jnp.asarray([counts], jnp.int32)
    bias = np.asarray(update_bias(jnp.zeros_like(counts_LE, jnp.float32), counts_LE, rate))[0]
    assert abs(bias.sum()) < 1e-5
    order = np.argsort(counts)
    assert (np.diff(bias[order]) <= 1e-7).all()


def test_bias_updates_pull_an_unbalanced_router_together():
    cfg = run_config(with_moe(bias_update_rate=0.05))
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    state = init_state(cfg, mesh)
    state.biases = jax.tree.map(lambda b: b.at[:, 0].set(1.0), state.biases)
    step = make_train_step(cfg, mesh)
    loads = []
    for seed in range(30):
        state, metrics = step(state, put_batch(batch(seed=seed), mesh))
        counts = np.asarray(metrics["counts_LE"])
        loads.append((counts.max(-1) / counts.mean(-1)).mean())
    assert loads[0] > 2.5 and loads[-1] < 0.75 * loads[0]


def test_training_on_one_batch_learns_it():
    cfg = run_config(optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"))
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    state, data = init_state(cfg, mesh), put_batch(batch(), mesh)
    step = make_train_step(cfg, mesh)
    losses = []
    for _ in range(30):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["tokens"]) == batch()["loss_mask"].sum()
