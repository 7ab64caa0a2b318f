"""Pieces of real text that a model never saw, cut so that engine and trainer agree on their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from moe_jax.config import SourceConfig
from moe_jax.data.sources import iter_documents
from moe_jax.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from moe_jax.errors import UserError

_CHARACTERS = 40  # more than any tokenizer needs for one token of ordinary text


def pieces(sources: Sequence[SourceConfig], tokenizer: Tokenizer, count: int, tokens: int) -> list[list[int]]:
    """At most `count` pieces of exactly `tokens` ids, spread over the documents of the text sources.

    Each piece decodes to text that encodes to it again, and holds no name of a special token (an engine would take
    that for the token). Raises UserError where the sources hold no such piece.
    """
    documents = [
        document
        for source in sources
        if source.kind == "text"
        for document in islice(iter_documents(source), count)
    ]
    found = list(islice(_pieces([str(d) for d in documents], tokenizer, tokens), count))
    if not found:
        raise UserError(
            f"the held-out text has no piece of {tokens} tokens; give longer text or ask for fewer tokens"
        )
    return found


def _pieces(documents: list[str], tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
    size = tokens * _CHARACTERS
    for start in range(0, max(map(len, documents), default=0), size):
        for document in documents:
            ids = tokenizer.encode(document[start : start + size])[:tokens]
            text = tokenizer.decode(ids)
            special = any(token in text for token in SPECIAL_TOKENS)
            if len(ids) == tokens and not special and tokenizer.encode(text) == ids:
                yield ids
