"""Pieces of real text that a model never saw, cut so that engine and trainer agree on their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from moe_jax.config import SourceConfig
from moe_jax.data.sources import document_text, iter_documents
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

_CHARACTERS = 40  # more than any tokenizer needs for one token of ordinary text


def pieces(sources: Sequence[SourceConfig], tokenizer: Tokenizer, most: int, tokens: int) -> list[list[int]]:
    """At most `most` pieces of exactly `tokens` ids, one of each document before a second of any.

    Of conversations the text is taken. Each piece decodes to text that encodes to it again, and holds no name of a
    special token (an engine would take that for the token). Raises UserError where the sources hold no such piece.
    """
    found = list(islice(_pieces(sources, tokenizer, most, tokens), most))
    if not found:
        raise UserError(
            f"the held-out text ({', '.join(s.path for s in sources) or 'no source'}) has no piece of {tokens} "
            "tokens; give longer text or ask for fewer tokens"
        )
    return found


def _pieces(sources: Sequence[SourceConfig], tokenizer: Tokenizer, most: int, tokens: int) -> Iterator[list[int]]:
    size = max(tokens, 1) * _CHARACTERS
    documents: Iterable[str] = (document_text(d) for source in sources for d in iter_documents(source))
    while documents:
        rests = []  # read once: a source may be large, or far away
        for document in documents:
            ids = tokenizer.encode(document[:size])[:tokens]
            text = tokenizer.decode(ids)
            sound = len(ids) == tokens and tokenizer.encode(text) == ids
            if sound and not any(name in text for name in tokenizer.special_texts):
                yield ids
            if rest := document[size : 4 * most * size]:  # a place may cut a character or a token
                rests.append(rest)
        documents = rests
