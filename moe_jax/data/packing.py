"""Documents to rows of fixed length, addressable by number.

A layout says which tokens of which document stand in which row. It follows from the lengths of the documents and is
worked out at every start, in some 0.1 us for a text and 3 for a conversation. Rows are then built on demand, so
the state of a run is one integer and step n has the same rows on any number of processes. (Grain's own packing
iterators pack per process and can promise neither.)

Legend: S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moe_jax.data.tokenized import TokenizedSource
from moe_jax.errors import UserError

Batch = dict[str, np.ndarray]
_OPEN_ROWS = 64  # rows that first-fit keeps open; more saves little padding
_LOOK_AHEAD = 1 << 18  # rows of text


@dataclass(frozen=True)
class Layout:
    """Which tokens of which documents stand in which row.

    The tokens of `documents` int64 [D] stand behind one another, each from its place in `starts` int64 [D + 1] on;
    row r holds those from `rows[r]` to `rows[r + 1]`, int64 [R + 1]. The counts say how many conversations were cut
    or left out.
    """

    documents: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    truncated: int = 0
    dropped: int = 0

    def pieces(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(document, begin, end) of each document's tokens in a row."""
        begin, end = self.rows[row : row + 2].tolist()
        first = int(np.searchsorted(self.starts, begin, "right")) - 1
        last = int(np.searchsorted(self.starts, end, "left"))
        bounds = pairwise(self.starts[first : last + 1].tolist())
        for document, (start, stop) in zip(self.documents[first:last].tolist(), bounds, strict=True):
            yield document, max(begin - start, 0), min(end, stop) - start


def layout_text(lengths: np.ndarray, order: np.ndarray, S: int) -> Layout:
    """Concatenate documents in `order` and cut at every S tokens; a cut document goes on in the next row.

    The rest of a cut document gives its first place to a BOS that carries no loss: at inference, too, every context
    starts with BOS, and the model should never see another beginning.
    """
    starts = _starts(lengths[order])
    total, rows, last = int(starts[-1]), [np.zeros(1, np.int64)], 0
    size, ahead = S, 1  # tokens of the row that begins at `last`, and how many rows after it are looked up at once
    while last + size < total:
        # Rows are guessed to go on as this one does: S tokens where it begins a document, S - 1 behind a BOS.
        guess = np.arange(last + size, min(last + ahead * size + 1, total), size)
        begins = starts[np.searchsorted(starts, guess)] == guess
        wrong = begins != (size == S)
        sure = int(wrong.argmax()) + 1 if wrong.any() else len(guess)
        rows.append(guess[:sure])
        last, size, ahead = int(guess[sure - 1]), S - 1 + int(begins[sure - 1]), min(2 * sure, _LOOK_AHEAD)
    return Layout(order, starts, np.concatenate([*rows, [total]]))


def layout_chat(lengths: np.ndarray, order: np.ndarray, S: int, is_trained: np.ndarray) -> Layout:
    """First-fit of whole conversations; one longer than S is cut to S.

    `is_trained` bool [documents] says whether any of its tokens [1, S] is a target of the loss; if none is, it is
    left out.
    """
    kept = order[is_trained[order]]
    cut = np.minimum(lengths[kept], S)
    row_of = np.fromiter(_first_fit(cut, S), np.int64, len(cut))
    by_row = np.argsort(row_of, kind="stable")
    starts = _starts(cut[by_row])
    first = np.searchsorted(row_of[by_row], np.arange(row_of.max(initial=-1) + 2))
    return Layout(kept[by_row], starts, starts[first], int((lengths[kept] > S).sum()), len(order) - len(kept))


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _first_fit(lengths: np.ndarray, S: int) -> Iterator[int]:
    """The row of each conversation: the first open one with room for it."""
    numbers, room, rows = [], [], 0
    for length in lengths.data:  # whole numbers one at a time: a list of all would be four times as large
        place = next((place for place, free in enumerate(room) if free >= length), len(room))
        if place == len(room):
            if place == _OPEN_ROWS:
                del numbers[0], room[0]
                place -= 1
            numbers.append(rows)
            room.append(S)
            rows += 1
        room[place] -= length
        yield numbers[place]


class PackedRows:
    """The rows of one source: `len(rows)`, `rows[i]` a dict of arrays [S] in the batch format, `rows.layout`,
    the source's `fingerprint`, and `empty`, a row of nothing but padding.

    Documents are laid out in an order drawn from `seed`, or in their own order where it is None.
    """

    def __init__(self, source: TokenizedSource, S: int, bos: int, pad: int, seed: int | None = None):
        self._source, self._bos = source, bos
        self.fingerprint, self.empty = source.fingerprint, empty_row(S, pad)
        order = np.arange(len(source))
        if seed is not None:
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(source))
        lengths, trained = np.diff(source.offsets), source.trained
        if trained is None:
            self.layout = layout_text(lengths, order, S)
        else:
            self.layout = layout_chat(lengths, order, S, _any_trained(trained, source.offsets, S))
        if not len(self):
            if trained is not None and not trained.any():
                raise UserError(
                    "no conversation has a message of the role 'assistant'; rename the roles of its files"
                )
            raise UserError(f"no conversation has an assistant's answer within {S} tokens; raise data.seq_len")

    def __len__(self) -> int:
        return len(self.layout.rows) - 1

    def __getitem__(self, index: int) -> Batch:
        source, row, at = self._source, {name: values.copy() for name, values in self.empty.items()}, 0
        for segment, (document, begin, end) in enumerate(self.layout.pieces(index), 1):
            start, stop = source.offsets[document : document + 2].tolist()
            ids = source.tokens[start + begin : start + end].astype(np.int32)
            targets = source.tokens[start + begin + 1 : min(start + end + 1, stop)]
            if begin > 0:  # the rest of a cut document
                row["tokens"][at], row["targets"][at] = self._bos, ids[0]
            lead = int(begin > 0)
            row["segment_ids"][at : at + lead + len(ids)] = segment
            row["positions"][at : at + lead + len(ids)] = np.arange(lead + len(ids))
            at += lead
            row["tokens"][at : at + len(ids)] = ids
            row["targets"][at : at + len(targets)] = targets
            trained = 1.0
            if source.trained is not None:
                trained = source.trained[start + begin + 1 : min(start + end + 1, stop)]
            row["loss_mask"][at : at + len(targets)] = trained
            at += len(ids)
        return row


def _any_trained(trained: np.ndarray, offsets: np.ndarray, S: int) -> np.ndarray:
    """Whether any of the tokens [1, S] of each document is trained, bool [documents]."""
    begins = offsets[:-1] + 1
    bounds = np.stack([begins, np.minimum(begins + S, offsets[1:])], 1).ravel()
    # Every other sum is of what lies between two documents' parts; the last bound may be the end of all.
    return np.logical_or.reduceat(trained, bounds[: -1 if bounds[-1] == len(trained) else None])[::2]


def empty_row(S: int, pad: int) -> Batch:
    """A row of nothing but padding: segment 0 and no loss."""
    zeros = {name: np.zeros(S, np.int32) for name in ("segment_ids", "positions")}
    pads = {name: np.full(S, pad, np.int32) for name in ("tokens", "targets")}
    return pads | zeros | {"loss_mask": np.zeros(S, np.float32)}


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows [S] to a batch [B, S]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
