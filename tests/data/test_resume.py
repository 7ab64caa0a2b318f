"""A stream goes on where it stopped, past the batches that it was told to skip, and on no other data."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data.pipeline import TrainIterator, make_train_iterator
from moe_jax.data.tokenized import tokenize_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from tests.data.helpers import same, sentence, take

SKIPPED = (0, 7, 8, 21)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of texts."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "abc":
        rows = [{"text": sentence(ord(name) + i, 3 + i % 30)} for i in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def files(folder: Path, config: DataConfig) -> DataConfig:
    return dataclasses.replace(config, sources=(SourceConfig(f"{folder}/*.jsonl"),))


def resumed(iterator: TrainIterator, config: DataConfig, tokenizer: Tokenizer, **processes: int) -> TrainIterator:
    """A new stream at the state of another, through JSON as in a checkpoint."""
    new = make_train_iterator(config, tokenizer, **processes)
    assert new.set_state(json.loads(json.dumps(iterator.get_state()))) == []
    return new


def test_skipped_batches_are_passed_over_and_the_others_are_as_before(config, tokenizer):
    whole = take(make_train_iterator(config, tokenizer), 40)
    iterator = make_train_iterator(config, tokenizer)
    for number in SKIPPED:
        iterator.skip(number)
    numbers, batches = [], []
    for _ in range(40 - len(SKIPPED)):
        numbers.append(iterator.batch_number)
        batches.append(next(iterator))
    assert numbers == [number for number in range(40) if number not in SKIPPED]
    assert same(batches, [whole[number] for number in numbers])


def test_skips_hold_over_two_resumes_wherever_the_stream_was_cut(config, tokenizer):
    kept = [b for n, b in enumerate(take(make_train_iterator(config, tokenizer), 30)) if n not in SKIPPED]
    for cuts in ((3, 4), (6, 1), (7, 12), (5, 0)):
        iterator, seen = make_train_iterator(config, tokenizer), []
        for number in SKIPPED:
            iterator.skip(number)
        for count in cuts:
            seen += take(iterator, count)
            iterator = resumed(iterator, config, tokenizer)
        assert same(seen + take(iterator, len(kept) - len(seen)), kept)


def test_a_stream_set_back_remembers_what_was_skipped_since(config, tokenizer):
    iterator = make_train_iterator(config, tokenizer)
    state, whole = iterator.get_state(), take(iterator, 6)
    for number in (2, 4):
        iterator.set_state(state)
        iterator.skip(number)
    assert same(take(iterator, 4), [whole[n] for n in (0, 1, 3, 5)])
    assert iterator.get_state()["skipped"] == [2, 4] and iterator.batch_number == 6


def test_the_number_of_processes_may_change_between_skips(config, tokenizer):
    kept = [b for n, b in enumerate(take(make_train_iterator(config, tokenizer), 30)) if n not in SKIPPED]
    iterators, seen = [make_train_iterator(config, tokenizer)], []
    for number in SKIPPED:
        iterators[0].skip(number)
    for count in (2, 4, 1):
        states = [iterator.get_state() for iterator in iterators]
        assert all(state == states[0] for state in states)
        iterators = [
            resumed(iterators[0], config, tokenizer, process_index=p, process_count=count) for p in range(count)
        ]
        for pieces in zip(*(take(iterator, 8) for iterator in iterators), strict=True):
            seen.append({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]})
    assert same(seen, kept[:24])


def drop(folder: Path) -> None:
    (folder / "b.jsonl").unlink()


def shorten(folder: Path) -> None:
    lines = (folder / "b.jsonl").read_text().splitlines(keepends=True)
    (folder / "b.jsonl").write_text("".join(lines[:-1]))


def lengthen(folder: Path) -> None:
    with (folder / "b.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')


def flip(folder: Path) -> None:
    data = (folder / "b.jsonl").read_bytes()
    (folder / "b.jsonl").write_bytes(data.replace(b"quick", b"quack", 1))


def add(folder: Path) -> None:
    (folder / "d.jsonl").write_text('{"text": "a fourth file"}\n')


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (drop, "b.jsonl is missing"),
        (shorten, "b.jsonl is shorter ("),
        (lengthen, "b.jsonl is longer ("),
        (flip, "b.jsonl has other content"),
        (add, "d.jsonl is new"),
    ],
)
def test_a_changed_file_is_named_and_refused_unless_told_to_go_on(
    files, tokenizer, folder, tmp_path, cached, fault, words
):
    files = dataclasses.replace(files, cache_dir=str(tmp_path / "cache") if cached else "")
    iterator = make_train_iterator(files, tokenizer)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    fault(folder)
    changed = make_train_iterator(files, tokenizer)
    with pytest.raises(UserError) as refused:
        changed.set_state(state)
    assert f"the data changed since the checkpoint: {folder}/{words}" in str(refused.value)
    (sentence,) = changed.set_state(state, allow_changed=True)
    assert sentence.startswith(f"{folder}/{words}") and changed.batch_number == 3
    next(changed)


def test_many_changed_files_are_counted(files, tokenizer, folder):
    state = make_train_iterator(files, tokenizer).get_state()
    for number in range(9):
        (folder / f"new{number}.txt").write_text("words")
    mixed = dataclasses.replace(files, sources=(SourceConfig(f"{folder}/*"),))
    with pytest.raises(UserError, match=r"new3\.txt is new; and 5 more; restore it"):
        make_train_iterator(mixed, tokenizer).set_state(state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 32}, "data.seq_len was 64, is 32"),
        ({"global_batch_size": 8}, "data.global_batch_size was 4, is 8"),
        ({"seed": 9}, "data.seed was 3, is 9"),
    ],
)
def test_a_changed_batch_is_told_apart_and_never_allowed(config, tokenizer, change, words):
    state = make_train_iterator(config, tokenizer).get_state()
    changed = make_train_iterator(dataclasses.replace(config, **change), tokenizer)
    for allowed in (False, True):
        with pytest.raises(UserError, match=f"the batches changed since the checkpoint: {words}; restore that"):
            changed.set_state(state, allow_changed=allowed)


def test_another_tokenizer_is_told_apart(config, tokenizer):
    state = make_train_iterator(config, tokenizer).get_state()
    other = Tokenizer.train([sentence(i, 40) for i in range(20)], 290)
    with pytest.raises(UserError, match=r"the tokenizer was [0-9a-f]{12}, is [0-9a-f]{12}; restore"):
        make_train_iterator(config, other).set_state(state, allow_changed=True)


def test_another_mixture_is_told_apart_and_may_be_allowed(config, tokenizer):
    state = make_train_iterator(config, tokenizer).get_state()
    lighter = (dataclasses.replace(config.sources[0], weight=2.0), *config.sources[1:])
    for change, words in (
        ({"sources": lighter}, r"data.sources was .*\(text, weight 3\).*, is .*\(text, weight 2\).*weight 1\); "),
        ({"sources": config.sources[:1]}, r"data.sources was .*chats.jsonl \(chat, weight 1\), is .*weight 3\); "),
        ({"max_bytes": 900}, "data.max_bytes was 0, is 900"),
    ):
        changed = make_train_iterator(dataclasses.replace(config, **change), tokenizer)
        with pytest.raises(UserError, match=f"the data changed since the checkpoint: {words}"):
            changed.set_state(state)
        assert changed.set_state(state, allow_changed=True)


def test_the_same_files_elsewhere_are_the_same_data(files, tokenizer, folder, tmp_path):
    iterator = make_train_iterator(files, tokenizer)
    folder.rename(tmp_path / "moved")
    resumed(iterator, dataclasses.replace(files, sources=(SourceConfig(f"{tmp_path}/moved/*"),)), tokenizer)


def test_the_embedded_corpus_has_one_entry(config, tokenizer):
    embedded = dataclasses.replace(config, sources=(SourceConfig("stdlib:text"),), max_bytes=20_000)
    manifest = make_train_iterator(embedded, tokenizer).get_state()["files"]
    assert list(manifest) == ["stdlib:text"] and manifest["stdlib:text"][0] > 1_000_000


def test_a_restart_reads_the_files_no_second_time(files, tokenizer, folder, tmp_path):
    files = dataclasses.replace(files, cache_dir=str(tmp_path / "cache"))
    iterator = make_train_iterator(files, tokenizer)
    for path in folder.iterdir():
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))  # not what it was, had it been read
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert same(take(resumed(iterator, files, tokenizer), 5), take(iterator, 5))


def test_processes_that_tokenise_one_source_at_one_time_do_it_once(files, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    script = (
        "import sys; from moe_jax.config import SourceConfig; from moe_jax.data import tokenized as t;"
        "from moe_jax.data.tokenizer import Tokenizer;"
        "write = t._write; t._write = lambda *a: (print('wrote'), write(*a));"
        "s = t.tokenize_source(SourceConfig(sys.argv[1]), Tokenizer.load(sys.argv[2]), 0, sys.argv[3]);"
        "print(s.fingerprint)"
    )
    command = [sys.executable, "-c", script, files.sources[0].path, str(tmp_path / "t.json"), f"{tmp_path}/cache"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [child.communicate()[0].split() for child in children]
    expected = tokenize_source(files.sources[0], tokenizer).fingerprint
    assert sorted(said, key=len) == [[expected], [expected], ["wrote", expected]]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_tokens_half_written_by_a_killed_process_are_written_again(files, tokenizer, tmp_path):
    cache = str(tmp_path / "cache")
    whole = tokenize_source(files.sources[0], tokenizer, cache_dir=cache)
    (made,) = Path(cache).iterdir()
    half = made.rename(f"{made}.part")
    (half / "meta.json").unlink()
    assert tokenize_source(files.sources[0], tokenizer, cache_dir=cache).fingerprint == whole.fingerprint
    assert list(Path(cache).iterdir()) == [made]
