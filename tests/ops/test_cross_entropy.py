"""Cross entropy in chunks of tokens and blocks of the vocabulary, against its definition."""

import importlib.util
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec, SingleDeviceSharding

from launch.fit_compile import devices_of
from launch.slices import parse_slice
from moe_jax.config import MeshConfig
from moe_jax.ops import cross_entropy as module
from moe_jax.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_and_gradients,
    cross_entropy_reference,
    exponentials_fused,
)
from tests.tiny import mesh_of, quick

WIDTH = 16


def case(tokens, vocab, seed=0, dtype=jnp.float32):
    """Random operands; logits of some tens, and about every third weight 0."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((tokens, WIDTH)) * 3, dtype)
    head = jnp.asarray(rng.standard_normal((vocab, WIDTH)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    weight = jnp.asarray(rng.integers(0, 3, tokens) / 2, jnp.float32)
    return hidden, head, targets, weight


REFERENCE = quick(jax.value_and_grad(cross_entropy_reference, (0, 1)))


@cache
def program(tokens, vocab, chunk, block, kernels=False):
    """The loss alone, and loss and gradients, compiled with blocks of so many rows and the interpreted kernel."""

    def run(*operands):
        options = {"chunk": chunk, "kernels": kernels}
        return cross_entropy(*operands, **options), cross_entropy_and_gradients(*operands, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOGITS", block * chunk)
        patch.setattr(module, "exponentials_fused", partial(exponentials_fused, interpret=True))
        return quick(run).lower(*case(tokens, vocab)).compile()


def assert_equals_the_definition(run, operands, tolerance=2e-5):
    alone, (total, grad_hidden, grad_head) = run(*operands)
    want, want_grads = REFERENCE(*operands)
    hidden, head, _, weight = operands
    # A small loss is the difference of two logits, and no more exact than they are. Its gradients are made of the
    # difference of a probability and 1, which is no more exact either.
    rounding = float(jnp.finfo(jnp.float32).eps * jnp.abs(hidden @ head.T).max())
    np.testing.assert_allclose(alone, want, rtol=1e-5, atol=2 * rounding * weight.sum())
    np.testing.assert_allclose(total, want, rtol=1e-5, atol=2 * rounding * weight.sum())
    for got, expected, other in zip((grad_hidden, grad_head), want_grads, (head, hidden), strict=True):
        least = rounding * float(weight.max() * jnp.abs(other).max())
        np.testing.assert_allclose(got, expected, atol=tolerance * float(jnp.abs(expected).max()) + least)


# tokens, vocabulary, chunk, block: chunks that do and do not divide the tokens, 1, 3 and 5 blocks, a prime.
SIZES = [(13, 50, 4, 50), (13, 50, 13, 10), (8, 96, 8, 40), (9, 53, 16, 20), (1, 96, 1, 32)]


@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_value_and_gradients_equal_the_definition(sizes, seed):
    tokens, vocab, *_ = sizes
    assert_equals_the_definition(program(*sizes), case(tokens, vocab, seed))


# The kernel goes 256 rows at a time: one part-filled step, several with a part-filled last one, several blocks.
@pytest.mark.parametrize("sizes", [(8, 96, 4, 96), (8, 600, 8, 600), (7, 1200, 4, 300), (8, 1024, 8, 512)])
def test_the_kernel_equals_the_definition(sizes):
    assert_equals_the_definition(program(*sizes, kernels=True), case(*sizes[:2]))


@pytest.mark.parametrize("kernels", [False, True])
def test_targets_at_the_ends_of_blocks_are_found(kernels):
    hidden, head, _, _ = case(8, 1200)
    targets = jnp.asarray([0, 255, 256, 299, 300, 599, 600, 1199], jnp.int32)
    operands = (hidden, head, targets, jnp.ones(8))
    assert_equals_the_definition(program(8, 1200, 4, 300, kernels), operands)


def test_logits_too_large_for_exp_stay_exact():
    """A later block may hold the highest logit: the earlier ones are then rescaled to nothing, not to NaN."""
    hidden, head, targets, weight = case(8, 96)
    scale = jnp.geomspace(1e-3, 1e3, 96)[:, None]
    for order in (1, -1):
        assert_equals_the_definition(program(8, 96, 8, 40), (hidden, head * scale[::order], targets, weight))


def test_tokens_of_weight_zero_give_no_loss_and_no_gradient():
    hidden, head, targets, _ = case(13, 50)
    weight = jnp.zeros(13).at[5].set(1.0)
    _, (total, grad, _) = program(13, 50, 4, 50)(hidden, head, targets, weight)
    assert total > 0 and (grad[5] != 0).any()
    assert (grad.at[5].set(0) == 0).all()
    total, *grads = program(13, 50, 4, 50)(hidden, head, targets, jnp.zeros(13))[1]
    assert total == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("parts", [2, 8])
def test_a_vocabulary_cut_over_a_mesh_axis_gives_parts_that_add_up(parts):
    mesh = mesh_of(MeshConfig(fsdp=1, tensor=parts))
    by_row, whole = PartitionSpec("tensor"), PartitionSpec()

    @quick
    @partial(jax.shard_map, mesh=mesh, in_specs=(whole, by_row, whole, whole),
             out_specs=(by_row, (by_row, by_row, by_row)), check_vma=False)  # fmt: skip
    def run(*operands):
        options = {"chunk": 4, "vocab_axis": "tensor"}
        total, grad_hidden, grad_head = cross_entropy_and_gradients(*operands, **options)
        return cross_entropy(*operands, **options)[None], (total[None], grad_hidden[None], grad_head)

    def summed(*operands):
        alone, (total, grad_hidden, grad_head) = run(*operands)
        return alone.sum(), (total.sum(), grad_hidden.sum(0), grad_head)

    assert_equals_the_definition(summed, case(10, 96))


def confident(probability_gap):
    """One token whose target's logit lies so far above all others, in bfloat16, and the others' probability."""
    head = jnp.zeros((64, WIDTH), jnp.bfloat16).at[3, 0].set(1).at[:, 1].set(1).at[3, 1].set(0)
    hidden = jnp.zeros((1, WIDTH), jnp.bfloat16).at[0, 0].set(probability_gap)
    others = 63 * np.exp(-float(probability_gap))
    return (hidden, head, jnp.asarray([3], jnp.int32), jnp.ones(1)), others / (1 + others)


@pytest.mark.parametrize("kernels", [False, True])
def test_in_bfloat16_a_well_predicted_token_keeps_the_relative_precision_of_its_gradient(kernels):
    """p - 1 of a target that is nearly certain is all rounding if p is rounded first: bfloat16 has no 0.99999."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "exponentials_fused", partial(exponentials_fused, interpret=True))
        run = quick(partial(cross_entropy_and_gradients, chunk=1, kernels=kernels))
        for gap in (4, 8, 12):
            operands, others = confident(gap)
            _, grad_hidden, grad_head = run(*operands)
            np.testing.assert_allclose(grad_hidden[0, :2].astype(np.float32), [-others, others], rtol=0.02)
            np.testing.assert_allclose(grad_head[3, 0], -gap * others, rtol=0.02)
            np.testing.assert_allclose(grad_head[4, 0], gap * others / 63, rtol=0.02)


def test_in_bfloat16_gradients_are_near_those_of_float32():
    operands = case(32, 96, dtype=jnp.bfloat16)
    want, want_grads = REFERENCE(*(o.astype(jnp.float32) if o.dtype == jnp.bfloat16 else o for o in operands))
    total, grad_hidden, grad_head = quick(partial(cross_entropy_and_gradients, chunk=8))(*operands)
    assert (grad_hidden.dtype, grad_head.dtype) == (jnp.bfloat16, jnp.float32)
    assert float(total) == pytest.approx(float(want), rel=1e-3)
    for got, expected in zip((grad_hidden, grad_head), want_grads, strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 0.01


def test_neither_all_logits_nor_those_of_a_chunk_ever_exist_at_once(monkeypatch):
    """The compiled program's memory: the probabilities of one chunk, and beside them the logits of one block."""
    tokens, width, vocab, chunk = 4096, 8, 16384, 512
    monkeypatch.setattr(module, "LOGITS", 2048 * chunk)
    shapes = [(tokens, width), (vocab, width), (tokens,), (tokens,)]
    types = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    abstract = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, types, strict=True)]
    run = jax.jit(partial(cross_entropy_and_gradients, chunk=chunk))
    stats = run.lower(*abstract).compile().memory_analysis()
    assert stats is not None and stats.temp_size_in_bytes < 1.5 * chunk * vocab * 4


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e:2x2", "tpu7x:2x2x1"])
def test_no_chip_copies_what_is_kept_between_blocks(chip):
    """The kernel writes in place only where it and XLA tile that array alike; tpu7x tiles bfloat16 by 16 rows."""
    where = SingleDeviceSharding(devices_of(parse_slice(chip), 1)[0])
    shapes = [((4096, 256), "bfloat16"), ((32768, 256), "bfloat16"), ((4096,), "int32"), ((4096,), "float32")]
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
    run = partial(cross_entropy_and_gradients, chunk=2048, kernels=True)
    text = jax.jit(run).trace(*operands).lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    kept = 32768 * 2048
    sizes = [
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"= bf16\[([\d,]+)\]\S* copy\(", text)
    ]
    assert "exponentials" in text and kept not in sizes
