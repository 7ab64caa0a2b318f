"""One optimizer step over the mesh: loss, gradients, accumulation, update, balancing; and evaluation.

Legend: A microbatches, B batch (of a microbatch), S sequence, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.config import RunConfig
from moe_jax.model.attention import Tokens
from moe_jax.parallel.batches import Batch
from moe_jax.train.balance import update_bias
from moe_jax.train.optimizer import make_optimizer, make_schedule
from moe_jax.train.state import TrainState, assemble, compute_for, state_shardings

Metrics = dict[str, jax.Array]


class Loss(NamedTuple):
    """Of one microbatch: sums of nats over loss-bearing tokens, of counts and of drops; means of the two losses."""

    nll: jax.Array
    z_loss: jax.Array
    aux_loss: jax.Array
    counts_LE: jax.Array
    dropped_L: jax.Array


def _forward(cfg: RunConfig, mesh: Mesh, params: dict, biases: dict, batch: Batch) -> Loss:
    model, compute = assemble(cfg.model, params, biases), compute_for(cfg, mesh)
    tokens = Tokens(batch["positions"], batch["segment_ids"])
    hidden, stats, _ = model(batch["tokens"], tokens, compute, remat=cfg.remat)
    nll = model.loss(hidden, batch["targets"], batch["loss_mask"], compute, cfg.loss_chunk)
    if stats is None:
        none = jnp.zeros(0)
        return Loss(nll, jnp.float32(0), jnp.float32(0), none, none)
    return Loss(nll, stats.z_loss.mean(), stats.aux_loss.mean(), stats.counts_E, stats.dropped)


def _microbatches(batch: Batch, count: int) -> Batch:
    """[A*B, S] -> [A, B, S], interleaved so that each device's rows stay on it."""
    return {k: jnp.moveaxis(v.reshape(-1, count, v.shape[-1]), 1, 0) for k, v in batch.items()}


def make_loss_and_grads(cfg: RunConfig, mesh: Mesh) -> Callable[[dict, dict, Batch], Any]:
    """A function of (params, biases, batch) -> ((loss, Loss), grads), summed over microbatches.

    The loss is the mean over the loss-bearing tokens of the whole batch, whatever the accumulation; but the balance
    loss, a product of two means, is one of each microbatch.
    """
    moe = cfg.model.moe

    def objective(params, biases, batch, tokens, real):
        parts = _forward(cfg, mesh, params, biases, batch)
        loss = parts.nll / tokens
        if moe is not None:
            share = (batch["segment_ids"] > 0).sum() / real
            loss += share * (moe.router_z_loss * parts.z_loss + moe.aux_loss * parts.aux_loss)
            parts = parts._replace(z_loss=share * parts.z_loss, aux_loss=share * parts.aux_loss)
        return loss, parts

    def loss_and_grads(params, biases, batch):
        with compute_for(cfg, mesh).products():
            return summed(params, biases, batch)

    def summed(params, biases, batch):
        tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)
        real = jnp.maximum((batch["segment_ids"] > 0).sum(), 1)
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        if cfg.gradient_accumulation == 1:
            return value_and_grad(params, biases, batch, tokens, real)

        def add(total, microbatch):
            result = value_and_grad(params, biases, microbatch, tokens, real)
            return jax.tree.map(jnp.add, total, result), None

        micro = _microbatches(batch, cfg.gradient_accumulation)
        first = jax.tree.map(lambda a: a[0], micro)
        shapes = jax.eval_shape(value_and_grad, params, biases, first, tokens, real)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(add, zeros, micro)[0]

    return loss_and_grads


def make_train_step(cfg: RunConfig, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step; the state is donated. Batches come from `put_batch`.

    A batch with `votes` (see `put_votes`) gives the metric `vote`: what one process asks for, all learn.
    """
    optimizer = make_optimizer(cfg.optimizer, cfg.steps, cfg.model)
    schedule = make_schedule(cfg.optimizer, cfg.steps)
    loss_and_grads = make_loss_and_grads(cfg, mesh)
    moe = cfg.model.moe

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = dict(batch)
        vote = {"vote": batch.pop("votes").max()} if "votes" in batch else {}
        (_, parts), grads = loss_and_grads(state.params, state.biases, batch)
        moments = state.opt_state
        if cfg.optimizer.offload:
            moments = jax.device_put(moments, state_shardings(cfg, mesh, in_use=True).opt_state)
        updates, opt_state = optimizer.update(grads, moments, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        biases = state.biases
        if moe is not None and moe.use_expert_bias:
            biases = jax.tree.map(lambda bias: update_bias(bias, parts.counts_LE, moe.bias_update_rate), biases)
        tokens = batch["loss_mask"].sum()
        metrics: Metrics = {
            "loss": parts.nll / jnp.maximum(tokens, 1.0),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
            "tokens": tokens,
            "real": (batch["segment_ids"] > 0).sum(),
            "z_loss": parts.z_loss,
            "aux_loss": parts.aux_loss,
            "counts_LE": parts.counts_LE,
            "dropped_L": parts.dropped_L,
        }
        return TrainState(state.step + 1, params, biases, opt_state), metrics | vote

    # Metrics everywhere: each process reads them.
    shardings = state_shardings(cfg, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=shardings)


def make_eval_step(cfg: RunConfig, mesh: Mesh) -> Callable[[dict, dict, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted function of (params, biases, batch) -> (sum of nats, number of loss-bearing tokens)."""

    def evaluate(params: dict, biases: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with compute_for(cfg, mesh).products():
            return _forward(cfg, mesh, params, biases, batch).nll, batch["loss_mask"].sum()

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))
