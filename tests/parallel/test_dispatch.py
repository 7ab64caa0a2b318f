"""Dispatch and combine: a permutation with nothing lost but what is counted, and its gradient."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import MeshConfig, MoEConfig
from moe_jax.parallel import dispatch as module
from moe_jax.parallel.dispatch import number_of_passes, plan_rows, run_local, through_experts
from tests.tiny import mesh_of, quick

EXPERTS, TOKENS, CHOICES = 5, 70, 2  # more pairs than the 128 that are ranked in one product
PAIRS = TOKENS * CHOICES
ALIGNMENTS = [1, 8, 128]
FACTORS = jnp.asarray([2.0, 3.0, 5.0, 7.0, 11.0])

# Few bounds, because each is compiled; the ids are free. EXPERTS itself marks a pair that goes nowhere.
limits = st.tuples(st.sampled_from(ALIGNMENTS), st.sampled_from([None, 1, 9]), st.sampled_from([None, 30]))
ids_of_pairs = st.one_of(
    st.lists(st.integers(0, EXPERTS), min_size=PAIRS, max_size=PAIRS).map(np.array),
    st.integers(0, EXPERTS).map(lambda e: np.full(PAIRS, e)),  # everything to one expert, or nowhere
    st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).integers(0, EXPERTS + 1, PAIRS)),
).map(lambda ids: ids.reshape(CHOICES, TOKENS).astype(np.int32))


@cache
def planner(align, capacity, rows):
    return quick(partial(plan_rows, num_experts=EXPERTS, align=align, capacity=capacity, rows=rows))


def kept_pairs(ids_KT, capacity, rows):
    """[K, T] by the rule: an expert's first so many, and as many of each as all together have rows for."""
    pairs_E = [np.argwhere(ids_KT == e)[:capacity] for e in range(EXPERTS)]  # in K-major order: first choices first
    level = max(map(len, pairs_E))
    while sum(len(pairs[:level]) for pairs in pairs_E) > (PAIRS if rows is None else rows):
        level -= 1
    kept = np.zeros(ids_KT.shape, bool)
    for pairs in pairs_E:
        kept[tuple(pairs[:level].T)] = True
    return kept


@given(ids_of_pairs, limits)
@settings(max_examples=150)
def test_a_plan_gives_every_kept_pair_one_row_of_its_expert(ids_KT, limits):
    align, capacity, rows = limits
    plan = jax.device_get(planner(*limits)(ids_KT))
    starts_E = np.cumsum(plan.sizes_E) - plan.sizes_E
    assert (plan.sizes_E % align == 0).all() and plan.sizes_E.sum() <= len(plan.pair_R)
    assert len(plan.pair_R) % align == 0
    assert (plan.kept_KT == kept_pairs(ids_KT, capacity, rows)).all()

    kept_rows = plan.row_KT[plan.kept_KT]
    assert len(set(kept_rows.tolist())) == plan.kept_KT.sum()
    own_KT = np.minimum(ids_KT, EXPERTS - 1)
    inside_KT = (plan.row_KT >= starts_E[own_KT]) & (plan.row_KT < (starts_E + plan.sizes_E)[own_KT])
    assert inside_KT[plan.kept_KT].all()

    # The rows say the same as the pairs: all others are holes, and a dropped pair reads a visited one.
    pair_R = np.full(len(plan.pair_R), PAIRS)
    pair_R[kept_rows] = np.arange(PAIRS).reshape(CHOICES, TOKENS)[plan.kept_KT]
    assert (plan.pair_R == pair_R).all()
    read = plan.row_KT[~plan.kept_KT]
    assert (plan.pair_R[read] == PAIRS).all() and (read < plan.sizes_E.sum()).all()


@given(ids_of_pairs, limits)
@settings(max_examples=50)
def test_rows_of_one_expert_keep_the_order_of_their_pairs(ids_KT, limits):
    plan = planner(*limits)(ids_KT)
    held = np.asarray(plan.pair_R)[: int(plan.sizes_E.sum())]
    expert_R = np.repeat(np.arange(EXPERTS), plan.sizes_E)
    for e in range(EXPERTS):
        pairs = held[(expert_R == e) & (held < PAIRS)]
        assert (np.diff(pairs) > 0).all() and (ids_KT.reshape(-1)[pairs] == e).all()


@given(ids_of_pairs, st.sampled_from(ALIGNMENTS), st.sampled_from([None, PAIRS]))
def test_without_a_bound_nothing_is_lost(ids_KT, align, rows):
    assert (np.asarray(planner(align, None, rows)(ids_KT).kept_KT) == (ids_KT < EXPERTS)).all()


def test_capacity_keeps_first_choices_before_second_ones():
    """The second choices of early tokens give way to the first choices of later ones."""
    ids_KT = jnp.asarray([[0, 0, 0], [1, 0, 2]], jnp.int32)
    plan = quick(partial(plan_rows, num_experts=3, capacity=3))(ids_KT)
    assert plan.kept_KT.tolist() == [[True, True, True], [True, False, True]]


def _scaled(rows_RD, routing_R, sizes_E, factor_E):
    """An "expert" that multiplies by its own factor, and NaN in rows that belong to nobody."""
    expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows_RD.shape[0]), side="right")
    factor = jnp.append(factor_E, jnp.nan)[expert_R]
    return rows_RD * (routing_R * factor)[:, None]


@quick
def _run(plan, x_TD, routing_KT, factor_E, grad_TD):
    def local(x_TD, routing_KT, factor_E):
        return run_local(_scaled, (factor_E,), x_TD, routing_KT, plan)

    y_TD, transpose, kept = jax.vjp(local, x_TD, routing_KT, factor_E, has_aux=True)
    return y_TD, kept, *transpose(grad_TD)


@given(ids_of_pairs, limits)
@settings(max_examples=60)
def test_every_kept_pair_reaches_its_expert_and_comes_back(ids_KT, limits):
    """Value and every gradient; nothing of rows past the last expert, which are NaN both ways, is read."""
    rng = np.random.default_rng(0)
    x_TD, grad_TD = (rng.standard_normal((TOKENS, 3)).astype(np.float32) for _ in range(2))
    routing_KT = rng.standard_normal((CHOICES, TOKENS)).astype(np.float32)
    y_TD, kept, grad_x, grad_routing, grad_factor = _run(
        planner(*limits)(ids_KT), x_TD, routing_KT, FACTORS, grad_TD
    )

    kept_KT = kept_pairs(ids_KT, *limits[1:])
    factor_KT = np.where(kept_KT, np.append(FACTORS, 0)[ids_KT], 0)
    want = (routing_KT * factor_KT).sum(0)[:, None]
    assert int(kept) == kept_KT.sum()
    np.testing.assert_allclose(y_TD, want * x_TD, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad_x, want * grad_TD, rtol=1e-4, atol=1e-5)
    product_T = (x_TD * grad_TD).sum(1)
    np.testing.assert_allclose(grad_routing, factor_KT * product_T, rtol=1e-4, atol=1e-4)
    by_expert = [(kept_KT * (ids_KT == e) * routing_KT * product_T).sum() for e in range(EXPERTS)]
    np.testing.assert_allclose(grad_factor, by_expert, rtol=1e-3, atol=1e-3)


def test_a_token_sums_its_rows_in_float32():
    """Four bfloat16 rows that cancel but for the small ones, which a sum in bfloat16 would lose."""

    @quick
    def run(x_TD, ids_KT, routing_KT):
        return run_local(
            lambda r, routing, _: r * routing[:, None].astype(r.dtype), (), x_TD, routing_KT, plan_rows(ids_KT, 4)
        )

    ids_KT, routing_KT = jnp.arange(4)[:, None], jnp.asarray([[256.0], [1.0], [-256.0], [0.5]])
    y_TD, _ = run(jnp.ones((1, 2), jnp.bfloat16), ids_KT, routing_KT)
    assert y_TD.dtype == jnp.bfloat16 and (y_TD == 1.5).all()


def _stand_in(rows_RD, routing_R, sizes_E, gate_up_EDF, down_EDF):
    """`_scaled` by the sum of an expert's weights, which checks that they are whole and its own."""
    return _scaled(rows_RD, routing_R, sizes_E, gate_up_EDF.sum((1, 2)) + down_EDF.sum((1, 2)))


def _kept_by_groups(ids_BSK, experts, capacity, rows):
    """[B, S, K] on a mesh of data=2 x expert=2 x context=2, group by group and pair by pair."""
    kept = np.zeros(ids_BSK.shape, bool)
    half = ids_BSK.shape[1] // 2
    for block in (np.s_[b : b + 2, c : c + half] for b in (0, 2) for c in (0, half)):
        group, kept_group = ids_BSK[block].reshape(-1, ids_BSK.shape[-1]), kept[block]
        pairs_E = [[(t, k) for k in range(group.shape[1]) for t in np.flatnonzero(group[:, k] == e)][:capacity]
                   for e in range(experts)]  # fmt: skip
        for device in range(2):  # which keeps as many of each of its experts as fit together
            own = pairs_E[device * experts // 2 : (device + 1) * experts // 2]
            level = max(map(len, own))
            while sum(len(pairs[:level]) for pairs in own) > rows:
                level -= 1
            for t, k in (pair for pairs in own for pair in pairs[:level]):
                kept_group[np.unravel_index(t, kept_group.shape[:2])][k] = True
    return kept


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize(
    ("options", "capacity", "rows"),
    [  # 16 tokens in a group, 2 choices, 6 experts: 5.33 pairs per expert, 16 per device
        ({}, 99, 99),
        ({"buffer_factor": 0.9}, 99, 15),
        ({"dispatch": "drop_and_pad", "capacity_factor": 0.75}, 4, 99),
        ({"dispatch": "drop_and_pad", "capacity_factor": 1.5, "buffer_factor": 0.8}, 8, 13),
        ({"dispatch": "drop_and_pad", "capacity_factor": 1e8, "buffer_factor": 1e8}, 99, 99),
    ],
    ids=["dropless", "buffer", "capacity", "both", "more than all"],
)
def test_an_expert_group_drops_its_own_excess_and_counts_it(options, capacity, rows, align):
    moe = MoEConfig(num_experts=6, num_experts_per_tok=2, expert_width=2, **options)
    mesh = mesh_of(MeshConfig(data=2, fsdp=1, expert=2, context=2))
    rng = np.random.default_rng(0)
    x_BSD = rng.standard_normal((4, 16, 4)).astype(np.float32)
    ids_BSK = rng.integers(0, 7, (4, 16, 2)).astype(np.int32)  # 6 is padding
    routing_BSK = rng.standard_normal((4, 16, 2)).astype(np.float32)
    gate_up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 4, 4), (6, 2, 4)))

    @quick
    def run(weights, x_BSD, ids_BSK, routing_BSK):
        return through_experts(_stand_in, weights, x_BSD, ids_BSK, routing_BSK, moe, mesh, align)

    y_BSD, count = run((gate_up, down), x_BSD, ids_BSK, routing_BSK)
    kept_BSK = _kept_by_groups(ids_BSK, 6, capacity, rows)
    real = (ids_BSK < 6).sum()
    assert int(count) == kept_BSK.sum() and (kept_BSK.sum() < real) == (min(capacity, rows) < 99)
    factor_E = np.append(gate_up.sum((1, 2)) + down.sum((1, 2)), 0)
    want = (kept_BSK * routing_BSK * factor_E[ids_BSK]).sum(-1)[..., None] * x_BSD
    np.testing.assert_allclose(y_BSD, want, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 4096), st.integers(1, 8))
def test_passes_are_the_fewest_equal_parts_that_hold_few_enough_pairs(blocks, per_token):
    tokens = 128 * blocks
    passes = number_of_passes(tokens, per_token)
    assert tokens % passes == 0 and tokens // passes * per_token <= module.PASS_PAIRS
    fewer = [n for n in range(1, passes) if tokens % n == 0]
    assert not fewer or tokens // fewer[-1] * per_token > module.PASS_PAIRS


def test_tokens_in_several_passes_equal_one_pass_in_value_and_every_gradient(monkeypatch):
    moe = MoEConfig(num_experts=6, num_experts_per_tok=2, expert_width=2)
    mesh = mesh_of(MeshConfig(fsdp=1, expert=2))
    rng = np.random.default_rng(0)
    x_BSD, grad_BSD = rng.standard_normal((2, 4, 16, 4)).astype(np.float32)
    ids_BSK = jnp.asarray(rng.integers(0, 7, (4, 16, 2)), jnp.int32)
    routing_BSK = rng.standard_normal((4, 16, 2)).astype(np.float32)
    weights = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((6, 4, 4), (6, 2, 4)))

    def run(weights, x_BSD, routing_BSK, grad_BSD):
        def routed(weights, x_BSD, routing_BSK):
            return through_experts(_stand_in, weights, x_BSD, ids_BSK, routing_BSK, moe, mesh, 8)

        y_BSD, transpose, kept = jax.vjp(routed, weights, x_BSD, routing_BSK, has_aux=True)
        return kept, y_BSD, transpose(grad_BSD)

    results = []
    for pairs, passes in ((1000, 1), (40, 4)):
        monkeypatch.setattr(module, "PASS_PAIRS", pairs)
        assert number_of_passes(64, 2) == passes
        results.append(jax.tree.leaves(quick(partial(run))(weights, x_BSD, routing_BSK, grad_BSD)))
    assert int(results[0][0]) == (ids_BSK < 6).sum()
    for one, several in zip(*results, strict=True):
        np.testing.assert_allclose(one, several, rtol=1e-4, atol=1e-4)


def _kept_of_two_favourites(moe):
    """Pairs kept on one device, where all of 64 tokens choose expert 0, then expert 1."""
    x_BSD, routing_BSK = jnp.ones((4, 16, 4)), jnp.ones((4, 16, 2))
    ids_BSK = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (4, 16, 2))
    weights = jnp.ones((6, 4, 4)), jnp.ones((6, 2, 4))
    run = partial(through_experts, _stand_in, moe=moe, mesh=mesh_of(MeshConfig(fsdp=1)))
    return int(quick(run)(weights, x_BSD, ids_BSK, routing_BSK)[1])


@pytest.mark.parametrize(("pairs", "passes"), [(128, 1), (40, 4)])
def test_capacity_goes_by_the_tokens_of_one_pass(pairs, passes, monkeypatch):
    monkeypatch.setattr(module, "PASS_PAIRS", pairs)
    moe = MoEConfig(
        num_experts=6, num_experts_per_tok=2, expert_width=2, dispatch="drop_and_pad", capacity_factor=1.0
    )
    assert number_of_passes(64, 2) == passes
    assert _kept_of_two_favourites(moe) == passes * 2 * math.ceil(64 / passes * 2 / 6)


def test_a_device_with_all_experts_needs_no_buffer_and_drops_nothing():
    moe = MoEConfig(num_experts=6, num_experts_per_tok=2, expert_width=2, buffer_factor=0.5)
    assert _kept_of_two_favourites(moe) == 128
