"""Optimizer, schedule and balancing."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import REMAT_POLICIES, OptimizerConfig
from moe_jax.model.transformer import SAVED
from moe_jax.parallel.batches import put_batch
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.paths import flatten_paths
from moe_jax.train.balance import update_bias
from moe_jax.train.optimizer import make_optimizer, make_schedule
from moe_jax.train.state import state_shardings
from moe_jax.train.step import make_loss_and_grads, make_train_step
from tests.tiny import MOE, QUICK, batch, fresh_state, occurrences, quick, run_config, with_moe


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedules_warm_up_and_end_where_they_say(kind):
    cfg = OptimizerConfig(learning_rate=1.0, schedule=kind, warmup_steps=4, final_fraction=0.1)
    rate = make_schedule(cfg, 20)
    rates = [float(np.asarray(rate(i))) for i in (0, 1, 2, 3, 20)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    assert rates[4] == pytest.approx(1.0 if kind == "constant" else 0.1)


def test_norms_do_not_decay_and_the_bias_is_no_parameter():
    params = initial().params
    assert "layers/ffn/router/bias" not in flatten_paths(params)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 10, MOE)

    @quick
    def first_update(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optimizer.update(zeros, optimizer.init(params), params)[0]

    updates = first_update(params)
    for path, update in flatten_paths(updates).items():
        assert bool((update != 0).any()) == (not path.endswith("scale")), path


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=8), st.floats(1e-4, 1e-1))
def test_bias_moves_against_the_load_and_keeps_its_sum(counts, rate):
    counts_LE = jnp.asarray([counts], jnp.int32)
    bias = np.asarray(update_bias(jnp.zeros_like(counts_LE, jnp.float32), counts_LE, rate))[0]
    assert abs(bias.sum()) < 1e-5
    order = np.argsort(counts)
    assert (np.diff(bias[order]) <= 1e-7).all()


@settings(max_examples=30)  # each shape is compiled
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 64), st.floats(1e-3, 1.0))
def test_a_bias_moves_from_where_it_stands_by_the_signs_of_the_load_less_their_mean(seed, layers, experts, rate):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(layers, experts)).astype(np.float32)
    counts = rng.integers(0, 9, (layers, experts)).astype(np.int32)
    push = np.sign(counts.sum(-1, keepdims=True) - experts * counts)
    moved = update_bias(jnp.asarray(before), jnp.asarray(counts), rate) - before
    np.testing.assert_allclose(moved, rate * (push - push.mean(-1, keepdims=True)), atol=1e-6)


def test_bias_updates_pull_an_unbalanced_router_together():
    cfg = run_config(with_moe(bias_update_rate=0.05), remat="full")
    mesh = single_device_mesh()
    state = fresh_state(cfg, mesh)
    state.biases = jax.tree.map(lambda b: b.at[:, 0].set(1.0), state.biases)
    step = quick(make_train_step(cfg, mesh))
    loads = []
    for seed in range(30):
        state, metrics = step(state, put_batch(batch(seed=seed), mesh))
        counts = np.asarray(metrics["counts_LE"])
        loads.append((counts.max(-1) / counts.mean(-1)).mean())
    assert loads[0] > 2.5 and loads[-1] < 0.75 * loads[0]


def test_training_on_one_batch_learns_it():
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule="constant")
    cfg = run_config(optimizer=optimizer, remat="full")
    mesh = single_device_mesh()
    state, data = fresh_state(cfg, mesh), put_batch(batch(), mesh)
    step = quick(make_train_step(cfg, mesh))
    losses = []
    for _ in range(30):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert float(metrics["tokens"]) == batch()["loss_mask"].sum()


@cache
def program(remat):
    """(the traced function of parameters, biases and a batch under a policy, the same compiled)."""
    cfg, mesh = run_config(remat=remat), single_device_mesh()
    traced = jax.jit(make_loss_and_grads(cfg, mesh)).trace(*operands())
    return traced, traced.lower().compile(QUICK)


def operands():
    return initial().params, initial().biases, put_batch(batch(), single_device_mesh())


@cache
def initial():
    return fresh_state(run_config(), single_device_mesh())


@cache
def losses_and_gradients(remat):
    (loss, _), grads = program(remat)[1](*operands())
    return {"loss": np.asarray(loss)} | {path: np.asarray(g) for path, g in flatten_paths(grads).items()}


REMATERIALISED = [policy for policy in REMAT_POLICIES if policy != "nothing"]


@pytest.mark.parametrize("policy", REMATERIALISED)
def test_what_is_recomputed_changes_neither_loss_nor_gradients(policy):
    for path, value in losses_and_gradients("nothing").items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(losses_and_gradients(policy)[path], value, atol=1e-5 * scale, err_msg=path)


def test_policies_keep_what_they_say_and_the_routing_always():
    assert set(SAVED) == set(REMATERIALISED)
    assert len({occurrences(program(policy)[0].jaxpr.jaxpr, "argmax") for policy in REMAT_POLICIES}) == 1
    full, save_attention, save_dispatch = (program(policy)[1].as_text() or "" for policy in REMATERIALISED)
    assert save_attention.count(" dot(") < full.count(" dot(")
    assert save_dispatch.count(" gather(") < full.count(" gather(")


def test_moments_in_the_memory_of_the_host_change_nothing():
    after = {}
    for offload in (False, True):
        cfg, mesh = run_config(optimizer=OptimizerConfig(offload=offload), remat="full"), single_device_mesh()
        where = state_shardings(cfg, mesh)
        moments = [m for m in jax.tree.leaves(where.opt_state) if m.memory_kind == "pinned_host"]
        assert bool(moments) == offload
        state = jax.device_put(jax.tree.map(jnp.copy, initial()), where)  # donated
        batches = [put_batch(batch(seed=seed), mesh) for seed in range(2)]
        jitted: Any = make_train_step(cfg, mesh)
        step = jitted.lower(state, batches[0]).compile(QUICK)
        for data in batches:
            state, _ = step(state, data)
        assert jax.tree.map(lambda leaf: leaf.sharding.memory_kind, state.opt_state) == jax.tree.map(
            lambda leaf: leaf.memory_kind, where.opt_state
        )
        after[offload] = state
    for without, with_offload in zip(*(jax.tree.leaves(after[k].params) for k in (False, True)), strict=True):
        np.testing.assert_allclose(without, with_offload, rtol=1e-6)
