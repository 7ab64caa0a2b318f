"""Files to documents: `.txt`, `.jsonl`, `.parquet`, ArrayRecord and the embedded corpus, one document at a time.

A document is a text or a conversation (a list of messages). Files are streamed, never read whole except a `.txt`,
which is one document; those of a bucket are copied to the disk one at a time, as not every reader knows buckets.
Input that cannot be read ends in a `UserError` that names the file and the mend.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import SourceConfig
from moe_jax.data import corpus
from moe_jax.data.corpus import Message
from moe_jax.errors import UserError
from moe_jax.files import is_remote, remote_filesystem

Document = str | list[Message]
Manifest = dict[str, list]  # path of a file or name of an embedded part -> [bytes, sha256 as hex]

_STDLIB = {
    "stdlib:text": (corpus.stdlib_texts, False),
    "stdlib:heldout": (corpus.stdlib_texts, True),
    "stdlib:chat": (corpus.stdlib_chats, False),
    "stdlib:chat_heldout": (corpus.stdlib_chats, True),
}


@dataclass(frozen=True)
class SourceFile:
    """One file behind a source; another `version` (time of change, or an object's generation), other content."""

    path: str
    size: int
    version: str


def _matches(path: str) -> list[str]:
    """A file of that very name, as downloads like text[1].jsonl have it, or what the pattern finds."""
    return [path] if os.path.exists(path) else glob.glob(path, recursive=True)


def source_files(path: str) -> list[SourceFile]:
    """The files behind `SourceConfig.path`, sorted; raises UserError where there are none."""
    if path in _STDLIB:
        return [_stat(str(file)) for file in corpus.stdlib_files(_STDLIB[path][1])]
    if path.startswith("stdlib:"):
        raise UserError(f"{path!r} is no part of the embedded corpus; use {', '.join(_STDLIB)}")
    found = _list_bucket(path) if is_remote(path) else map(_stat, _matches(os.path.expanduser(path)))
    files = sorted(found, key=lambda file: Path(file.path))
    if not files:
        raise UserError(f"no file matches {path!r}; check the path of the source")
    for file in files:
        if Path(file.path).is_dir():
            raise UserError(f"{file.path} is a folder; name its files with a glob such as '{file.path}/*.jsonl'")
        if Path(file.path).suffix not in _READERS:
            raise UserError(f"{file.path} is of no known kind; use one of {', '.join(_READERS)}")
        if file.size == 0:
            raise UserError(f"{file.path} is empty; remove it or give a narrower path")
    return files


def contents(path: str) -> list[list]:
    """[path, bytes, sha256 or generation] of each file behind a source, alike on all machines with it there."""
    if path in _STDLIB:
        return [[path, *corpus.stdlib_digest(_STDLIB[path][1])]]
    return [
        [file.path, file.size, file.version if is_remote(file.path) else _content(file)]
        for file in source_files(path)
    ]


@functools.cache
def _content(file: SourceFile) -> str:
    try:
        return _digest(Path(file.path))
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror or error}; check it") from None


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _stat(path: str) -> SourceFile:
    try:
        stat = os.stat(path)
    except OSError as error:  # a link to nowhere, or in a circle
        raise UserError(f"cannot read {path}: {error.strerror}; remove it or give a narrower path") from None
    return SourceFile(path, stat.st_size, str(stat.st_mtime_ns))


def _list_bucket(path: str) -> list[SourceFile]:
    try:
        found = remote_filesystem().glob(path, detail=True).values()
    except Exception as error:  # gcsfs raises errors of many kinds
        raise UserError(f"cannot list {path}: {error}; check the bucket and the access to it") from None
    return [
        SourceFile(f"gs://{item['name']}", item["size"], item["generation"])
        for item in found
        if item["type"] == "file"
    ]


def iter_documents(
    source: SourceConfig,
    max_bytes: int = 0,
    manifest: Manifest | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Iterator[Document]:
    """Documents of one source in file order, each of the source's kind; stops once `max_bytes` are reached.

    Texts of nothing but white space are left out. `manifest` is filled with the files as they are opened, and
    `progress` is told how many bytes of the files are read, of how many.

    Raises:
        UserError: unreadable input, a document of the other kind, or a source without documents.
    """
    total = count = 0
    files = source_files(source.path)
    size = 0 if source.path in _STDLIB else sum(file.size for file in files)
    for name, document, read in _all_documents(source.path, files, manifest):
        kind = "text" if isinstance(document, str) else "chat"
        if kind != source.kind:
            raise UserError(f"{name} holds a {kind} where the source says {source.kind}; set its kind to {kind}")
        text = document_text(document)
        if not text.strip():
            continue
        yield document
        count, total = count + 1, total + len(text.encode())
        if size:
            progress(*((min(total, max_bytes), max_bytes) if 0 < max_bytes < size else (read, size)))
        if max_bytes and total >= max_bytes:
            return
    if not count:
        raise UserError(f"{source.path!r} holds no text; give a source with at least one document")


def document_text(document: Document) -> str:
    """The text of a document, messages joined by newlines: what its bytes are counted on."""
    return document if isinstance(document, str) else "\n".join(m["content"] for m in document)


def _all_documents(
    path: str, files: list[SourceFile], manifest: Manifest | None
) -> Iterator[tuple[str, Document, float]]:
    """(its place, the document, bytes of the files read so far) of each."""
    if path in _STDLIB:
        read, heldout = _STDLIB[path]
        if manifest is not None:
            manifest[path] = corpus.stdlib_digest(heldout)
        yield from ((path, document, 0.0) for document in read(heldout))
        return
    before = 0
    for source in files:
        try:
            with _on_disk(source.path) as file:
                if manifest is not None:
                    manifest[source.path] = [source.size, _digest(file)]
                for place, document, share in _READERS[file.suffix](source.path, file):
                    yield place, document, before + share * source.size
        except OSError as error:
            raise UserError(f"cannot read {source.path}: {error.strerror or error}; check it") from None
        before += source.size


@contextlib.contextmanager
def _on_disk(path: str) -> Iterator[Path]:
    """The file itself, or a copy for as long as it is read."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(path).name)
        remote_filesystem().get_file(path, str(copy))
        yield copy


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 at byte {error.start}; convert it, for example with iconv -t utf-8"
        ) from None


def _document(name: str, record: Any) -> Document:
    """A record with `text`, or with `messages` of role and content, checked."""
    if isinstance(record, dict):
        if isinstance(text := record.get("text"), str):
            return _sound(name, text)
        messages = record.get("messages")
        if "messages" in record and not messages:
            raise UserError(f"{name} has no message in its 'messages'; leave it out")
        if isinstance(messages, list) and messages:
            for message in messages:
                parts = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None,)
                if not all(isinstance(part, str) for part in parts):
                    raise UserError(f"{name} has a message without a role and a content that are strings; mend it")
            return [{k: _sound(name, m[k]) for k in ("role", "content")} for m in messages]
    raise UserError(f"{name} has neither a 'text' string nor a 'messages' list; rename its fields to one of them")


def _sound(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no UTF-8 file can hold
        raise UserError(f"{name} spells half a surrogate pair (\\ud8xx); write the whole character") from None
    return text


# A reader gives each document with its place, for errors, and the share of the file that was read by then.
_Read = Iterator[tuple[str, Document, float]]


def _read_txt(name: str, file: Path) -> _Read:
    yield name, _text(name, file.read_bytes()), 1.0


def _read_jsonl(name: str, file: Path) -> _Read:
    size = file.stat().st_size
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{name} line {number}"
            if not line.strip():
                continue
            try:
                record = json.loads(_text(place, line))
            except (ValueError, RecursionError) as error:  # numbers of 4,300 digits, too
                reason = getattr(error, "msg", None) or error
                raise UserError(f"{place} is not JSON ({reason}); write one object a line") from None
            yield place, _document(place, record), lines.tell() / size


def _read_parquet(name: str, file: Path) -> _Read:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        columns = [column for column in ("text", "messages") if column in table.schema_arrow.names][:1]
        if not columns:
            names = ", ".join(table.schema_arrow.names)
            raise UserError(f"{name} has columns {names}; name one 'text' or 'messages'")
        row, rows = 0, table.metadata.num_rows
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield f"{name} row {row}", _document(f"{name} row {row}", record), row / rows
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name} is not a sound Parquet file ({reason}); write it again") from None


def _read_array_record(name: str, file: Path) -> _Read:
    """Records are JSON objects as in `.jsonl`, or else plain UTF-8 text."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    unsound = UserError(f"{name} is not a sound ArrayRecord file; write it again")
    try:
        if not reader.ok():
            raise unsound
        records = reader.num_records()
        for index in range(records):
            place = f"{name} record {index}"
            try:
                raw = reader.read()
            except RuntimeError:
                raise unsound from None
            text = _text(place, raw)
            try:
                record = json.loads(text) if text.lstrip().startswith("{") else None
            except (ValueError, RecursionError):
                record = None
            yield place, text if record is None else _document(place, record), (index + 1) / records
    finally:
        if reader.ok():  # close() of a reader that failed raises an error of its own
            reader.close()


_READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".array_record": _read_array_record,
    ".arrayrecord": _read_array_record,
}
