"""Text from a checkpoint: KV-cached greedy, temperature and top-p sampling.

Legend: B sequences generated at once, S prompt length (padded), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig, QuantConfig
from moe_jax.errors import UserError
from moe_jax.model.attention import KVCache, Tokens
from moe_jax.model.layers import Compute
from moe_jax.model.transformer import Transformer, empty_cache
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.paths import unflatten_paths
from moe_jax.train.state import assemble

_PAD_TO = 32  # prompts are padded to a multiple, so that few lengths are compiled


class Generator:
    """A model ready to continue prompts on one device, in float32.

    `parameters` is the flat {path: array} of a checkpoint; `quant` emulates the deployed arithmetic.
    """

    def __init__(self, cfg: ModelConfig, parameters: dict[str, np.ndarray], quant: QuantConfig | None = None):
        self.cfg = cfg = cfg.dropless()
        leaves = {path: jnp.asarray(value) for path, value in parameters.items()}
        self.model = assemble(cfg, unflatten_paths(leaves), {})
        self.compute = Compute(single_device_mesh(), quant=quant)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[len(ids), V] float32 of one whole sequence, without a cache."""
        ids_BS = jnp.asarray(ids, jnp.int32)[None]
        return np.asarray(_uncached(self.model, self.compute, ids_BS)[0])

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> list[int]:
        """The ids that follow `prompt`, a stop id included if one came; temperature 0 is greedy."""
        if not prompt:
            raise UserError("the prompt has no tokens; give at least a beginning-of-text token")
        total = len(prompt) + max_new_tokens
        if total > self.cfg.max_position_embeddings:
            raise UserError(
                f"prompt and answer need {total} positions, the model has "
                f"{self.cfg.max_position_embeddings}; ask for fewer tokens"
            )
        padded = -(-len(prompt) // _PAD_TO) * _PAD_TO
        length = -(-max(total, padded) // _PAD_TO) * _PAD_TO
        cache = empty_cache(self.cfg, 1, length, self.compute.dtype)
        ids_BS = np.zeros((1, padded), np.int32)
        ids_BS[0, : len(prompt)] = prompt
        logits, cache = _extend(self.model, self.compute, cache, ids_BS, jnp.int32(0), jnp.int32(len(prompt)))
        keys = jax.random.split(jax.random.key(seed), max_new_tokens)
        out: list[int] = []
        for step in range(max_new_tokens):
            out.append(int(sample(logits[0], keys[step], temperature, top_p)))
            if out[-1] in stop_ids or step == max_new_tokens - 1:
                break
            position = jnp.int32(len(prompt) + step)
            token = np.asarray([[out[-1]]], np.int32)
            logits, cache = _extend(self.model, self.compute, cache, token, position, jnp.int32(1))
        return out


@partial(jax.jit, static_argnums=1, donate_argnums=2)
def _extend(
    model: Transformer, compute: Compute, cache: KVCache, ids_BS: jax.Array, start: jax.Array, count: jax.Array
) -> tuple[jax.Array, KVCache]:
    """Write `count` of the tokens at `start`...; (logits [B, V] after the last of them, cache)."""
    offsets = jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
    # Segment 0 marks the padding, whose keys later tokens overwrite before they could be seen.
    tokens = Tokens(start + offsets, (offsets < count).astype(jnp.int32))
    with compute.products():
        hidden, _, written = model(ids_BS, tokens, compute, cache=cache)
        assert written is not None  # a cache that went in comes out
        last = jax.lax.dynamic_index_in_dim(hidden, count - 1, axis=1, keepdims=False)
        return model.logits(last, compute), written


@partial(jax.jit, static_argnums=1)
def _uncached(model: Transformer, compute: Compute, ids_BS: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(ids_BS.shape[1]), ids_BS.shape)
    with compute.products():
        hidden, _, _ = model(ids_BS, Tokens(positions, jnp.ones_like(ids_BS)), compute)
        return model.logits(hidden, compute)


@partial(jax.jit, static_argnums=(2, 3))
def sample(logits_V: jax.Array, key: jax.Array, temperature: float, top_p: float) -> jax.Array:
    """One id: the most probable at temperature 0, else drawn from the smallest set that holds `top_p`."""
    if temperature == 0:
        return jnp.argmax(logits_V)
    order = jnp.argsort(-logits_V)
    # So that neither end of float32 is left, where 1e-320 is 0.
    scaled = (logits_V - logits_V.max()) / max(temperature, 1e-30)
    probabilities = jax.nn.softmax(scaled[order])
    before = jnp.cumsum(probabilities) - probabilities
    kept = jnp.where(before < top_p, scaled[order], -jnp.inf)
    return order[jax.random.categorical(key, kept)]
