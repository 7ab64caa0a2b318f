"""What the command line does with data: train a tokenizer, tokenise, and show a packed row to a person."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data.pipeline import make_train_iterator
from moe_jax.data.sources import document_text, iter_documents, source_files
from moe_jax.data.token_store import require_place
from moe_jax.data.tokenized import put_tokens
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, is_remote, location
from moe_jax.progress import Progress

_TRAINED, _SEEN, _OFF = "\033[32m", "\033[2m", "\033[0m"


def build_tokenizer(
    sources: Sequence[SourceConfig], vocab_size: int, output: AnyPath, max_bytes: int = 0, overwrite: bool = False
) -> Tokenizer:
    """Train a tokenizer on the sources (at most about `max_bytes` of each) and save it to `output`.

    Raises UserError where `output` exists: checkpoints may depend on it.
    """
    if not os.fspath(output) or location(output).is_dir():
        raise UserError(f"data.tokenizer is {str(output)!r}; name a file, such as data/tokenizer.json")
    if location(output).exists() and not overwrite:
        raise UserError(f"{output} exists, and checkpoints may depend on it; name another file or add --overwrite")
    texts = (
        document_text(document)
        for source in sources
        for document in iter_documents(source, max_bytes, progress=Progress(f"reading {source.path}"))
    )
    tokenizer = Tokenizer.train(texts, vocab_size)
    tokenizer.save(output)
    return tokenizer


def tokenize(stages: Sequence[tuple[DataConfig, Tokenizer]]) -> Iterator[str]:
    """Put the tokens of all sources of these stages, held-out ones too, into their `cache_dir`; a line for each.

    A run that is given the same options finds them there. Raises UserError, before the first is read, where there
    is no cache or a source is missing.
    """
    for config, _ in stages:
        if not config.cache_dir:
            raise UserError("data.cache_dir is empty; name the folder, local or gs://, that the run will be given")
        for source in (*config.sources, *config.heldout):
            source_files(source.path)
        if is_remote(config.cache_dir):
            require_place(config.cache_dir)
    for config, tokenizer in stages:
        for source in (*config.sources, *config.heldout):
            found = put_tokens(source, tokenizer, config.max_bytes, config.cache_dir)
            what = f"{len(found):,} documents, {len(found.tokens):,} tokens" if found is not None else "all there"
            yield f"{source.path}: {what} in {config.cache_dir}"


def inspect_batch(
    config: DataConfig, tokenizer: Tokenizer, batch: int = 0, row: int = 0, color: bool = True
) -> str:
    """One packed row as text: each segment with its extent, and what the loss counts in green (or in «marks»)."""
    batches = make_train_iterator(config, tokenizer)
    state = batches.get_state()
    batches.set_state(state | {"position": state["position"] | {"next_index": batch}})
    arrays = {name: values[row] for name, values in next(batches).items()}
    segments, counted = arrays["segment_ids"], arrays["loss_mask"] > 0
    lines = [
        f"batch {batch} row {row}: {len(segments)} places, {segments.max()} segments, "
        f"{int(counted.sum())} targets in the loss, {int((segments == 0).sum())} padding"
    ]
    for segment in range(1, segments.max() + 1):
        at = np.flatnonzero(segments == segment)
        # A token is trained on where the place before it says so.
        trained = np.concatenate([[False], counted[at[:-1]]])
        lines.append(f"-- segment {segment}: places {at[0]}..{at[-1]}, positions 0..{arrays['positions'][at[-1]]}")
        runs = np.split(np.arange(len(at)), np.flatnonzero(np.diff(trained)) + 1)
        text = ""
        for run in runs:
            words = tokenizer.decode(arrays["tokens"][at[run]])
            if color:
                text += (_TRAINED if trained[run[0]] else _SEEN) + words + _OFF
            else:
                text += f"«{words}»" if trained[run[0]] else words
        lines.append(text)
    return "\n".join(lines)
