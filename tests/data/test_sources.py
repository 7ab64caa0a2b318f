"""The user's own files are read as they are, or refused with a sentence that helps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_jax.config import SourceConfig
from moe_jax.data.sources import iter_documents, source_files
from moe_jax.errors import UserError
from tests.data.helpers import write, write_records

TEXTS = ["first text", "Ünïcödé 漢字\r\nline", '{"not": "a record"', "last"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "array_record"])
def test_texts_come_back_from_every_kind_of_file(tmp_path, kind):
    path = write(tmp_path, kind, "text", TEXTS)
    assert list(iter_documents(SourceConfig(path))) == TEXTS


@pytest.mark.parametrize(("max_bytes", "count"), [(0, 3), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_source_ends_with_the_document_that_reaches_its_bytes(tmp_path, max_bytes, count):
    texts = ["aaaa", "bbbb", "cccc"]
    path = write(tmp_path, "jsonl", "text", texts)
    assert list(iter_documents(SourceConfig(path), max_bytes)) == texts[:count]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "array_record"])
def test_what_was_read_of_a_source_goes_up_to_the_whole_of_its_files(tmp_path, kind):
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        path = Path(write(tmp_path / number, kind, "text", TEXTS))
    pattern = str(tmp_path / "*" / path.name)
    whole = sum(file.size for file in source_files(pattern))
    told: list[tuple[float, float]] = []
    list(iter_documents(SourceConfig(pattern), progress=lambda read, size: told.append((read, size))))
    done = [read for read, _ in told]
    assert done == sorted(set(done)) and 0 < done[0] < whole / 2 and done[-1] == whole
    assert {total for _, total in told} == {whole} and len(told) == 2 * len(TEXTS)

    told.clear()
    list(iter_documents(SourceConfig(pattern), 5, progress=lambda read, size: told.append((read, size))))
    assert told[-1] == (5, 5)  # as much as was asked for


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_conversations_come_back_from_every_kind_of_file(tmp_path, kind):
    path = write(tmp_path, kind, "messages", [CHAT, CHAT * 2])
    assert list(iter_documents(SourceConfig(path, kind="chat"))) == [CHAT, CHAT * 2]


def test_plain_array_records_are_texts(tmp_path):
    path = tmp_path / "plain.array_record"
    write_records(path, [text.encode() for text in TEXTS])
    assert list(iter_documents(SourceConfig(str(path)))) == TEXTS


def refusal(tmp_path: Path, name: str, content: bytes, kind: str = "text") -> str:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(iter_documents(SourceConfig(str(path), kind=kind)))
    message = str(caught.value)
    assert name in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("a.txt", b"", "text", "is empty"),
        ("b.txt", b" \n\t", "text", "holds no text"),
        ("c.txt", b"good \xff bad", "text", "not UTF-8 at byte 5; convert"),
        ("d.txt", b"words", "chat", "holds a text where the source says chat"),
        ("e.csv", b"a,b", "text", "of no known kind; use one of .txt"),
        ("f.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "text", "line 2 is not UTF-8"),
        ("g.jsonl", b'{"text": "a"}\nwords', "text", "line 2 is not JSON"),
        ("h.jsonl", b'{"words": "a"}', "text", "line 1 has neither"),
        ("i.jsonl", b"[1]", "text", "line 1 has neither"),
        ("j.jsonl", b'{"messages": [{"role": "user"}]}', "chat", "without a role and a content"),
        ("k.jsonl", b'{"messages": ["hi"]}', "chat", "without a role and a content"),
        ("l.jsonl", b'{"messages": []}', "chat", "has no message in its 'messages'; leave it out"),
        ("m.jsonl", b'{"text": "\\ud800"}', "text", "half a surrogate pair"),
        ("n.jsonl", json.dumps({"messages": CHAT}).encode(), "text", "set its kind to chat"),
        ("q.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "text", "line 1 is not JSON"),
        ("r.jsonl", b"[" * 100_000, "text", "line 1 is not JSON"),
        ("o.parquet", b"no parquet at all", "text", "not a sound Parquet file"),
        ("p.array_record", b"no array record", "text", "not a sound ArrayRecord"),
    ],
)
def test_bad_input_is_named_with_its_mend(tmp_path, name, content, kind, words):
    assert words in refusal(tmp_path, name, content, kind)


def test_a_mark_in_front_of_a_file_is_no_part_of_its_text(tmp_path):
    for name, content in (("a.txt", b"words"), ("b.jsonl", b'{"text": "words"}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
        assert list(iter_documents(SourceConfig(str(tmp_path / name)))) == ["words"]


@pytest.mark.parametrize("target", ["nowhere.txt", "link.txt"])
def test_a_link_to_nowhere_or_in_a_circle_is_named(tmp_path, target):
    (tmp_path / "link.txt").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=r"cannot read .*link\.txt: .*; remove it or give a narrower path"):
        list(iter_documents(SourceConfig(f"{tmp_path}/*.txt")))


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("words")
    assert list(iter_documents(SourceConfig("~/a.txt"))) == ["words"]


def test_truncated_binary_files_are_refused(tmp_path):
    for kind, words in (("parquet", "not a sound Parquet"), ("array_record", "not a sound ArrayRecord")):
        whole = Path(write(tmp_path, kind, "text", ["some text"] * 2000)).read_bytes()
        assert words in refusal(tmp_path, f"cut.{kind}", whole[: len(whole) // 2])


def test_damage_inside_a_binary_file_is_refused(tmp_path):
    texts = [f"text {i * i}" for i in range(5000)]
    for kind in ("parquet", "array_record"):
        content = bytearray(Path(write(tmp_path, kind, "text", texts)).read_bytes())
        content[100:3000] = bytes(2900)
        assert f"not a sound {kind.title().replace('_', '')}" in refusal(tmp_path, f"holed.{kind}", bytes(content))


def test_a_parquet_file_without_a_text_column_names_those_it_has(tmp_path):
    content = Path(write(tmp_path, "parquet", "body", ["x"])).read_bytes()
    assert "has columns body; name one 'text'" in refusal(tmp_path, "other.parquet", content)


@pytest.mark.parametrize(
    ("path", "words"), [("none*.txt", "no file matches"), ("stdlib:txt", "use stdlib:text"), (".", "is a folder")]
)
def test_a_wrong_path_is_refused(path, words):
    with pytest.raises(UserError, match=words):
        list(iter_documents(SourceConfig(path)))


def test_a_file_that_is_called_like_a_pattern_is_itself(tmp_path):
    (tmp_path / "text[1].txt").write_text("one")
    (tmp_path / "text1.txt").write_text("other")
    assert list(iter_documents(SourceConfig(str(tmp_path / "text[1].txt")))) == ["one"]
    (tmp_path / "text[1].txt").unlink()
    assert list(iter_documents(SourceConfig(str(tmp_path / "text[1].txt")))) == ["other"]
