"""Tokens in a bucket: a folder of files, put there once and copied by every host of a run.

Files are cut into parts, objects of which many travel at a time. `parts.json`, which names them with their digests,
is written last: a folder of the bucket that has it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files import location, remote_filesystem, write_bytes, write_json
from moe_jax.progress import Progress

_PART_BYTES = 32 << 20
_AT_ONCE = 16
_LIST = "parts.json"  # {file: [[bytes, sha256 as hex] of each part]}


def is_complete(store: epath.Path) -> bool:
    """Whether all files of a folder were put there."""
    return (store / _LIST).exists()


def require_place(cache: str) -> None:
    """UserError where nothing could be put in a folder of a bucket, before hours of work for it."""
    try:
        write_bytes(location(cache) / ".begun", b"")
    except FileNotFoundError:
        raise UserError(f"there is no bucket for {cache}; create it, or name another in data.cache_dir") from None


def send(folder: Path, store: epath.Path) -> None:
    """Put the files of a local folder into one of a bucket, in place of what is there."""
    parts: dict[str, list[tuple[int, str]]] = {file.name: [] for file in sorted(folder.iterdir())}
    sizes = {name: (folder / name).stat().st_size for name in parts}

    def put(name: str, at: int) -> tuple[str, int, str]:
        with (folder / name).open("rb") as file:
            file.seek(at)
            data = file.read(_PART_BYTES)
        # gcsfs compares with what the bucket says that it has.
        remote_filesystem().pipe_file(_part(store, name, at), data, consistency="md5")
        return name, len(data), hashlib.sha256(data).hexdigest()

    for name, size, digest in _many(put, sizes, f"putting tokens into {store}"):
        parts[name].append((size, digest))
    write_json(store / _LIST, parts)


def fetch(store: epath.Path, folder: Path) -> None:
    """Copy the files of a complete folder of a bucket into a local one.

    Raises:
        UserError: a part is missing or damaged.
        OSError: the disk has no room for them.
    """
    parts = json.loads((store / _LIST).read_bytes())
    sizes = {name: sum(size for size, _ in found) for name, found in parts.items()}
    for name, size in sizes.items():
        with (folder / name).open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is told before hours of copying

    def get(name: str, at: int) -> tuple[str, int, str]:
        size, digest = parts[name][at // _PART_BYTES]
        try:
            data = remote_filesystem().cat_file(_part(store, name, at))
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{_part(store, name, at)} is damaged; remove {store} and put the tokens there again")
        with (folder / name).open("r+b") as file:
            file.seek(at)
            file.write(data)
        return name, size, digest

    for _ in _many(get, sizes, f"copying tokens from {store}"):
        pass


def _part(store: epath.Path, name: str, at: int) -> str:
    return str(store / name / f"{at // _PART_BYTES:06d}")


def _many(
    move: Callable[[str, int], tuple[str, int, str]], sizes: dict[str, int], what: str
) -> Iterator[tuple[str, int, str]]:
    """What `move` returns for each part of files of these sizes, in their order."""
    places = [(name, at) for name, size in sizes.items() for at in range(0, size, _PART_BYTES)]
    progress, done = Progress(what), 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for found in pool.map(move, *zip(*places, strict=True)):
            done += found[1]
            progress(done, sum(sizes.values()))
            yield found
