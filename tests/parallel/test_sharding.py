"""One step means the same on one device and on eight, whatever the mesh."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from moe_jax.config import MeshConfig, QuantConfig
from moe_jax.parallel.batches import put_batch
from moe_jax.paths import flatten_paths
from moe_jax.train.state import abstract_state
from moe_jax.train.step import make_loss_and_grads, make_train_step
from tests.tiny import DENSE, MOE, batch, fresh_state, mesh_of, quick, run_config, with_moe


def sizes(**axes):
    return MeshConfig(**{"fsdp": 1} | axes)


ONE = sizes()
MESHES = {
    "slices": sizes(slices=2),
    "data": sizes(data=8),
    "fsdp": sizes(fsdp=8),
    "expert": sizes(expert=6),
    "context": sizes(context=4),
    "tensor": sizes(tensor=2),
    "fsdp_expert": sizes(fsdp=4, expert=2),
    "fsdp_tensor": sizes(fsdp=4, tensor=2),
    "fsdp_context": sizes(fsdp=2, context=4),
    "slices_fsdp": sizes(slices=2, fsdp=4),
    "expert_context_tensor": sizes(expert=2, context=2, tensor=2),
}
ROWS, REAL = 24, 24 * 14  # sequences, and their tokens that are not padding


@cache
def initial(model):
    """Parameters and biases on one device, as NumPy. Bounds on what a buffer holds do not change them."""
    state = fresh_state(run_config(DENSE if model.moe is None else MOE), mesh_of(ONE))
    return jax.device_get((state.params, state.biases))


@cache
def program(model, mesh_sizes, **options):
    """(where parameters and biases live, mesh, the compiled function of both and a batch)."""
    cfg, mesh = run_config(model, mesh=mesh_sizes, remat="full", **options), mesh_of(mesh_sizes)
    cfg = replace(cfg, data=replace(cfg.data, global_batch_size=ROWS))
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    return (where.params, where.biases), mesh, quick(make_loss_and_grads(cfg, mesh))


@cache
def loss_and_grads(model, mesh_sizes=ONE, *, lopsided=False, **options):
    """(loss, counts, dropped, flat grads) as NumPy, from the same initial state on any mesh; 2 padded tokens a row.

    With `lopsided` the biases send the first choice of every token to expert 0, the second to expert 1.
    """
    where, mesh, run = program(model, mesh_sizes, **options)
    params, biases = initial(model)
    if lopsided:
        first = np.array([20, 10] + [0] * 4, np.float32)
        biases = jax.tree.map(lambda b: b + first, biases)
    (loss, parts), grads = run(*jax.device_put((params, biases), where), put_batch(batch(ROWS), mesh))
    grads = {path: np.asarray(g) for path, g in flatten_paths(grads).items()}
    return float(loss), np.asarray(parts.counts_LE), np.asarray(parts.dropped_L), grads


def assert_same(got, want, tolerance=2e-5):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert (got[1] == want[1]).all() and (got[2] == want[2]).all()
    assert got[3].keys() == want[3].keys()
    for path, value in want[3].items():
        scale = np.abs(value).max()
        assert scale > 0, path
        np.testing.assert_allclose(got[3][path], value, atol=tolerance * scale, err_msg=path)


@pytest.mark.parametrize("name", MESHES)
def test_loss_and_every_gradient_equal_those_on_one_device(name):
    assert_same(loss_and_grads(MOE, MESHES[name]), loss_and_grads(MOE))


@pytest.mark.parametrize("name", ["fsdp", "expert", "fsdp_expert", "expert_context_tensor"])
def test_a_router_that_sends_everything_to_two_experts_loses_nothing(name):
    """On one device of a group, whose buffer holds the worst case, or on two while four have nothing to do."""
    got = loss_and_grads(MOE, MESHES[name], lopsided=True)
    assert (got[1] == [REAL, REAL, 0, 0, 0, 0]).all() and (got[2] == 0).all()
    assert_same(got, loss_and_grads(MOE, lopsided=True))
    assert all((g[:, 2:] == 0).all() and (g[:, :2] != 0).any() for path, g in got[3].items() if "experts" in path)


def test_accumulated_microbatches_equal_one_batch():
    got = loss_and_grads(MOE, sizes(fsdp=2, expert=2, context=2), gradient_accumulation=2)
    assert_same(got, loss_and_grads(MOE))


def test_in_bfloat16_loss_and_gradients_on_a_mesh_stay_near_those_of_float32():
    got = loss_and_grads(MOE, MESHES["expert_context_tensor"], compute_dtype="bfloat16")
    want = loss_and_grads(MOE)
    assert got[0] == pytest.approx(want[0], rel=1e-2)
    for path, value in want[3].items():
        assert np.linalg.norm(got[3][path] - value) < 0.2 * np.linalg.norm(value), path


def test_quantised_training_equals_one_device():
    # Weights only: an activation on a rounding boundary may flip with the reassociated sum before it.
    quant = QuantConfig(quantize_activations=False)
    got = loss_and_grads(MOE, MESHES["expert_context_tensor"], quant=quant)
    assert_same(got, loss_and_grads(MOE, quant=quant))


def test_a_dense_model_equals_one_device():
    assert_same(loss_and_grads(DENSE, sizes(fsdp=2, context=2, tensor=2)), loss_and_grads(DENSE))


def test_what_a_bounded_buffer_drops_is_counted_layer_by_layer():
    """Two groups of two devices; every token goes to the same two experts of the first device."""
    got = loss_and_grads(with_moe(buffer_factor=1.25), sizes(fsdp=2, expert=2), lopsided=True)
    tokens_of_group = ROWS // 2 * 16
    rows = 1.25 * tokens_of_group * 2 / 2  # two choices, half of the experts
    assert (got[1].sum(1) == 2 * REAL).all() and (got[2] == 2 * REAL - 2 * rows).all()


def test_bias_and_parameters_are_the_same_on_every_shard_and_on_one_device():
    """An update from shard-local counts would leave replicas that differ, which only a look at each shows."""
    after = {}
    for name, mesh_sizes in {"one": ONE, "many": MESHES["expert_context_tensor"]}.items():
        cfg, mesh = run_config(mesh=mesh_sizes, remat="full"), mesh_of(mesh_sizes)
        state = fresh_state(cfg, mesh)
        for made, first in zip(jax.tree.leaves(state.params), jax.tree.leaves(initial(MOE)[0]), strict=True):
            assert (np.asarray(made) == first).all()
        step = quick(make_train_step(cfg, mesh))
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
