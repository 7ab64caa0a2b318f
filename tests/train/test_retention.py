"""What stays and what goes, over any sequence of saves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import CheckpointConfig
from moe_jax.train.checksums import Record
from moe_jax.train.retention import best_step, kept

LOSSES = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0, math.nan, math.inf]))
POLICIES = st.builds(
    CheckpointConfig, keep=st.integers(1, 4), keep_every=st.sampled_from([0, 1, 3, 10]), keep_best=st.booleans()
)


def record(step: int, final: bool = False, loss: float | None = None) -> Record:
    return Record({}, step, final, loss, 0.0)


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), LOSSES), max_size=30), POLICIES)
def test_a_sequence_of_saves_leaves_what_the_policy_names(saves, policy):
    stored: dict[int, Record] = {}
    every: list[Record] = []
    step = 0
    for stride, final, loss in saves:
        step += stride
        every.append(record(step, final, loss))
        stored[step] = every[-1]
        stay = kept(stored.values(), policy)
        assert stay <= stored.keys() and step in stay
        stored = {step: entry for step, entry in stored.items() if step in stay}
        # Whatever was removed earlier is missed by nothing that counts now.
        assert stored.keys() >= {entry.step for entry in every[-policy.keep :]}
        assert stored.keys() >= {entry.step for entry in every if entry.final}
        if policy.keep_every:
            assert stored.keys() >= {entry.step for entry in every if entry.step % policy.keep_every == 0}
        if policy.keep_best:
            assert best_step(stored.values()) == best_step(every)
        named = policy.keep + sum(entry.final or entry.step % (policy.keep_every or 10**9) == 0 for entry in every)
        assert len(stored) <= named + policy.keep_best


@given(st.permutations([record(3), record(1, final=True), record(2, loss=0.5), record(4, loss=0.7)]), POLICIES)
def test_the_order_of_the_records_does_not_matter(records, policy):
    assert kept(records, policy) == kept(sorted(records, key=lambda entry: entry.step), policy)


@pytest.mark.parametrize(
    "losses, best",
    [
        ([], None),
        ([None, None], None),
        ([2.0, 1.0, 3.0], 1),
        ([1.0, 1.0], 1),
        ([math.nan, 5.0], 1),
        ([math.inf], None),
    ],
)
def test_the_best_is_the_lowest_finite_loss_and_of_equals_the_newest(losses, best):
    assert best_step([record(step, loss=loss) for step, loss in enumerate(losses)]) == best


def test_only_the_newest_stays_without_more_options():
    records = [record(step, loss=float(step)) for step in range(1, 8)]
    assert kept(records, CheckpointConfig(keep=2)) == {6, 7}
    assert kept(records, CheckpointConfig(keep=1, keep_every=3, keep_best=True)) == {1, 3, 6, 7}
