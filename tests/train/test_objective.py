"""What a step minimises and what it reports, against sums written out here."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import OptimizerConfig
from moe_jax.model.attention import Tokens
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.paths import flatten_paths
from moe_jax.train.state import TrainState, assemble, compute_for
from moe_jax.train.step import make_eval_step, make_loss_and_grads, make_train_step
from tests.tiny import batch, fresh_state, quick, run_config, with_moe

MESH = single_device_mesh()


def uneven() -> dict[str, np.ndarray]:
    """Even rows have 3 loss-bearing tokens of 14, odd ones 5 of 6: the two microbatches of an accumulation by 2."""
    data = batch()
    data["loss_mask"][::2] = 0
    data["loss_mask"][::2, 1:4] = 1
    for name in ("loss_mask", "segment_ids"):
        data[name][1::2, 6:] = 0
    return data


@cache
def initial() -> TrainState:
    """Parameters, and biases that no router starts with."""
    state = fresh_state(run_config(), MESH)
    draw = np.random.default_rng(0).normal
    state.biases = jax.tree.map(lambda bias: jnp.asarray(draw(size=bias.shape), jnp.float32), state.biases)
    return state


@cache
def loss_and_grads(accumulation: int, z_loss: float, aux_loss: float) -> Any:
    """((loss, its parts), gradients) of the uneven batch."""
    model = with_moe(router_z_loss=z_loss, aux_loss=aux_loss)
    cfg = run_config(model, gradient_accumulation=accumulation, remat="full")
    return quick(make_loss_and_grads(cfg, MESH))(initial().params, initial().biases, uneven())


@quick
def written_out(z_loss: float, aux_loss: float, params: dict, biases: dict, data: dict) -> Any:
    """((loss, its three parts), gradients): nats per token and the router's losses, means over layers, weighed."""
    cfg = run_config()

    def objective(params):
        model, compute = assemble(cfg.model, params, biases), compute_for(cfg, MESH)
        tokens = Tokens(data["positions"], data["segment_ids"])
        hidden, stats, _ = model(data["tokens"], tokens, compute, remat="full")
        assert stats is not None
        nll = model.loss(hidden, data["targets"], data["loss_mask"], compute, 8)
        z, aux = stats.z_loss.mean(), stats.aux_loss.mean()
        return nll / data["loss_mask"].sum() + z_loss * z + aux_loss * aux, (nll, z, aux)

    return jax.value_and_grad(objective, has_aux=True)(params)


@pytest.mark.parametrize(
    ("accumulation", "z_loss", "aux_loss"),
    [(1, 0.1, 0.3), (2, 0.1, 0.0)],  # the balance loss is of a microbatch, the others are of the whole batch
    ids=["whole", "accumulated"],
)
def test_the_objective_is_nats_per_token_and_the_routers_losses_however_uneven_the_microbatches(
    accumulation, z_loss, aux_loss
):
    (loss, parts), grads = loss_and_grads(accumulation, z_loss, aux_loss)
    (total, (nll, z, aux)), wanted = written_out(z_loss, aux_loss, initial().params, initial().biases, uneven())
    np.testing.assert_allclose([loss, parts.nll, parts.z_loss], [total, nll, z], rtol=1e-5)
    assert accumulation > 1 or parts.aux_loss == pytest.approx(float(aux), rel=1e-5)
    assert z > 1 and aux > 1
    wanted = flatten_paths(wanted)
    for path, value in flatten_paths(grads).items():
        np.testing.assert_allclose(value, wanted[path], atol=1e-5 * np.abs(wanted[path]).max(), err_msg=path)


def test_metrics_are_of_this_steps_gradients_rate_nats_and_real_tokens():
    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=4, clip_norm=0.01)
    cfg = run_config(with_moe(router_z_loss=0.1, aux_loss=0.3), optimizer=optimizer, remat="full")
    data = uneven()
    nats, tokens = quick(make_eval_step(cfg, MESH))(initial().params, initial().biases, data)
    (total, parts), grads = loss_and_grads(1, 0.1, 0.3)
    norm = np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(grads)))
    step, state = quick(make_train_step(cfg, MESH)), jax.tree.map(jnp.copy, initial())  # donated
    state, metrics = step(state, data)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.1
    assert metrics["tokens"] == tokens == data["loss_mask"].sum() == 4 * (3 + 5)
    assert metrics["real"] == 4 * (14 + 6)
    assert metrics["loss"] == pytest.approx(float(nats / tokens), rel=1e-5)  # evaluated with the same biases
    assert float(total) > float(metrics["loss"]) + 0.3
    for name in ("z_loss", "aux_loss", "counts_LE"):
        np.testing.assert_allclose(metrics[name], getattr(parts, name), rtol=1e-5)
    _, second = step(state, data)
    rates = [float(m["learning_rate"]) for m in (metrics, second)]
    np.testing.assert_allclose(rates, [0.025, 0.05], rtol=1e-6)


def test_a_router_without_a_bias_keeps_it_as_it_is():
    cfg = run_config(with_moe(use_expert_bias=False), remat="full")
    state, _ = quick(make_train_step(cfg, MESH))(jax.tree.map(jnp.copy, initial()), uneven())
    for bias, before in zip(*(jax.tree.leaves(s.biases) for s in (state, initial())), strict=True):
        np.testing.assert_array_equal(bias, before)
