"""The program that TPUs run, its kernels interpreted on CPU: the same loss and gradients as plain JAX."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from moe_jax import generate
from moe_jax.config import DataConfig, MeshConfig, QuantConfig
from moe_jax.model import attention, moe, transformer
from moe_jax.model.layers import Compute
from moe_jax.model.transformer import empty_cache
from moe_jax.parallel import vocabulary
from moe_jax.parallel.batches import put_batch
from moe_jax.paths import flatten_paths
from moe_jax.train.state import assemble
from moe_jax.train.step import make_eval_step, make_loss_and_grads
from tests.tiny import batch, equations, fresh_state, mesh_of, quick, run_config, with_moe

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


def loss_and_gradients(operands, quant=None):
    (loss, _), grads = quick(make_loss_and_grads(replace(CFG, quant=quant), mesh_of(MESH)))(*operands)
    return {"loss": np.asarray(loss)} | {path: np.asarray(g) for path, g in flatten_paths(grads).items()}


# Where activations are rounded to INT8, what differs in the last bit may round to another code.
@pytest.mark.parametrize(("quant", "tolerance"), [(None, 2e-5), (QuantConfig(), 1e-2)], ids=["float", "quantised"])
def test_loss_and_every_gradient_equal_those_of_plain_jax(request, quant, tolerance):
    """Rows in tiles with holes between experts, rows that no kernel writes, tokens and heads cut."""
    made = operands()
    want = loss_and_gradients(made, quant)
    names = request.getfixturevalue("tpu")
    got = loss_and_gradients(made, quant)
    assert names >= {"heads", "heads_gradient", "exponentials"}
    assert quant or names >= {"gate", "gate_gradient"}
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, atol=tolerance * np.abs(value).max(), err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_float32_ask_a_tpu_for_all_of_their_bits(tpu, dtype):
    """By default it rounds both sides to bfloat16, also in kernels."""
    cfg = replace(CFG, compute_dtype=dtype)
    program = jax.make_jaxpr(make_loss_and_grads(cfg, mesh_of(MESH)))(*operands())
    asked = Counter(
        (eqn.params["precision"], *(str(v.aval.dtype) for v in eqn.invars))
        for eqn in equations(program.jaxpr)
        if eqn.primitive.name == "dot_general"
    )
    highest = (jax.lax.Precision.HIGHEST,) * 2
    exact = asked.pop((highest, "float32", "float32"))
    if dtype == "float32":
        assert exact > 40 and not any("float32" in key for key in asked), asked
    else:
        assert exact == 4  # the router's, as it is the one part that stays in float32


def test_generation_and_evaluation_ask_for_them_too(tpu):
    ids = np.zeros((1, 128), np.int32)
    parameters, biases, data = operands()
    cache = empty_cache(MODEL, 1, 128, jnp.float32)
    graph = assemble(MODEL, parameters, biases)
    compute = Compute(mesh_of(MeshConfig(fsdp=1)))
    programs = [
        jax.make_jaxpr(make_eval_step(CFG, mesh_of(MESH)))(parameters, biases, data),
        jax.make_jaxpr(lambda: generate._uncached(graph, compute, ids))(),
        jax.make_jaxpr(lambda: generate._extend(graph, compute, cache, ids, jnp.int32(0), jnp.int32(3)))(),
    ]
    for program in programs:
        asked = {
            eqn.params["precision"]
            for eqn in equations(program.jaxpr)
            if eqn.primitive.name == "dot_general" and all(v.aval.dtype == jnp.float32 for v in eqn.invars)
        }
        assert asked == {(jax.lax.Precision.HIGHEST,) * 2}
