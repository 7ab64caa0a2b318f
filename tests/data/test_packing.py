"""Packing loses nothing, invents nothing, and never lets one document predict another."""

from __future__ import annotations

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import packing
from moe_jax.data.packing import PackedRows, empty_row, layout_chat, layout_text, stack
from moe_jax.data.tokenized import TokenizedSource

PAD, BOS, SPAN = 0, 1, 1000
lengths_of_documents = st.lists(st.integers(2, 40), min_size=1, max_size=12)
row_lengths = st.integers(2, 33)
seeds = st.none() | st.integers(0, 2**32 - 1)


def source(lengths: list[int], trained: np.ndarray | None = None) -> TokenizedSource:
    """Documents whose ids tell document and place: (document + 1) * SPAN + place."""
    documents = [SPAN * (d + 1) + np.arange(n) for d, n in enumerate(lengths)]
    offsets = np.cumsum([0, *lengths])
    return TokenizedSource(np.concatenate(documents).astype(np.uint32), trained, offsets, 0, "")


def segments_of(rows: PackedRows):
    """(tokens, targets, loss_mask) of every segment; checks ids, positions and padding on the way."""
    for index in range(len(rows)):
        row = rows[index]
        segment_ids = row["segment_ids"]
        used = int((segment_ids > 0).sum())
        assert (segment_ids[used:] == 0).all() and (row["tokens"][used:] == PAD).all()
        assert not row["loss_mask"][used:].any() and not row["positions"][used:].any()
        assert set(segment_ids[:used]) == set(range(1, segment_ids.max() + 1))
        assert (np.diff(segment_ids[:used]) >= 0).all()
        for segment in range(1, segment_ids.max() + 1):
            at = segment_ids == segment
            assert row["positions"][at].tolist() == list(range(at.sum()))
            yield row["tokens"][at], row["targets"][at], row["loss_mask"][at]


def all_places(lengths: list[int], first: int = 0) -> list[int]:
    return [SPAN * (d + 1) + i for d, n in enumerate(lengths) for i in range(first, n)]


@settings(max_examples=60)
@given(lengths_of_documents, row_lengths, seeds)
def test_text_packing_has_every_token_once_and_every_target_once(lengths, S, seed):
    tokens, targets = [], []
    for segment, goals, mask in segments_of(PackedRows(source(lengths), S, BOS, PAD, seed)):
        if segment[0] == BOS:  # the rest of a cut document
            assert mask[0] == 0 and segment[1] % SPAN > 0
            segment, goals, mask = segment[1:], goals[1:], mask[1:]
        assert len(set(segment // SPAN)) == 1
        assert (goals[mask > 0] == segment[mask > 0] + 1).all()
        assert (mask[:-1] == 1).all()  # only a document's last place may have no target
        tokens += segment.tolist()
        targets += goals[mask > 0].tolist()
    assert sorted(tokens) == all_places(lengths)
    assert sorted(targets) == all_places(lengths, first=1)


@settings(max_examples=60)
@given(lengths_of_documents, row_lengths)
def test_text_rows_are_full_but_the_last(lengths, S):
    rows = PackedRows(source(lengths), S, BOS, PAD)
    assert all((rows[i]["segment_ids"] > 0).all() for i in range(len(rows) - 1))


@settings(max_examples=60)
@given(lengths_of_documents, row_lengths, seeds, st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.2, 0.6]))
def test_chats_stay_whole_or_are_cut_and_counted(lengths, S, seed, draw, share):
    trained = np.random.default_rng(draw).random(sum(lengths)) < share
    trained[1] = True  # at least one conversation stays
    chats = source(lengths, trained)
    rows = PackedRows(chats, S, BOS, PAD, seed)
    seen, cut = [], 0
    for segment, goals, mask in segments_of(rows):
        document = int(segment[0]) // SPAN - 1
        start, length = int(chats.offsets[document]), lengths[document]
        assert segment.tolist() == [SPAN * (document + 1) + i for i in range(min(length, S))]
        cut += length > S
        here = trained[start + 1 : start + 1 + len(segment)] if length > len(segment) else None
        want = trained[start + 1 : start + length] if here is None else here
        assert mask[: len(want)].astype(bool).tolist() == want.tolist()
        assert not mask[len(want) :].any() and mask.any()
        assert (goals[mask > 0] == segment[mask > 0] + 1).all()
        seen.append(document)
    ends = np.minimum(chats.offsets[:-1] + S + 1, chats.offsets[1:])
    with_target = [trained[start + 1 : end].any() for start, end in zip(chats.offsets[:-1], ends, strict=True)]
    assert sorted(seen) == np.flatnonzero(with_target).tolist()
    assert len(seen) == len(lengths) - rows.layout.dropped
    assert cut == rows.layout.truncated


@settings(max_examples=60)
@given(lengths_of_documents, row_lengths, seeds)
def test_each_row_of_text_goes_on_where_the_one_before_ended(lengths, S, seed):
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    layout = layout_text(np.array(lengths), order, S)
    at = [(document, place) for document in order for place in range(lengths[document])]
    for row in range(len(layout.rows) - 1):
        pieces = list(layout.pieces(row))
        held = [(document, place) for document, begin, end in pieces for place in range(begin, end)]
        room = S - (pieces[0][1] > 0)  # a rest begins behind a BOS
        assert held == at[:room] and len(held) > 0
        at = at[room:]
    assert at == []


def test_a_layout_takes_tens_of_bytes_a_document():
    lengths, trained = np.full(200_000, 700), np.ones(200_000, bool)
    order = np.random.default_rng(0).permutation(len(lengths))
    for lay in (lambda: layout_text(lengths, order, 1024), lambda: layout_chat(lengths, order, 1024, trained)):
        tracemalloc.start()
        layout = lay()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert layout.rows[-1] == 700 * len(lengths) and peak < 100 * len(lengths)


def test_first_fit_fills_earlier_rows():
    trained = np.ones(14, bool)
    rows = PackedRows(source([5, 6, 3], trained), 8, BOS, PAD)
    assert [(rows[i]["segment_ids"] > 0).sum() for i in range(len(rows))] == [8, 6]


def test_a_conversation_stays_for_the_one_target_of_its_rows_last_place():
    trained = np.zeros(12, bool)
    trained[[4, 10]] = True  # of each conversation the target of place 3
    rows = PackedRows(source([6, 6], trained), 4, BOS, PAD)
    assert [rows[i]["loss_mask"].tolist() for i in range(len(rows))] == [[0, 0, 0, 1]] * 2
    assert rows.layout.dropped == 0


def test_first_fit_closes_the_oldest_row_when_one_too_many_would_be_open():
    many = packing._OPEN_ROWS + 1
    lengths = np.array([6] * many + [4])
    layout = layout_chat(lengths, np.arange(many + 1), 10, np.ones(many + 1, bool))
    assert [[document for document, *_ in layout.pieces(row)] for row in (0, 1, 2)] == [[0], [1, many], [2]]


def test_rows_have_the_types_of_the_batch_format():
    batch = stack([PackedRows(source([9]), 4, BOS, PAD)[0], empty_row(4, PAD)])
    types = {name: values.dtype.name for name, values in batch.items()}
    assert types.pop("loss_mask") == "float32"
    assert set(types) == {"tokens", "targets", "segment_ids", "positions"}
    assert set(types.values()) == {"int32"} and batch["tokens"].shape == (2, 4)
