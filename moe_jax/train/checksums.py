"""`checksums.json`: the size and SHA-256 of every file of a checkpoint, written last, so that it makes it complete.

It also holds what decides which checkpoints stay (step, final, held-out loss), and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from etils import epath

from moe_jax.files import sizes_below, write_json

FILE = "checksums.json"


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file in it."""


@dataclass(frozen=True)
class Record:
    """What `checksums.json` holds: {file: (bytes, SHA-256)} and the marks of the checkpoint."""

    files: dict[str, tuple[int, str]]
    step: int
    final: bool
    heldout_loss: float | None
    time: float  # seconds since 1970, when it was completed

    @property
    def bytes(self) -> int:
        """The size of all files."""
        return sum(size for size, _ in self.files.values())


def file_sizes(path: epath.Path) -> dict[str, int]:
    """{name within the checkpoint: bytes} of every file but the record."""
    return {name: size for name, size in sizes_below(path).items() if name != FILE}


def share(sizes: dict[str, int], index: int, count: int) -> list[str]:
    """The names of part `index` of `count` parts of about as many bytes each; together they are all names."""
    loads, parts = [0] * count, [list[str]() for _ in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[name]
        parts[lightest].append(name)
    return parts[index]


def digest(file: Path | epath.Path) -> str:
    """SHA-256 of a file, read in blocks; other threads run meanwhile."""
    with file.open("rb") as stream:
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


def write_record(path: epath.Path, record: Record) -> None:
    """Make the checkpoint in `path` complete."""
    content = asdict(record)
    write_json(path / FILE, content | {"sha256": _own(content)})


def read_record(path: epath.Path) -> Record:
    """The record of a complete checkpoint.

    Raises:
        Damaged: it is cut or altered.
    """
    stored = (path / FILE).read_bytes()  # not below: gcsfs raises ValueErrors, too
    try:
        content = json.loads(stored)
        if content.pop("sha256") != _own(content):
            raise ValueError
        files = {name: (size, sha) for name, (size, sha) in content.pop("files").items()}
        return Record(files, **content)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{FILE} is not what was written") from None


def _own(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def wrong_size(path: epath.Path, record: Record) -> str | None:
    """The first file that is missing or of another size, as a sentence; reads no file."""
    found = file_sizes(path)
    return next(filter(None, (_of_size(name, found.get(name), record) for name in record.files)), None)


def wrong_content(
    path: epath.Path, record: Record, names: Iterable[str], threads: int
) -> Iterator[tuple[str, str | None]]:
    """(name, what is wrong with that file or None) for each of `names`, in order, read by so many threads."""

    def check(name: str) -> str | None:
        file = path / name
        try:
            reason = _of_size(name, file.stat().length, record)
            if reason is None and digest(file) != record.files[name][1]:
                reason = f"{name} is not what was written (checksum)"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):  # a file where a folder was, or so
            reason = _of_size(name, None, record)
        return reason

    names = list(names)
    with ThreadPoolExecutor(threads) as pool:
        yield from zip(names, pool.map(check, names), strict=True)


def _of_size(name: str, found: int | None, record: Record) -> str | None:
    size = record.files[name][0]
    if found == size:
        return None
    return f"{name} is missing" if found is None else f"{name} has {found} bytes instead of {size}"
