"""Tokens put in a bucket are those that a run would make itself, all of them, or a sentence."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import numpy as np
import pytest

from moe_jax.config import SourceConfig
from moe_jax.data import sources, token_store, tokenized
from moe_jax.data.commands import tokenize
from moe_jax.data.pipeline import heldout_rows, make_train_iterator
from moe_jax.data.sources import SourceFile
from moe_jax.data.tokenized import TokenizedSource, put_tokens, tokenize_source
from moe_jax.errors import UserError
from moe_jax.files import location, remote_filesystem, sizes_below, write_bytes
from tests.data.helpers import same, take


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(token_store, "_PART_BYTES", 100)


def equal(left: TokenizedSource, right: TokenizedSource) -> bool:
    a, b = vars(left), vars(right)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def only_store(cache: str) -> str:
    (key,) = {name.partition("/")[0] for name in sizes_below(cache)}
    return f"{cache}/{key}"


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("part", [100, 1 << 20])
def test_tokens_come_back_from_a_bucket_as_they_were_made(
    text_source, chat_source, tokenizer, bucket, monkeypatch, kind, part
):
    monkeypatch.setattr(token_store, "_PART_BYTES", part)
    source = text_source if kind == "text" else chat_source
    made = tokenize_source(source, tokenizer)
    put = put_tokens(source, tokenizer, 0, f"{bucket}/tokens")
    assert put is not None and equal(made, put)
    monkeypatch.setattr(tokenized, "_write", None)  # from here on nobody tokenises
    assert equal(made, tokenize_source(source, tokenizer, cache_dir=f"{bucket}/tokens"))
    assert put_tokens(source, tokenizer, 0, f"{bucket}/tokens") is None


def test_a_run_takes_its_batches_from_the_tokens_in_a_bucket(config, tokenizer, bucket):
    remote = dataclasses.replace(config, cache_dir=f"{bucket}/tokens")
    with pytest.raises(
        UserError, match=rf"{bucket}/tokens has no tokens of .*texts.jsonl .*moe_jax tokenize CONFIG"
    ):
        make_train_iterator(remote, tokenizer)
    said = list(tokenize([(remote, tokenizer)]))
    stats = make_train_iterator(config, tokenizer).stats
    assert said[:2] == [
        f"{item['path']}: {item['documents']:,} documents, {item['tokens']:,} tokens in {bucket}/tokens"
        for item in stats
    ]
    assert said[2] == f"{config.heldout[0].path}: all there in {bucket}/tokens"  # the first source's, too
    here, there = make_train_iterator(config, tokenizer), make_train_iterator(remote, tokenizer)
    assert same(take(here, 20), take(there, 20))
    assert make_train_iterator(config, tokenizer).set_state(there.get_state()) == []


def test_another_machine_finds_the_tokens_of_text_that_it_has_a_copy_of(config, tokenizer, bucket, monkeypatch):
    here = dataclasses.replace(config, heldout=(SourceConfig("stdlib:heldout"),), cache_dir=f"{bucket}/tokens")
    here = dataclasses.replace(here, max_bytes=20_000)
    list(tokenize([(here, tokenizer)]))
    for source in here.sources:
        os.utime(source.path, (1e9, 1e9))
    monkeypatch.setattr(sources, "_stat", lambda path: SourceFile(path, os.stat(path).st_size, "written later"))
    monkeypatch.setattr(tokenized, "_write", None)
    make_train_iterator(here, tokenizer)
    assert heldout_rows(here, tokenizer)


def test_tokens_of_a_text_that_changed_are_not_taken(text_source, tokenizer, bucket):
    put_tokens(text_source, tokenizer, 0, f"{bucket}/tokens")
    with open(text_source.path, "a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(UserError, match="has no tokens of"):
        tokenize_source(text_source, tokenizer, cache_dir=f"{bucket}/tokens")
    put = put_tokens(text_source, tokenizer, 0, f"{bucket}/tokens")
    assert put is not None and len(put) == 61


def test_tokens_of_which_a_part_was_not_put_are_none_and_are_put_again(text_source, tokenizer, bucket, monkeypatch):
    filesystem = remote_filesystem()
    put = filesystem.pipe_file

    def failing(path, data, **how):
        if path.endswith("tokens.bin/000003"):
            raise ConnectionError("gone")
        return put(path, data, **how)

    with monkeypatch.context() as broken:
        broken.setattr(filesystem, "pipe_file", failing)
        with pytest.raises(ConnectionError):
            put_tokens(text_source, tokenizer, 0, f"{bucket}/tokens")
    assert len(sizes_below(f"{bucket}/tokens")) > 3
    with pytest.raises(UserError, match="has no tokens of"):
        tokenize_source(text_source, tokenizer, cache_dir=f"{bucket}/tokens")
    put_tokens(text_source, tokenizer, 0, f"{bucket}/tokens")
    made = tokenize_source(text_source, tokenizer)
    assert equal(made, tokenize_source(text_source, tokenizer, cache_dir=f"{bucket}/tokens"))


@pytest.mark.parametrize("how", ["changed", "shorter", "gone"])
def test_a_damaged_part_is_named(text_source, tokenizer, bucket, how):
    put_tokens(text_source, tokenizer, 0, f"{bucket}/tokens")
    part = f"{only_store(f'{bucket}/tokens')}/tokens.bin/000003"
    data = location(part).read_bytes()
    assert len(data) == 100
    if how == "gone":
        remote_filesystem().rm_file(part)
    else:
        write_bytes(part, data[:-1] + (bytes([data[-1] ^ 1]) if how == "changed" else b""))
    with pytest.raises(UserError, match=rf"{part} is damaged; remove {only_store(f'{bucket}/tokens')} and"):
        tokenize_source(text_source, tokenizer, cache_dir=f"{bucket}/tokens")


def test_a_disk_without_room_for_the_copy_is_told_before_a_part_is_copied(
    text_source, tokenizer, bucket, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    put_tokens(text_source, tokenizer, 0, f"{bucket}/tokens")
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(remote_filesystem(), "cat_file", None)
    with pytest.raises(UserError, match="has no room for tokens; set TMPDIR to a folder that has"):
        tokenize_source(text_source, tokenizer, cache_dir=f"{bucket}/tokens")


def test_what_is_missing_is_told_before_the_first_text_is_read(config, chat_source, tokenizer, bucket, monkeypatch):
    monkeypatch.setattr(tokenized, "_write", None)
    remote = dataclasses.replace(config, cache_dir=f"{bucket}/tokens")
    for broken, words in (
        (dataclasses.replace(remote, heldout=(SourceConfig("nope.jsonl"),)), r"no file matches 'nope\.jsonl'"),
        (
            dataclasses.replace(remote, cache_dir="gs://nobucket/tokens"),
            "there is no bucket for gs://nobucket/tokens",
        ),
    ):
        with pytest.raises(UserError, match=words):
            next(tokenize([(remote, tokenizer), (broken, tokenizer)]))


def test_a_run_looks_for_the_tokens_of_all_sources_before_it_copies_the_first(
    config, tokenizer, bucket, monkeypatch
):
    put_tokens(config.sources[0], tokenizer, 0, f"{bucket}/tokens")
    monkeypatch.setattr(token_store, "fetch", None)
    with pytest.raises(UserError, match=r"has no tokens of .*chats\.jsonl"):
        make_train_iterator(dataclasses.replace(config, cache_dir=f"{bucket}/tokens"), tokenizer)


def test_tokens_are_put_into_a_local_cache_too_and_nowhere_without_one(config, tokenizer, tmp_path, monkeypatch):
    local = dataclasses.replace(config, cache_dir=str(tmp_path / "tokens"))
    assert len(list(tokenize([(local, tokenizer)]))) == 3
    monkeypatch.setattr(tokenized, "_write", None)
    make_train_iterator(local, tokenizer)
    with pytest.raises(UserError, match=r"data\.cache_dir is empty; name the folder"):
        next(tokenize([(config, tokenizer)]))
