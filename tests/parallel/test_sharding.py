"""One step means the same on one device and on eight, whatever the mesh."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig, QuantConfig
from moe_jax.errors import UserError
from moe_jax.parallel.mesh import make_mesh
from moe_jax.paths import flatten_paths
from moe_jax.train.state import init_state
from moe_jax.train.step import make_loss_and_grads, make_train_step, put_batch
from tests.tiny import DENSE, MOE, batch, run_config, with_moe

ONE = MeshConfig(1, 1, 1)
MESHES = {
    "data": MeshConfig(8, 1, 1),
    "fsdp": MeshConfig(1, 8, 1),
    "expert": MeshConfig(2, 2, 2),
    "expert_alone": MeshConfig(1, 1, 6),
}


def _mesh(sizes):
    return make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.expert])


@cache
def loss_and_grads(model, sizes=ONE, accumulation=1, quant=None, rows=8, lopsided=False):
    """(loss, counts, flat grads) as NumPy, from the same initial state on any mesh."""
    cfg = run_config(model, mesh=sizes, gradient_accumulation=accumulation, quant=quant)
    cfg = replace(cfg, data=replace(cfg.data, global_batch_size=rows))
    mesh = _mesh(sizes)
    state = init_state(cfg, mesh)
    biases = state.biases
    if lopsided:
        biases = jax.tree.map(lambda b: b.at[:, 0].set(10.0).at[:, 1].set(9.0), biases)
    run = jax.jit(make_loss_and_grads(cfg, mesh))
    (loss, parts), grads = run(state.params, biases, put_batch(batch(rows), mesh))
    grads = {path: np.asarray(g) for path, g in flatten_paths(grads).items()}
    return float(loss), np.asarray(parts.counts_LE), grads


def assert_same(got, want, tolerance=2e-5):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert (got[1] == want[1]).all()
    for path, value in want[2].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(got[2][path], value, atol=tolerance * scale + 1e-8, err_msg=path)


@pytest.mark.parametrize("name", ["data", "fsdp", "expert"])
def test_loss_and_gradients_equal_those_on_one_device(name):
    assert_same(loss_and_grads(MOE, MESHES[name]), loss_and_grads(MOE))


def test_experts_divide_over_any_divisor_of_their_number():
    sizes = MESHES["expert_alone"]
    assert_same(loss_and_grads(MOE, sizes, rows=6), loss_and_grads(MOE, rows=6))


def test_a_router_that_sends_everything_to_two_experts_loses_nothing():
    got = loss_and_grads(MOE, MESHES["expert"], lopsided=True)
    assert_same(got, loss_and_grads(MOE, lopsided=True))
    assert (got[1][:, :2] > 0).all() and (got[1][:, 2:] == 0).all()


def test_accumulated_microbatches_equal_one_batch_on_eight_devices():
    got = loss_and_grads(MOE, MeshConfig(2, 1, 2), accumulation=2)
    assert_same(got, loss_and_grads(MOE))


def test_quantised_training_equals_one_device():
    # Weights only: an activation on a rounding boundary may flip with the reassociated sum before it.
    quant = QuantConfig(quantize_activations=False)
    assert_same(loss_and_grads(MOE, MESHES["expert"], quant=quant), loss_and_grads(MOE, quant=quant))


def test_a_dense_model_equals_one_device():
    assert_same(loss_and_grads(DENSE, MeshConfig(2, 4, 1)), loss_and_grads(DENSE))


def test_bias_and_parameters_are_the_same_on_every_shard_and_on_one_device():
    """An update from shard-local counts would leave replicas that differ, which only a look at each shows."""
    after = {}
    for name, sizes in {"one": MeshConfig(1, 1, 1), "many": MESHES["expert"]}.items():
        cfg, mesh = run_config(mesh=sizes), _mesh(sizes)
        state = init_state(cfg, mesh)
        step = make_train_step(cfg, mesh)
        for seed in range(2):
            state, _ = step(state, put_batch(batch(seed=seed), mesh))
        after[name] = state
        for leaf in jax.tree.leaves((state.params, state.biases)):
            by_index = {}
            for shard in leaf.addressable_shards:
                first = by_index.setdefault(str(shard.index), np.asarray(shard.data))
                assert (np.asarray(shard.data) == first).all()
    one, many = (flatten_paths(after[k].biases)["layers/ffn/router/bias"] for k in ("one", "many"))
    assert (np.asarray(one) == np.asarray(many)).all()
    assert (np.asarray(one) != 0).any()


@pytest.mark.parametrize(
    ("sizes", "model", "message"),
    [
        (MeshConfig(1, 1, 4), MOE, "use one of 1, 2, 3, 6"),
        (MeshConfig(1, 1, 2), DENSE, "the model is dense"),
        (MeshConfig(3, 1, 1), MOE, "sequences per microbatch 8"),
        (MeshConfig(1, 3, 1), with_moe(), "d_model 64"),
    ],
)
def test_a_mesh_that_cannot_cut_the_model_is_refused_with_what_would_do(sizes, model, message):
    cfg = run_config(model, mesh=sizes)
    with pytest.raises(UserError, match=message):
        init_state(cfg, _mesh(sizes))


@pytest.mark.parametrize("sizes", [MeshConfig(3, 1, 1), MeshConfig(-1, -1, 1), MeshConfig(0, 1, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(UserError, match="mesh data="):
        make_mesh(sizes, jax.devices())


def test_one_axis_may_take_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(2, -1, 1), jax.devices()).shape) == {"data": 2, "fsdp": 4, "expert": 1}
