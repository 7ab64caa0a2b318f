"""What a stream of batches was made from, kept in checkpoints: a resumed run tells what changed, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.config import DataConfig
from moe_jax.data.sources import Manifest
from moe_jax.data.tokenized import TokenizedSource
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

_LISTED = 5  # changed files that a message names
_FIXED = {"seq_len": "data.seq_len", "global_batch_size": "data.global_batch_size", "seed": "data.seed"}


@dataclass(frozen=True)
class Origin:
    """`fingerprint` covers all that decides the batches; `options` and `files` (sources' paths to size and sha256)
    are there to say what changed where it differs."""

    fingerprint: str
    options: dict[str, Any]
    files: Manifest

    def changes_since(self, state: dict[str, Any], allow_changed: bool) -> list[str]:
        """Sentences on what differs from a stored origin; UserError unless all of it is allowed.

        Files and mixture are what `allow_changed` allows: the run goes on at the same batch number of other data.
        """
        if state["fingerprint"] == self.fingerprint:
            return []
        was, now = state["options"], self.options
        fixed = [f"{name} was {was[key]}, is {now[key]}" for key, name in _FIXED.items() if was[key] != now[key]]
        if was["tokenizer"] != now["tokenizer"]:
            fixed.append(f"the tokenizer was {was['tokenizer'][:12]}, is {now['tokenizer'][:12]}")
        if fixed:
            raise UserError(
                f"the batches changed since the checkpoint: {'; '.join(fixed)}; "
                "restore that, or start a new run with init_from"
            )
        changes = [
            f"{name} was {was[key]}, is {now[key]}"
            for key, name in (("sources", "data.sources"), ("max_bytes", "data.max_bytes"))
            if was[key] != now[key]
        ]
        changes += list(_file_changes(state["files"], self.files))
        changes = changes or ["the same files are read or encoded otherwise by this version of the code"]
        if not allow_changed:
            more = f"; and {len(changes) - _LISTED} more" if len(changes) > _LISTED else ""
            raise UserError(
                f"the data changed since the checkpoint: {'; '.join(changes[:_LISTED])}{more}; "
                "restore it, go on with --new-data, or start a new run with init_from"
            )
        return changes


def origin_of(config: DataConfig, tokenizer: Tokenizer, sources: Sequence[TokenizedSource]) -> Origin:
    """The origin of the batches that `config` makes of its tokenised sources."""
    parts = [config.seq_len, config.global_batch_size, config.seed, tokenizer.fingerprint]
    parts += [(source.fingerprint, item.weight) for source, item in zip(sources, config.sources, strict=True)]
    options = {key: getattr(config, key) for key in _FIXED} | {
        "tokenizer": tokenizer.fingerprint,
        "sources": ", ".join(f"{s.path} ({s.kind}, weight {s.weight:g})" for s in config.sources),
        "max_bytes": config.max_bytes,
    }
    files = {path: entry for source in sources for path, entry in source.files.items()}
    return Origin(hashlib.sha256(repr(parts).encode()).hexdigest(), options, files)


def _file_changes(was: Manifest, now: Manifest) -> Iterator[str]:
    for path, (size, digest) in was.items():
        if path not in now:
            yield f"{path} is missing"
        elif (found := now[path][0]) != size:
            yield f"{path} is {'shorter' if found < size else 'longer'} ({found:,} bytes, was {size:,})"
        elif now[path][1] != digest:
            yield f"{path} has other content"
    yield from (f"{path} is new" for path in now if path not in was)
