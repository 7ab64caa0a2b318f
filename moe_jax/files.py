"""Files on a disk or in a bucket (gs://): whole or not at all, and logs of JSON lines that survive a kill.

A local file is written aside in the same folder and renamed; an object is one put, which is as whole. Nothing can
be appended to an object, and what was replaced is kept and charged for by Cloud Storage, for 7 days where nobody
changed that. So a log in a bucket is a row of objects, of which only the last, small one is put again. Paths go
through etils, whose remote half (fsspec, gcsfs) is imported where the first gs:// path is met.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from moe_jax.errors import UserError

_SECONDS = 30.0  # between two puts of a remote log that nobody flushes
PART_BYTES = 4 << 20  # an object of a remote log that holds as many is put no more, and another begun

AnyPath = str | os.PathLike[str]


def location(path: AnyPath) -> epath.Path:
    """A path that reads and writes alike on a disk (made absolute, `~` too) and in a bucket."""
    text = re.sub("^gs:/+", "gs://", os.fspath(path))  # pathlib folds the two slashes into one
    if not text.startswith("gs://"):
        return epath.Path(os.path.abspath(os.path.expanduser(text)))
    _forget_listings()
    return epath.Path(text)


def is_remote(path: AnyPath) -> bool:
    """Whether the path is in a bucket."""
    return os.fspath(path).startswith("gs:/")


def remote_filesystem() -> Any:
    """The gcsfs file system behind gs://, for what epath cannot say (preconditions)."""
    _forget_listings()
    import fsspec

    return fsspec.filesystem("gcs")


@functools.cache
def _forget_listings() -> None:
    """gcsfs remembers listings for good: a process would never see what its peers write."""
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def sizes_below(path: AnyPath) -> dict[str, int]:
    """{path relative to the folder: bytes} of every file below it; in a bucket, by one listing."""
    root = str(location(path))
    if is_remote(root):
        start = len(root.removeprefix("gs://")) + 1
        return {name[start:]: item["size"] for name, item in remote_filesystem().find(root, detail=True).items()}
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # others may be writing or removing it
                file = os.path.join(folder, name)
                found[os.path.relpath(file, root)] = os.stat(file).st_size
    return found


def folders_in(path: AnyPath) -> list[epath.Path]:
    """The folders in a folder; none where it is missing.

    In a bucket by one listing, since gcsfs's isdir() takes a bucket that does not answer for a folder that is not
    there (gcsfs 2026.10, core.py: `except OSError: return False`).
    """
    folder = location(path)
    if not is_remote(folder):
        return [found for found in folder.iterdir() if found.is_dir()] if folder.is_dir() else []
    try:
        found = remote_filesystem().ls(str(folder), detail=True)
    except FileNotFoundError:
        return []
    names = [item["name"].rstrip("/") for item in found if item["type"] == "directory"]
    whole = str(folder).removeprefix("gs://").rstrip("/")  # which may have an object of its own as a mark
    return [folder / name.rpartition("/")[2] for name in names if name != whole]


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Replace `path` by `data`; the old content stays until the new one is complete.

    Where `path` is a link, what it points to is replaced; a pipe or a device (/dev/stdout) is written to.
    """
    if is_remote(path):
        remote_filesystem().pipe_file(str(location(path)), data)
        return
    path = Path(location(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:  # of a full disk it names no file, else the one aside
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: AnyPath, value: Any) -> None:
    """`value` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def parts(path: AnyPath) -> list[epath.Path]:
    """The files of a log, in order; none where it is missing.

    On a disk that is `path` alone, unless it was copied from a bucket, where `path.0001` and so on follow it.
    """
    first, names = location(path), []
    with contextlib.suppress(FileNotFoundError):
        if is_remote(first):
            found = remote_filesystem().find(str(first.parent), maxdepth=1, prefix=first.name)
            names = [name.rpartition("/")[2] for name in found]
        else:
            names = os.listdir(first.parent)
    part = re.compile(re.escape(first.name) + r"(\.\d{4,})?")
    return sorted((first.parent / name for name in names if part.fullmatch(name)), key=_number)


def _number(part: epath.Path) -> int:
    number = part.suffix[1:]
    return int(number) if number.isdecimal() else 0


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
    """The records of a log of JSON lines, none where it is missing; a last line cut by a kill is left out.

    Raises UserError for a whole line that is no JSON.
    """
    return [
        _record(part, number, line)
        for part in parts(path)
        for number, line in enumerate(_whole_lines(part).splitlines(), 1)
    ]


def cut_lines(path: AnyPath, past: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Remove the last records of a log, up to one that is not `past`; those removed, the last one first.

    It goes from the last file backwards. So a kill in between leaves all records that are kept and the first of the
    others, in order, and the next cut goes on there. Where nothing is past, nothing is written.

    Raises UserError for a damaged line among them, and where the log cannot be written.
    """
    removed = []
    files = parts(path)
    for part in reversed(files):
        lines = _whole_lines(part).splitlines(keepends=True)
        count = len(lines)
        while lines and past(record := _record(part, len(lines), lines[-1])):
            removed.append(record)
            lines.pop()
        try:
            if not lines and part != files[0]:
                _remove(part)
            elif len(lines) < count:
                write_bytes(part, b"".join(lines))
        except Exception as error:  # what gcsfs raises is of many kinds
            raise _unwritable(part, error) from None
        if lines:
            break
    return removed


def _remove(path: epath.Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # deleted by an earlier request whose reply was lost
        if is_remote(path):  # where unlink() takes brackets for a pattern
            remote_filesystem().rm_file(str(path))
        else:
            path.unlink()


def _record(path: epath.Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        raise UserError(f"{path} line {number} is damaged; remove that line") from None


def _whole_lines(path: epath.Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def _unwritable(path: epath.Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"cannot write {path}: {reason}; make room or mend the access, then start again")


class LineLog:
    """JSON lines appended to `path`, opened after its last whole line.

    On a disk each line is written at once. In a bucket the last object is put whole, with the lines that are new:
    by `flush`, and by a thread every half minute, which tries again where a put fails. Once it is long enough, new
    lines begin an object after it, and its own are held no more.
    """

    def __init__(self, path: AnyPath) -> None:
        self._first, self._file = location(path), None
        self._path = self._first  # of the part that is written
        try:
            self._path = [self._first, *parts(path)][-1]
            kept = _whole_lines(self._path)
            if not is_remote(self._path):
                os.makedirs(self._path.parent, exist_ok=True)
                self._file = open(self._path, "ab")  # noqa: SIM115 (close() closes it)
                self._file.truncate(len(kept))
                return
        except Exception as error:  # what gcsfs raises is of many kinds
            raise _unwritable(self._path, error) from None
        self._lines, self._sent, self._sent_bytes = [kept], 1, len(kept)
        self._sending, self._closing = threading.Lock(), threading.Event()
        threading.Thread(target=self._keep_sending, daemon=True).start()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; UserError where a disk refuses it."""
        line = json.dumps(record).encode() + b"\n"
        if self._file is None:
            self._lines.append(line)
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def flush(self) -> None:
        """Return when all that was written can be read by others; UserError where it cannot be sent."""
        try:
            if self._file is None:
                self._send()
            else:
                os.fsync(self._file.fileno())  # a mounted bucket has until then what was there when it was opened
        except Exception as error:
            raise _unwritable(self._path, error) from None

    def close(self) -> None:
        """Flush and write no more."""
        if self._file is not None:
            self._file.close()
            return
        self._closing.set()
        self.flush()

    def _keep_sending(self) -> None:
        while not self._closing.wait(_SECONDS):
            with contextlib.suppress(Exception):  # flush() tells, at the latest before the next checkpoint
                self._send()

    def _send(self) -> None:
        with self._sending:
            if len(self._lines) == self._sent:
                return
            if self._sent_bytes >= PART_BYTES:
                self._path = self._first.parent / f"{self._first.name}.{_number(self._path) + 1:04d}"
                del self._lines[: self._sent]  # in place: another thread may be appending
                self._sent = self._sent_bytes = 0
            count = len(self._lines)
            data = b"".join(self._lines[:count])
            write_bytes(self._path, data)
            self._sent, self._sent_bytes = count, len(data)
