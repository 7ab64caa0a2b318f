"""The stream of batches: a weighted mixture of sources, shuffled each epoch, resumable at any batch.

Sources are packed first and mixed by rows, so a weight is a share of tokens whatever the documents' lengths. Grain
shuffles, repeats, mixes and batches by index; process p of P gets the p-th part of each global batch, so the global
batches do not depend on P, and a run may resume on another number of processes.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
from collections.abc import Iterator, Sequence
from itertools import islice

import grain

from moe_jax.config import DataConfig
from moe_jax.data.origin import Origin, origin_of
from moe_jax.data.packing import Batch, PackedRows, stack
from moe_jax.data.sources import iter_documents
from moe_jax.data.tokenized import require_tokens, tokenize_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError


class TrainIterator:
    """Endless batches of int32 and float32 arrays [B / processes, S]; see `make_train_iterator`.

    `stats` says what one epoch holds: documents, bytes, tokens, rows, and conversations truncated or dropped, per
    source.
    """

    def __init__(self, dataset: grain.IterDataset, stats: list[dict], origin: Origin) -> None:
        self.stats = stats
        self._iterator, self._origin = iter(dataset), origin
        self._taken, self._skipped = 0, set()

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        while self._taken < self.batch_number:
            next(self._iterator)  # dropping a batch costs its rows; moving would cost all that was read ahead
            self._taken += 1
        self._taken += 1
        return next(self._iterator)

    @property
    def batch_number(self) -> int:
        """Number of the global batch that comes next, from 0; those skipped have theirs."""
        number = self._taken
        while number in self._skipped:
            number += 1
        return number

    def skip(self, number: int) -> None:
        """Pass over this batch wherever the stream meets it from now on, also after `set_state`."""
        self._skipped.add(number)

    def get_state(self) -> dict:
        """JSON-able position after the last batch taken, batches skipped, and what the stream was made from; the
        same on every process."""
        position = {"position": self._iterator.get_state(), "batch_number": self.batch_number}
        return position | {"skipped": sorted(self._skipped)} | vars(self._origin)

    def set_state(self, state: dict, allow_changed: bool = False) -> list[str]:
        """Go to a position and skip what was skipped there; returns what changed in the data since.

        Raises:
            UserError: the state is of another sequence length, batch size, seed or tokenizer; or of other files
                or another mixture, unless `allow_changed`.
        """
        changes = self._origin.changes_since(state, allow_changed)
        self._iterator.set_state(state["position"])
        self._taken = state["position"]["next_index"]
        self._skipped |= set(state["skipped"])
        return changes


def make_train_iterator(
    config: DataConfig, tokenizer: Tokenizer, *, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """The training stream of a stage; raises UserError for unusable sources and for less than one batch of rows."""
    B, S = config.global_batch_size, config.seq_len
    if B % process_count:
        raise UserError(
            f"data.global_batch_size {B} is not a multiple of the {process_count} processes; "
            f"use {-(-B // process_count) * process_count}"
        )
    for source in config.sources:  # before the first of them is copied
        require_tokens(source, tokenizer, config.max_bytes, config.cache_dir)
    sources, stats, tokenized_sources = [], [], []
    for index, source in enumerate(config.sources):
        tokenized = tokenize_source(source, tokenizer, config.max_bytes, config.cache_dir)
        # Grain adds the epoch to its seed, so sources need seeds that are far apart.
        key = hashlib.sha256(f"{config.seed}/{index}".encode()).digest()
        seed = int.from_bytes(key[:4], "big")
        rows = PackedRows(tokenized, S, tokenizer.bos, tokenizer.pad, seed)
        tokenized_sources.append(tokenized)
        stats.append(
            {
                "path": source.path,
                "documents": len(tokenized),
                "bytes": tokenized.num_bytes,
                "tokens": len(tokenized.tokens),
                "rows": len(rows),
                "truncated": rows.layout.truncated,
                "dropped": rows.layout.dropped,
            }
        )
        sources.append(grain.MapDataset.source(rows).shuffle(seed).repeat())
    total = sum(item["rows"] for item in stats)
    if total < B:
        tokens = sum(item["tokens"] for item in stats)
        raise UserError(
            f"the sources hold {tokens} tokens, {total} rows of {S}, less than one batch of {B}; "
            f"add text or set data.global_batch_size to {total}{' or less' if total > 1 else ''}"
        )
    mixed = grain.MapDataset.mix(sources, [source.weight for source in config.sources])
    mixed = mixed[: 1 << 48]  # grain 0.2.18 cannot batch an endless dataset by one: its length overflows
    local = mixed.batch(B // process_count, batch_fn=stack)[process_index::process_count]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return TrainIterator(local.to_iter_dataset(options), stats, origin_of(config, tokenizer, tokenized_sources))


def heldout_rows(config: DataConfig, tokenizer: Tokenizer) -> list[PackedRows]:
    """The rows of each source of `config.heldout`; UserError where there is none, or one that cannot be used."""
    if not config.heldout:
        raise UserError("data.heldout is empty; name a source (evaluate and checkpoint.keep_best read it)")
    sources = (tokenize_source(s, tokenizer, config.max_bytes, config.cache_dir) for s in config.heldout)
    return [PackedRows(source, config.seq_len, tokenizer.bos, tokenizer.pad) for source in sources]


def heldout_batches(sources: Sequence[PackedRows], size: int) -> Iterator[Batch]:
    """One pass over `heldout_rows` in file order, in batches [size, S].

    Every token of a text but its first is a target exactly once; of conversations, the assistant's as they are
    trained on. Empty rows fill the last batch.
    """
    rows = (rows[index] for rows in sources for index in range(len(rows)))
    while pending := list(islice(rows, size)):
        yield stack(pending + [sources[0].empty] * (size - len(pending)))


def heldout_text(config: DataConfig) -> bytes:
    """The texts of `config.heldout` that `heldout_rows` packs, one after the other; conversations are left out."""
    sources = (source for source in config.heldout if source.kind == "text")
    return "".join(str(text) for source in sources for text in iter_documents(source, config.max_bytes)).encode()


def compression_bits_per_byte(data: bytes) -> dict[str, float]:
    """gzip -9 and xz -9 on texts as one stream (which favours them): bits per byte."""
    sizes = {"gzip9": len(gzip.compress(data, 9, mtime=0)), "xz9": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}
