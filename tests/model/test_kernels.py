"""The program that TPUs run, its kernels interpreted on CPU: the same loss and gradients as plain JAX."""

from dataclasses import replace

import numpy as np
import pytest
from jax.experimental import pallas as pl

from moe_jax.config import DataConfig, MeshConfig
from moe_jax.model import attention, moe, transformer
from moe_jax.parallel import vocabulary
from moe_jax.parallel.batches import put_batch
from moe_jax.paths import flatten_paths
from moe_jax.train.step import make_loss_and_grads
from tests.tiny import batch, fresh_state, mesh_of, quick, run_config, with_moe

MODEL = replace(with_moe(num_experts=4), max_position_embeddings=256)
MESH = MeshConfig(fsdp=1, expert=2, context=2, tensor=2)


DATA = DataConfig(seq_len=256, global_batch_size=2)  # the kernels want 128 places per device
CFG = run_config(MODEL, data=DATA, mesh=MESH, loss_chunk=128, remat="full")


@pytest.fixture
def tpu(monkeypatch):
    """The model as for a mesh of TPUs, every kernel interpreted; the names of those that were called."""
    compiled, names = pl.pallas_call, set()

    def interpreted(kernel, **options):
        names.add(options.get("name"))
        return compiled(kernel, **options | {"interpret": True})

    monkeypatch.setattr(pl, "pallas_call", interpreted)
    for module in (attention, moe, transformer, vocabulary):
        monkeypatch.setattr(module, "platform", lambda mesh: "tpu")
    return names


def operands():
    mesh = mesh_of(MESH)
    state = fresh_state(CFG, mesh)
    return state.params, state.biases, put_batch(batch(2, 256), mesh)


def loss_and_gradients(operands):
    (loss, _), grads = quick(make_loss_and_grads(CFG, mesh_of(MESH)))(*operands)
    return {"loss": np.asarray(loss)} | {path: np.asarray(g) for path, g in flatten_paths(grads).items()}


def test_loss_and_every_gradient_equal_those_of_plain_jax(request):
    """Rows in tiles with holes between experts, rows that no kernel writes, tokens and heads cut."""
    made = operands()
    want = loss_and_gradients(made)
    names = request.getfixturevalue("tpu")
    got = loss_and_gradients(made)
    assert names >= {"heads", "heads_gradient", "gate", "gate_gradient", "exponentials"}
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, atol=2e-5 * np.abs(value).max(), err_msg=path)
