"""Batches are the same every time, on every number of processes, and after every resume."""

from __future__ import annotations

import dataclasses
import gzip
import json
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data import tokenized
from moe_jax.data.commands import inspect_batch
from moe_jax.data.packing import PackedRows
from moe_jax.data.pipeline import (
    compression_bits_per_byte,
    heldout_batches,
    heldout_rows,
    heldout_text,
    make_train_iterator,
)
from moe_jax.data.tokenized import tokenize_source
from moe_jax.errors import UserError
from tests.data.helpers import same, sentence, take, write


def test_two_streams_of_one_config_are_equal_and_another_seed_differs(config, tokenizer):
    first = take(make_train_iterator(config, tokenizer), 30)
    assert same(first, take(make_train_iterator(config, tokenizer), 30))
    other = dataclasses.replace(config, seed=4)
    assert not same(first, take(make_train_iterator(other, tokenizer), 30))


def test_second_resume_continues_the_same_batches(config, tokenizer):
    whole = take(make_train_iterator(config, tokenizer), 60)  # several epochs
    seen, state = [], ""
    for count in (17, 1, 25, 17):
        iterator = make_train_iterator(config, tokenizer)
        if state:
            iterator.set_state(json.loads(state))
        seen += take(iterator, count)
        state = json.dumps(iterator.get_state())
    assert same(whole, seen)


def test_a_stream_can_be_set_back(config, tokenizer):
    iterator = make_train_iterator(config, tokenizer)
    take(iterator, 3)
    state = iterator.get_state()
    first = take(iterator, 5)
    iterator.set_state(state)
    assert same(first, take(iterator, 5))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_global_batch_and_may_change_in_number(config, tokenizer, processes):
    whole = make_train_iterator(config, tokenizer)
    take(whole, 5)
    parts = [
        make_train_iterator(config, tokenizer, process_index=p, process_count=processes) for p in range(processes)
    ]
    for part in parts:
        part.set_state(whole.get_state())
    for batch in take(whole, 20):
        pieces = [next(part) for part in parts]
        joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in batch}
        assert same([batch], [joined])


def test_each_epoch_has_every_row_once_in_a_new_order(config, text_source, tokenizer):
    config = dataclasses.replace(config, sources=(text_source,), global_batch_size=1)
    iterator = make_train_iterator(config, tokenizer)
    rows = iterator.stats[0]["rows"]
    epochs = [[batch["tokens"].tobytes() for batch in take(iterator, rows)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] and len(set(epochs[0])) == rows


def test_another_seed_joins_other_documents_in_a_row(config, text_source, tokenizer):
    config = dataclasses.replace(config, sources=(text_source,), global_batch_size=1)

    def rows(seed: int) -> set[bytes]:
        iterator = make_train_iterator(dataclasses.replace(config, seed=seed), tokenizer)
        return {batch["tokens"].tobytes() for batch in take(iterator, iterator.stats[0]["rows"])}

    in_file_order = heldout_rows(config, tokenizer)[0]
    unshuffled = {in_file_order[row]["tokens"].tobytes() for row in range(len(in_file_order))}
    assert len(rows(3) | rows(4) | unshuffled) > 2.5 * len(unshuffled)


def test_sources_are_shuffled_each_in_its_own_way(config, text_source, tokenizer):
    config = dataclasses.replace(config, sources=(text_source, text_source), global_batch_size=2)
    for batch in take(make_train_iterator(config, tokenizer), 8):  # a row of each
        assert not np.array_equal(*batch["tokens"])


def test_sources_are_packed_each_in_its_own_way(config, text_source, tokenizer):
    config = dataclasses.replace(config, sources=(text_source, text_source), global_batch_size=2)
    iterator = make_train_iterator(config, tokenizer)
    epoch = [batch["tokens"] for batch in take(iterator, iterator.stats[0]["rows"])]
    first, second = ({rows[source].tobytes() for rows in epoch} for source in (0, 1))
    assert len(first | second) > 1.8 * len(first)


def test_mixture_follows_the_weights_by_rows(config, tokenizer):
    rows = [row for batch in take(make_train_iterator(config, tokenizer), 100) for row in batch["tokens"]]
    chats = sum(tokenizer.header_start in row for row in rows)
    assert len(rows) == 400 and abs(chats - 100) <= 2


def test_less_than_one_batch_is_refused_with_the_numbers(config, tokenizer):
    config = dataclasses.replace(config, global_batch_size=4096)
    with pytest.raises(UserError, match=r"\d+ tokens, \d+ rows of 64, less than one batch of 4096"):
        make_train_iterator(config, tokenizer)


def test_a_batch_that_processes_cannot_share_is_refused(config, tokenizer):
    with pytest.raises(UserError, match="not a multiple of the 3 processes; use 6"):
        make_train_iterator(config, tokenizer, process_count=3)


def test_chats_without_answers_in_reach_are_refused(config, chat_source, tokenizer):
    config = dataclasses.replace(config, sources=(chat_source,), seq_len=3)
    with pytest.raises(UserError, match="no conversation has an assistant's answer within 3 tokens"):
        make_train_iterator(config, tokenizer)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "array_record"])
def test_own_files_train_end_to_end(tmp_path, tokenizer, kind):
    path = write(tmp_path, kind, "text", [sentence(i, 20) for i in range(12)])
    config = DataConfig((SourceConfig(path),), seq_len=32, global_batch_size=2, cache_dir="")
    batch = next(make_train_iterator(config, tokenizer))
    assert batch["tokens"].shape == (2, 32) and batch["loss_mask"].mean() > 0.8


def test_cache_gives_the_same_ids_and_notices_a_changed_file(text_source, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    plain = tokenize_source(text_source, tokenizer)
    cached = [tokenize_source(text_source, tokenizer, cache_dir=str(cache)) for _ in range(2)]
    assert {t.fingerprint for t in cached} == {plain.fingerprint} and len(list(cache.iterdir())) == 1
    assert np.array_equal(cached[1].tokens, plain.tokens) and cached[1].num_bytes == plain.num_bytes
    with Path(text_source.path).open("a") as file:
        file.write('{"text": "one more"}\n')
    changed = tokenize_source(text_source, tokenizer, cache_dir=str(cache))
    assert len(changed) == len(plain) + 1 and changed.fingerprint != plain.fingerprint


def test_long_texts_are_encoded_in_parts_without_loss(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "_PART", 50)
    texts = [sentence(1, 300), "\n".join(sentence(i, 9) for i in range(30)), "short"]
    source = SourceConfig(write(tmp_path, "jsonl", "text", texts))
    stored = tokenize_source(source, tokenizer)
    bounds = zip(stored.offsets[:-1], stored.offsets[1:], strict=True)
    assert [tokenizer.decode(stored.tokens[a + 1 : b - 1]) for a, b in bounds] == texts
    ids = [tokenized.document_ids(text, tokenizer)[0] for text in texts]
    assert np.array_equal(np.concatenate(ids), stored.tokens)


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(20, 99),
)
def test_ids_do_not_depend_on_how_many_parts_are_encoded_at_a_time(tokenizer, words, chunk, size, part):
    texts = [sentence(number, count) for number, count in enumerate(words)]
    whole = [tokenized.document_ids(text, tokenizer)[0] for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_CHUNK", chunk), ("_CHUNK_SIZE", size)):
            patch.setattr(tokenized, name, value)
        many = list(tokenized._encoded_texts(texts, tokenizer))
        patch.setattr(tokenized, "_PART", part)  # from here on texts come in several parts
        cut = list(tokenized._encoded_texts(texts, tokenizer))
    assert len(many) == len(cut) == len(texts)
    for text, one, other, pieces in zip(texts, whole, many, cut, strict=True):
        assert np.array_equal(one, other) and tokenizer.decode(pieces[1:-1]) == text


def test_a_cache_that_cannot_be_written_is_named(text_source, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write tokens to .*set data.cache_dir to"):
        tokenize_source(text_source, tokenizer, cache_dir=str(tmp_path / "file" / "cache"))


def test_a_failed_read_leaves_no_cache_behind(text_source, tokenizer, tmp_path):
    with Path(text_source.path).open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        tokenize_source(text_source, tokenizer, cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("times", [1, 2])
def test_heldout_batches_and_text_hold_the_same_bytes_and_targets(config, tokenizer, times):
    config = dataclasses.replace(config, heldout=config.heldout * times)
    batches = list(heldout_batches(heldout_rows(config, tokenizer), 5))
    assert all(batch["tokens"].shape == (5, 64) for batch in batches)
    targets = [int(t) for b in batches for t in b["targets"][b["loss_mask"] > 0]]
    source = tokenize_source(config.heldout[0], tokenizer)
    documents = [source.tokens[a:b] for a, b in pairwise(source.offsets)] * times
    assert targets == [int(t) for ids in documents for t in ids[1:]]
    assert "".join(tokenizer.decode(ids[1:-1]) for ids in documents).encode() == heldout_text(config)


def test_heldout_text_is_refused_before_training_where_nothing_in_it_can_be_measured(config, tokenizer, tmp_path):
    (rows,) = heldout_rows(config, tokenizer)
    twice = heldout_rows(dataclasses.replace(config, heldout=config.heldout * 2), tokenizer)
    assert [other.fingerprint for other in twice] == [rows.fingerprint] * 2
    with pytest.raises(UserError, match=r"data\.heldout is empty; name a source"):
        heldout_rows(dataclasses.replace(config, heldout=()), tokenizer)
    missing = dataclasses.replace(config, heldout=(*config.heldout, SourceConfig(f"{tmp_path}/none*")))
    with pytest.raises(UserError, match="none"):
        heldout_rows(missing, tokenizer)
    (tmp_path / "open.jsonl").write_text('{"messages": [{"role": "user", "content": "alone"}]}\n')
    unanswered = dataclasses.replace(config, heldout=(SourceConfig(f"{tmp_path}/open.jsonl", kind="chat"),))
    with pytest.raises(UserError, match="has a message of the role 'assistant'; rename the roles"):
        heldout_rows(unanswered, tokenizer)
    long = [{"role": "user", "content": sentence(1, 300)}, {"role": "assistant", "content": "late"}]
    (tmp_path / "open.jsonl").write_text(json.dumps({"messages": long}) + "\n")
    with pytest.raises(UserError, match="no conversation has an assistant's answer within 64 tokens; raise"):
        heldout_rows(unanswered, tokenizer)


def test_compression_is_in_bits_of_the_same_bytes():
    text = b"the same words again and again, " * 100
    bits = compression_bits_per_byte(text)
    assert bits["gzip9"] == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text) < 1
    assert 0 < bits["xz9"] < 1


def test_heldout_chats_are_no_text(config, chat_source):
    assert heldout_text(dataclasses.replace(config, heldout=(chat_source,))) == b""


def test_a_row_can_be_looked_at(config, chat_source, tokenizer):
    config = dataclasses.replace(config, sources=(chat_source,))
    shown = inspect_batch(config, tokenizer, row=1, color=False)
    assert "segment 1: places 0.." in shown and "<|eot|>»" in shown
    assert "\033[32m" in inspect_batch(config, tokenizer, row=1)


def test_a_row_far_on_is_looked_at_without_those_before_it(config, tokenizer, monkeypatch):
    built = []
    get = PackedRows.__getitem__
    monkeypatch.setattr(PackedRows, "__getitem__", lambda self, index: (built.append(index), get(self, index))[1])
    shown = inspect_batch(config, tokenizer, batch=10**6, row=2, color=False)
    assert "batch 1000000 row 2: 64 places" in shown and len(built) < 100
    monkeypatch.undo()
    walked = next(islice(make_train_iterator(config, tokenizer), 7, None))["tokens"][2]
    text = tokenizer.decode(walked)
    shown = inspect_batch(config, tokenizer, batch=7, row=2, color=False)
    assert shown.partition("\n")[2].replace("«", "").replace("»", "").splitlines()[1] in text
