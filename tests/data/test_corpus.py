"""The embedded corpus is real, the same each time, and its held-out side is never trained on."""

from __future__ import annotations

from itertools import islice

from moe_jax.config import SourceConfig
from moe_jax.data import corpus
from moe_jax.data.sources import iter_documents


def test_split_is_fixed_by_file_and_disjoint():
    train, heldout = corpus.stdlib_files(False), corpus.stdlib_files(True)
    assert not set(train) & set(heldout) and 0 < len(heldout) < len(train) / 8
    assert train == corpus.stdlib_files(False)


def test_corpus_leaves_out_tests_tables_and_strangers():
    for path in corpus.stdlib_files(False) + corpus.stdlib_files(True):
        assert not {"test", "tests", "encodings", "site-packages"} & set(path.parts[-3:-1]), path


def test_texts_are_the_files():
    first = next(corpus.stdlib_texts(True))
    assert first == corpus.stdlib_files(True)[0].read_text("utf-8")


def test_conversations_quote_real_functions():
    chats = list(islice(corpus.stdlib_chats(False), 300))
    assert chats == list(islice(corpus.stdlib_chats(False), 300))
    source = "".join(path.read_text("utf-8") for path in corpus.stdlib_files(False)[:300])
    for chat in chats:
        assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2)
        for answer in (m["content"] for m in chat if m["role"] == "assistant"):
            if answer.startswith("```python"):
                name = answer.split("def ")[1].split("(")[0]
                assert f"def {name}" in source
            elif "\\" not in answer:
                assert answer.splitlines()[0].strip() in source
    assert len({len(chat) for chat in chats}) == 2


def test_max_bytes_ends_a_source_with_the_document_that_reaches_it():
    texts = [str(d) for d in iter_documents(SourceConfig("stdlib:text"), 100_000)]
    sizes = [len(text.encode()) for text in texts]
    assert sum(sizes) >= 100_000 > sum(sizes[:-1])
