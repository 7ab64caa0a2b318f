"""How the next token is drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.generate import Generator, sample
from moe_jax.model.describe import describe
from tests.tiny import DENSE


@pytest.mark.parametrize(("temperature", "share"), [(0.5, 1 / 10), (1.0, 1 / 4), (2.0, 1 / (1 + 3**0.5))])
def test_a_temperature_divides_the_logits(temperature, share):
    logits = jnp.log(jnp.asarray([3.0, 1.0]))
    draw = jax.vmap(lambda key: sample(logits, key, temperature, 1.0))
    assert np.asarray(draw(jax.random.split(jax.random.key(0), 4000))).mean() == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-320, 1.0), (1e-30, 1.0), (1e38, 1e-9), (1e-38, 0.5)])
def test_the_likeliest_token_is_drawn_where_hardly_another_may_be(temperature, top_p):
    logits = jnp.asarray([-3.0, 8.0, 2.0, 7.5])
    assert int(sample(logits, jax.random.key(0), temperature, top_p)) == 1


def test_of_two_equal_tokens_half_the_probability_is_one_of_them():
    logits = jnp.asarray([1.0, 1.0, -1e9, -1e9])
    draw = jax.vmap(lambda key: sample(logits, key, 1.0, 0.5))
    assert (draw(jax.random.split(jax.random.key(0), 20)) == 0).all()


def test_each_token_is_drawn_anew_and_the_seed_repeats_them():
    indifferent = {path: np.zeros(leaf.shape, np.float32) for path, leaf in describe(DENSE).items()}
    generator = Generator(DENSE, indifferent)
    first, again, other = (generator.generate([1], 8, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) > 4
