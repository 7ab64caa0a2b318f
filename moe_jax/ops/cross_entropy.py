"""Cross entropy of a large vocabulary, a chunk of tokens and a block of the vocabulary at a time.

The [tokens, vocabulary] logits never exist at once, in float32 not even those of one chunk: blocks run under a
growing maximum, as attention kernels do. Gradients come with the loss, in one pass, so that the backward pass
recomputes nothing. Logits are laid out [vocabulary, tokens]: sums over the vocabulary then add whole rows
instead of lanes of one.
Legend: T tokens of a device, C chunk of them, D model, N blocks of V vocabulary rows (of a device, if the
vocabulary is cut), which are G groups of S, the last filled up.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LOGITS = 2**24  # that exist in float32 at one time, at most: 64 MiB, which a TPU core's own memory may hold
_STEP = 2**19  # of them, in one step of the kernel
_GROUP = 8  # rows of a tile of float32


class Softmax(NamedTuple):
    """The softmax of one chunk of tokens, as far as loss and gradients need it."""

    loss: jax.Array  # weighted sum of this device's part of the vocabulary
    others_NGSC: jax.Array  # exp(logit - the block's top), 0 at the target
    share_NC: jax.Array  # what turns `others` into probabilities
    target_C: jax.Array  # the target's probability, 0 if it is another device's
    row_C: jax.Array  # the target's row of this device's table, past its end if it is another device's


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[T, ...] -> [T/chunk, chunk, ...], padded with zeros."""
    padded = jnp.pad(x, ((0, -x.shape[0] % chunk),) + ((0, 0),) * (x.ndim - 1))
    return padded.reshape(-1, chunk, *x.shape[1:])


def _blocked(head_VD: jax.Array, chunk: int) -> jax.Array:
    """The table in the fewest equal blocks with at most LOGITS for a chunk; whole if nothing near divides it."""
    rows = head_VD.shape[0]
    fewest = -(-rows // max(LOGITS // chunk, 1))
    blocks = next((n for n in range(fewest, 8 * fewest + 1) if rows % n == 0), 1)
    return head_VD.reshape(blocks, -1, head_VD.shape[1])


def _workspace(head_NVD: jax.Array, chunk: int, dtype: jnp.dtype) -> jax.Array:
    # In groups of rows: tiled by 16 rows, as XLA prefers on tpu7x, the kernel would have all of it copied twice.
    return jnp.zeros((len(head_NVD), -(-head_NVD.shape[1] // _GROUP), _GROUP, chunk), dtype)


def _exponentials(n, logits_VC, top_C, row_C, others_NGSC):
    """(`others` with block n set to exp(logit - top), 0 at each token's target; its sum; the target's logit)."""
    hit_VC = jnp.arange(logits_VC.shape[0])[:, None] == row_C
    others_VC = jnp.where(hit_VC, 0, jnp.exp(logits_VC - top_C))
    picked_C = jnp.where(hit_VC, logits_VC, 0).sum(0)
    padded_VC = jnp.pad(others_VC.astype(others_NGSC.dtype), ((0, -len(others_VC) % _GROUP), (0, 0)))
    return others_NGSC.at[n].set(padded_VC.reshape(others_NGSC.shape[1:])), others_VC.sum(0), picked_C


def _exponentials_kernel(n, logits, top, row, _, others, mass, picked, *, rows: int):
    step, height = pl.program_id(0), logits.shape[0]

    @pl.when(step == 0)
    def _start():
        mass[...] = jnp.zeros_like(mass)
        picked[...] = jnp.zeros_like(picked)

    for first in range(0, height, 32):  # as much as fits the registers
        part = pl.ds(first, 32)
        values = logits[part, :]
        index = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + (step * height + first)
        hit, outside = index == row[...], index >= rows
        exact = jnp.where(hit | outside, 0.0, jnp.exp(values - top[...]))
        others[pl.ds(first // _GROUP, 32 // _GROUP)] = exact.astype(others.dtype).reshape(-1, *others.shape[1:])
        mass[...] += exact.sum(0, keepdims=True)
        picked[...] += jnp.where(hit & ~outside, values, 0.0).sum(0, keepdims=True)


def exponentials_fused(n, logits_VC, top_C, row_C, others_NGSC, interpret: bool = False):
    """`_exponentials` by kernel, in one pass and in place: XLA would make a pass for each of its results."""
    rows, tokens = logits_VC.shape
    height = min(max(_STEP // tokens // 32, 1), 8) * 32
    block = pl.BlockSpec((None, height // _GROUP, _GROUP, tokens), lambda i, n: (n[0], i, 0, 0))
    per_token = pl.BlockSpec((1, tokens), lambda i, n: (0, 0))
    sums = jax.ShapeDtypeStruct((1, tokens), jnp.float32)
    others_NGSC, mass, picked = pl.pallas_call(
        partial(_exponentials_kernel, rows=rows),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(rows, height),),
            in_specs=[
                pl.BlockSpec((height, tokens), lambda i, n: (i, 0)),
                per_token,
                per_token,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[block, per_token, per_token],
        ),
        out_shape=[jax.ShapeDtypeStruct(others_NGSC.shape, others_NGSC.dtype), sums, sums],
        input_output_aliases={4: 0},
        # Of `others_NGSC` it touches one block, which nothing else tells the compiler or a roofline.
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=logits_VC.size,
            bytes_accessed=logits_VC.size * (logits_VC.dtype.itemsize + others_NGSC.dtype.itemsize) + 16 * tokens,
        ),
        interpret=interpret,
        name="exponentials",
    )(jnp.reshape(n, (1,)), logits_VC, top_C[None], row_C[None], others_NGSC)
    return others_NGSC, mass[0], picked[0]


def softmax_of_chunk(
    hidden_CD, head_NVD, targets_C, weight_C, others_NGSC, vocab_axis: str | None, kernels: bool
) -> Softmax:
    """Blocks of the vocabulary one after the other, each under the highest logit so far.

    `others_NGSC` is memory to write to, whatever it holds: to clear it for each chunk would cost a pass.
    """
    blocks, width = head_NVD.shape[:2]
    rows, parts, row_C = blocks * width, 1, targets_C
    if vocab_axis is not None:
        parts = jax.lax.axis_size(vocab_axis)
        row_C = targets_C - jax.lax.axis_index(vocab_axis) * rows
    exponentials = exponentials_fused if kernels else _exponentials

    def block(n, carry):
        others_NGSC, tops_NC, top_C, mass_C, picked_C = carry
        logits_VC = jnp.einsum("vd,cd->vc", head_NVD[n], hidden_CD, preferred_element_type=jnp.float32)
        higher_C = jnp.maximum(top_C, logits_VC.max(0))
        others_NGSC, sum_C, hit_C = exponentials(n, logits_VC, higher_C, row_C - n * width, others_NGSC)
        mass_C = mass_C * jnp.exp(top_C - higher_C) + sum_C
        return others_NGSC, tops_NC.at[n].set(higher_C), higher_C, mass_C, picked_C + hit_C

    zeros_C = jnp.zeros(row_C.shape, jnp.float32)
    start = (others_NGSC, jnp.zeros((blocks, row_C.size), jnp.float32), zeros_C - jnp.inf, zeros_C, zeros_C)
    others_NGSC, tops_NC, top_C, mass_C, picked_C = jax.lax.fori_loop(0, blocks, block, start)
    if vocab_axis is not None:
        highest_C = jax.lax.pmax(top_C, vocab_axis)
        top_C, mass_C = highest_C, mass_C * jnp.exp(top_C - highest_C)
    inside_C = (row_C >= 0) & (row_C < rows)
    target_C = jnp.where(inside_C, jnp.exp(picked_C - top_C), 0)
    mass_C = mass_C + target_C
    if vocab_axis is not None:
        mass_C = jax.lax.psum(mass_C, vocab_axis)
    loss = (((top_C + jnp.log(mass_C)) / parts - picked_C) * weight_C).sum()
    share_NC = jnp.exp(tops_NC - top_C) / mass_C
    return Softmax(loss, others_NGSC, share_NC, target_C / mass_C, jnp.where(inside_C, row_C, rows))


def cross_entropy(
    hidden_TD: jax.Array,
    head_VD: jax.Array,
    targets_T: jax.Array,
    weight_T: jax.Array,
    chunk: int,
    vocab_axis: str | None = None,
    kernels: bool = False,
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), in nats, float32; logits are `hidden @ head.T`.

    `weight_T` is the loss mask (0 at padding). At most `chunk` tokens' probabilities exist at one time, in
    the type of `hidden`. With `vocab_axis`, a mesh axis of the surrounding shard_map, each device holds a
    part of the vocabulary and returns its part of the sum. Not for differentiation: see
    `cross_entropy_and_gradients`.
    """
    head_NVD = _blocked(head_VD, chunk)

    def body(carry, xs):
        total, others_NGSC = carry
        hidden_CD, targets_C, weight_C = xs
        part = softmax_of_chunk(hidden_CD, head_NVD, targets_C, weight_C, others_NGSC, vocab_axis, kernels)
        return (total + part.loss, part.others_NGSC), None

    chunks = tuple(_chunked(x, chunk) for x in (hidden_TD, targets_T, weight_T))
    return jax.lax.scan(body, (jnp.float32(0), _workspace(head_NVD, chunk, hidden_TD.dtype)), chunks)[0][0]


def cross_entropy_and_gradients(
    hidden_TD, head_VD, targets_T, weight_T, chunk: int, vocab_axis: str | None = None, kernels: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(`cross_entropy`, its gradient by `hidden` in that type, its gradient by `head` in float32).

    With `vocab_axis` the gradient of `hidden` is this device's part of the sum too.
    """
    head_NVD = _blocked(head_VD, chunk)
    tokens = hidden_TD.shape[0]

    # The gradient of a logit is weight * (p - 1 at the target): a product with `others`, and the target's
    # own share by row, in float32. In the low precision of the products, p - 1 of a token that is well
    # predicted would be all rounding.
    def body(carry, xs):
        total, grad_head_NVD, others_NGSC = carry
        hidden_CD, targets_C, weight_C = xs
        part = softmax_of_chunk(hidden_CD, head_NVD, targets_C, weight_C, others_NGSC, vocab_axis, kernels)
        scale_NC1 = (weight_C * part.share_NC)[..., None]

        def block(n, grads):
            grad_hidden_CD, grad_head_NVD = grads
            others_VC = part.others_NGSC[n].reshape(-1, len(hidden_CD))[: head_NVD.shape[1]]
            product_CD = jnp.einsum("vc,vd->cd", others_VC, head_NVD[n], preferred_element_type=jnp.float32)
            scaled_CD = (scale_NC1[n] * hidden_CD).astype(hidden_CD.dtype)
            grad_VD = jnp.einsum("vc,cd->vd", others_VC, scaled_CD, preferred_element_type=jnp.float32)
            return grad_hidden_CD + scale_NC1[n] * product_CD, grad_head_NVD.at[n].add(grad_VD)

        own_C = weight_C * (part.target_C - 1)
        # Of the blocks, not of `head`: the loop would hold both.
        rows_VD = head_NVD.reshape(head_VD.shape)
        grad_hidden_CD = own_C[:, None] * rows_VD.at[part.row_C].get(mode="fill", fill_value=0)
        grads = (grad_hidden_CD, grad_head_NVD)
        grad_hidden_CD, grad_head_NVD = jax.lax.fori_loop(0, head_NVD.shape[0], block, grads)
        carry = (total + part.loss, grad_head_NVD, part.others_NGSC)
        return carry, (grad_hidden_CD.astype(hidden_CD.dtype), own_C, part.row_C)

    chunks = tuple(_chunked(x, chunk) for x in (hidden_TD, targets_T, weight_T))
    workspace = _workspace(head_NVD, chunk, hidden_TD.dtype)
    start = (jnp.float32(0), jnp.zeros(head_NVD.shape, jnp.float32), workspace)
    (total, grad_head_NVD, _), per_chunk = jax.lax.scan(body, start, chunks)
    grad_hidden_TD, own_T, row_T = (x.reshape(-1, *x.shape[2:])[:tokens] for x in per_chunk)
    # Once, after the loop: in it, each chunk's scatter would copy the whole gradient.
    grad_head_VD = grad_head_NVD.reshape(head_VD.shape).at[row_T].add(own_T[:, None] * hidden_TD, mode="drop")
    return total, grad_hidden_TD, grad_head_VD


def cross_entropy_reference(hidden_TD, head_VD, targets_T, weight_T) -> jax.Array:
    """The definition, with all logits at once: for tests."""
    logits = jnp.einsum("td,vd->tv", hidden_TD, head_VD, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets_T[..., None], axis=-1)[..., 0]
    return -(picked * weight_T).sum()
