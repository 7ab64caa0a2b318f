"""Files on a disk or in a bucket (gs://): whole or not at all, and logs of JSON lines that survive a kill.

A local file is written aside in the same folder and renamed; an object is one put, which is as whole. Paths go
through etils, whose remote half (fsspec, gcsfs) is imported where the first gs:// path is met.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

from etils import epath

from moe_jax.errors import UserError

_SECONDS = 30.0  # between two puts of a remote log that nobody flushes

AnyPath = str | os.PathLike[str]


def location(path: AnyPath) -> epath.Path:
    """A path that reads and writes alike on a disk (made absolute) and in a bucket."""
    text = re.sub("^gs:/+", "gs://", os.fspath(path))  # pathlib folds the two slashes into one
    if not text.startswith("gs://"):
        return epath.Path(os.path.abspath(text))
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


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Replace `path` by `data`; the old content stays until the new one is complete."""
    if is_remote(path):
        remote_filesystem().pipe_file(str(location(path)), data)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: AnyPath, value: Any) -> None:
    """`value` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_lines(path: AnyPath) -> list[dict[str, Any]]:
    """The records of a file of JSON lines, none where it is missing; a last line cut by a kill is left out.

    Raises UserError for a whole line that is no JSON.
    """
    records = []
    for number, line in enumerate(_whole_lines(location(path)).splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path} line {number} is damaged; remove that line") from None
    return records


def _whole_lines(path: epath.Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


class LineLog:
    """JSON lines appended to `path`, opened after its last whole line.

    On a disk each line is written at once. In a bucket, where nothing can be appended to, the object is put whole:
    by `flush`, and by a thread every half minute, which tries again where a put fails.
    """

    def __init__(self, path: AnyPath) -> None:
        self._path, self._file = location(path), None
        try:
            kept = _whole_lines(self._path)
            if not is_remote(self._path):
                os.makedirs(self._path.parent, exist_ok=True)
                self._file = open(self._path, "ab")  # noqa: SIM115 (close() closes it)
                self._file.truncate(len(kept))
                return
        except Exception as error:  # what gcsfs raises is of many kinds
            raise self._unwritable(error) from None
        self._lines, self._sent = [kept], 1
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
            raise self._unwritable(error) from None

    def flush(self) -> None:
        """Return when all that was written can be read by others; UserError where it cannot be sent."""
        if self._file is not None:
            return
        try:
            self._send()
        except Exception as error:
            raise self._unwritable(error) from None

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
            count = len(self._lines)
            if count > self._sent:
                write_bytes(self._path, b"".join(self._lines[:count]))
                self._sent = count

    def _unwritable(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return UserError(f"cannot write {self._path}: {reason}; make room or mend the access, then start again")
