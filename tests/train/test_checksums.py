"""The record of a checkpoint's files: it names what changed, and nothing changes unseen."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.files import location
from moe_jax.train.checksums import (
    FILE,
    Damaged,
    Record,
    digest,
    file_sizes,
    read_record,
    share,
    write_record,
    wrong_content,
    wrong_size,
)

CONTENTS = {"a": b"first" * 1000, "d/b": b"second", "d/e/empty": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    path = location(tmp_path)
    files = {name: (size, digest(path / name)) for name, size in file_sizes(path).items()}
    write_record(path, Record(files, 7, True, 1.5, 12.0))
    return path


def wrong(folder, threads=2):
    record = read_record(folder)
    return dict(wrong_content(folder, record, sorted(record.files), threads))


def test_the_record_holds_every_file_and_is_read_as_it_was_written(folder):
    record = read_record(folder)
    assert record.files == {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in CONTENTS.items()}
    assert (record.step, record.final, record.heldout_loss, record.time) == (7, True, 1.5, 12.0)
    assert record.bytes == 5006 and wrong_size(folder, record) is None
    assert wrong(folder) == dict.fromkeys(CONTENTS)


@pytest.mark.parametrize(
    "damage, reason, by_size",
    [
        (lambda path: path.unlink(), "d/b is missing", True),
        (lambda path: path.write_bytes(b"sec"), "d/b has 3 bytes instead of 6", True),
        (lambda path: path.write_bytes(b"sECond"), "d/b is not what was written (checksum)", False),
    ],
)
def test_a_wrong_file_is_named(folder, damage, reason, by_size):
    damage(folder / "d/b")
    assert wrong(folder) == {"a": None, "d/b": reason, "d/e/empty": None}
    assert wrong_size(folder, read_record(folder)) == (reason if by_size else None)


@given(st.data())
def test_any_altered_byte_of_the_record_is_seen(tmp_path_factory, data):
    path = location(tmp_path_factory.mktemp("record"))
    write_record(path, Record({"a": (1, "00")}, 7, False, 0.25, 3.0))
    content = bytearray((path / FILE).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    (path / FILE).write_bytes(bytes(content))
    try:
        assert read_record(path) == Record({"a": (1, "00")}, 7, False, 0.25, 3.0)  # white space for white space
    except Damaged as damage:
        assert str(damage) == "checksums.json is not what was written"


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"files": {}}'])
def test_a_cut_record_is_damage(folder, content):
    (folder / FILE).write_text(content)
    with pytest.raises(Damaged):
        read_record(folder)


def test_the_record_is_plain_json(folder):
    stored = json.loads((folder / FILE).read_text())
    assert set(stored) == {"files", "step", "final", "heldout_loss", "time", "sha256"}
    assert stored["files"]["d/b"] == [6, hashlib.sha256(b"second").hexdigest()]


@given(st.dictionaries(st.text("abc/", min_size=1), st.integers(0, 1000)), st.integers(1, 5))
def test_shares_are_all_files_once_and_about_equal(sizes, count):
    shares = [share(sizes, index, count) for index in range(count)]
    assert sorted(name for part in shares for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)
