"""Documents to rows of fixed length, addressable by number.

A layout is a list of pieces (which tokens of which document stand in which row), worked out once from the lengths
of the documents. Rows are then built on demand, so the state of a run is one integer and step n has the same rows
on any number of processes. (Grain's own packing iterators pack per process and can promise neither.)

Legend: S sequence length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.data.tokenized import TokenizedSource
from moe_jax.errors import UserError

Batch = dict[str, np.ndarray]
_OPEN_ROWS = 64  # rows that first-fit keeps open; more saves little padding


@dataclass(frozen=True)
class Layout:
    """`pieces` int64 [P, 3] of (document, begin, end) in the order they fill rows; row r holds pieces
    `first_piece[r]` to `first_piece[r + 1]`. The counts say what was cut or left out."""

    pieces: np.ndarray
    first_piece: np.ndarray
    truncated: int = 0
    dropped: int = 0


def layout_text(lengths: np.ndarray, order: np.ndarray, S: int) -> Layout:
    """Concatenate documents in `order` and cut at every S tokens; a cut document goes on in the next row.

    The rest of a cut document gives its first place to a BOS that carries no loss: at inference, too, every context
    starts with BOS, and the model should never see another beginning.
    """
    pieces, first, free = [], [0], S
    for document in order.tolist():
        begin, length = 0, int(lengths[document])
        while begin < length:
            if free == 0:
                first.append(len(pieces))
                free = S
            take = min(length - begin, free - (begin > 0))  # a rest always begins a row: free is S > 1
            pieces.append((document, begin, begin + take))
            free -= take + (begin > 0)
            begin += take
    return _layout(pieces, [*first, len(pieces)])


def layout_chat(lengths: np.ndarray, order: np.ndarray, S: int, is_trained: Callable[[int, int], bool]) -> Layout:
    """First-fit of whole conversations; one longer than S is cut to S, and left out if nothing of it is trained.

    `is_trained(document, end)` says whether any of its tokens [1, end] is a target of the loss.
    """
    rows, free, is_open = [], [], []
    truncated = dropped = 0
    for document in order.tolist():
        length = int(lengths[document])
        if not is_trained(document, min(length - 1, S)):
            dropped += 1
            continue
        truncated += length > S
        length = min(length, S)
        row = next((row for row in is_open if free[row] >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(S)
            is_open = [*is_open[-_OPEN_ROWS + 1 :], row]
        rows[row].append((document, 0, length))
        free[row] -= length
    first = np.cumsum([0] + [len(row) for row in rows])
    return _layout([piece for row in rows for piece in row], first, truncated, dropped)


def _layout(pieces: list, first: Sequence[int] | np.ndarray, *counts: int) -> Layout:
    return Layout(np.array(pieces, np.int64).reshape(-1, 3), np.asarray(first, np.int64), *counts)


class PackedRows:
    """The rows of one source: `len(rows)`, `rows[i]` a dict of arrays [S] in the batch format, `rows.layout`.

    Documents are laid out in an order drawn from `seed`, or in their own order where it is None.
    """

    def __init__(self, source: TokenizedSource, S: int, bos: int, pad: int, seed: int | None = None):
        self._source, self._S, self._bos, self._pad = source, S, bos, pad
        order = np.arange(len(source))
        if seed is not None:
            order = np.random.Generator(np.random.PCG64(seed)).permutation(len(source))
        lengths, trained = np.diff(source.offsets), source.trained
        if trained is None:
            self.layout = layout_text(lengths, order, S)
        else:
            starts = source.offsets
            self.layout = layout_chat(
                lengths, order, S, lambda d, end: bool(trained[starts[d] + 1 : starts[d] + 1 + end].any())
            )
        if not len(self):
            raise UserError(f"no conversation has an assistant's answer within {S} tokens; raise data.seq_len")

    def __len__(self) -> int:
        return len(self.layout.first_piece) - 1 if len(self.layout.pieces) else 0

    def __getitem__(self, index: int) -> Batch:
        source, layout = self._source, self.layout
        row = empty_row(self._S, self._pad)
        first, last = layout.first_piece[index : index + 2]
        at = 0
        for segment, (document, begin, end) in enumerate(layout.pieces[first:last].tolist(), 1):
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


def empty_row(S: int, pad: int) -> Batch:
    """A row of nothing but padding: segment 0 and no loss."""
    zeros = {name: np.zeros(S, np.int32) for name in ("segment_ids", "positions")}
    pads = {name: np.full(S, pad, np.int32) for name in ("tokens", "targets")}
    return pads | zeros | {"loss_mask": np.zeros(S, np.float32)}


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows [S] to a batch [B, S]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
