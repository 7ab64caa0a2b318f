"""Where files may be written, told before any work is done; and large ones written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_jax.errors import UserError
from moe_jax.files import is_remote


def free(path: str | Path, ending: str, overwrite: bool) -> Path:
    """The path of a file to write; UserError if it has another ending or is taken, unless `overwrite`."""
    path = on_disk(path)
    if path.suffix != ending:
        raise UserError(f"the output is {path.name!r}; end its name in {ending}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another output or pass --overwrite")
    return path


def on_disk(path: str | Path) -> Path:
    """The path, unless it is in a bucket, where nothing here can write."""
    if is_remote(path):
        raise UserError(f"{path} is in a bucket; name a place on a disk and copy from there")
    return Path(path).expanduser()


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """A UserError that names the output, whatever file of it the system refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {output}: {reason}; make room or choose another place") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end; a failure leaves `path` as it was."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
