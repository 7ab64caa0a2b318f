"""Cross entropy of a large vocabulary, a chunk of the sequence at a time.

The [tokens, vocabulary] logits never exist at once: the forward pass computes each chunk's logits, its
loss, and (under differentiation) its gradients, so the backward pass recomputes nothing.
Legend: B batch, S sequence, C chunk of the sequence, D model, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [S/chunk, B, chunk, ...], the sequence padded with zeros."""
    batch, length, *rest = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * len(rest))
    return jnp.moveaxis(padded.reshape(batch, -1, chunk, *rest), 1, 0)


def _unchunked(x: jax.Array, length: int) -> jax.Array:
    batch_first = jnp.moveaxis(x, 0, 1)
    return batch_first.reshape(batch_first.shape[0], -1, *x.shape[3:])[:, :length]


def _chunk_logits(hidden_BCD: jax.Array, head_VD: jax.Array) -> jax.Array:
    return jnp.einsum("bcd,vd->bcv", hidden_BCD, head_VD, preferred_element_type=jnp.float32)


def _chunk_loss(logits_BCV: jax.Array, targets_BC: jax.Array, weight_BC: jax.Array):
    log_z = jax.nn.logsumexp(logits_BCV, axis=-1)
    picked = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return ((log_z - picked) * weight_BC).sum(), log_z


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy_sum(
    hidden_BSD: jax.Array, head_VD: jax.Array, targets_BS: jax.Array, weight_BS: jax.Array, chunk: int
) -> jax.Array:
    """Sum over tokens of weight * -log p(target), in nats, float32; logits are `hidden @ head.T`.

    `weight_BS` is the loss mask (0 at padding). At most B * `chunk` tokens' logits exist at one time.
    """

    def body(total, xs):
        hidden, targets, weight = xs
        return total + _chunk_loss(_chunk_logits(hidden, head_VD), targets, weight)[0], None

    chunks = tuple(_chunked(x, chunk) for x in (hidden_BSD, targets_BS, weight_BS))
    return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def _forward(hidden_BSD, head_VD, targets_BS, weight_BS, chunk):
    def body(carry, xs):
        total, grad_head = carry
        hidden, targets, weight = xs
        logits = _chunk_logits(hidden, head_VD)
        loss, log_z = _chunk_loss(logits, targets, weight)
        hit = jnp.arange(logits.shape[-1]) == targets[..., None]
        grad_logits = (jnp.exp(logits - log_z[..., None]) - hit) * weight[..., None]
        grad_logits = grad_logits.astype(hidden.dtype)
        grad_hidden = jnp.einsum("bcv,vd->bcd", grad_logits, head_VD)
        grad_head += jnp.einsum("bcv,bcd->vd", grad_logits, hidden, preferred_element_type=jnp.float32)
        return (total + loss, grad_head), grad_hidden

    chunks = tuple(_chunked(x, chunk) for x in (hidden_BSD, targets_BS, weight_BS))
    start = (jnp.float32(0), jnp.zeros(head_VD.shape, jnp.float32))
    (total, grad_head), grad_hidden = jax.lax.scan(body, start, chunks)
    grads = (_unchunked(grad_hidden, hidden_BSD.shape[1]), grad_head.astype(head_VD.dtype))
    return total, grads


def _backward(chunk, grads, upstream):
    grad_hidden, grad_head = ((g * upstream).astype(g.dtype) for g in grads)
    return grad_hidden, grad_head, None, None


cross_entropy_sum.defvjp(_forward, _backward)


def cross_entropy_sum_reference(hidden_BSD, head_VD, targets_BS, weight_BS) -> jax.Array:
    """The definition, with all logits at once: for tests."""
    logits = jnp.einsum("bsd,vd->bsv", hidden_BSD, head_VD, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BS[..., None], axis=-1)[..., 0]
    return -(picked * weight_BS).sum()
