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


def test_each_token_is_drawn_anew_and_the_seed_repeats_them():
    indifferent = {path: np.zeros(leaf.shape, np.float32) for path, leaf in describe(DENSE).items()}
    generator = Generator(DENSE, indifferent)
    first, again, other = (generator.generate([1], 8, temperature=1.0, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) > 4
