"""The sections of a .litertlm, found through the container's own schema.

Imports little, because a process that is measured needs it to know what the engine must be given.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from litert_lm_builder import litertlm_core as core
from litert_lm_builder import litertlm_header_schema_py_generated as header

from moe_jax.errors import UserError

_T = TypeVar("_T")


@contextmanager
def intact(name: str | Path) -> Iterator[None]:
    """A block that follows what the bytes of `name` say; a UserError for whatever it raises where they lie."""
    try:
        yield
    except (UserError, OSError, MemoryError):  # of other causes
        raise
    except Exception as error:
        raise UserError(f"{name} is damaged ({error or type(error).__name__}); export it again") from None


def entries(table: Any, kind: str) -> list[Any]:
    """All of a vector of a flatbuffer's table, such as the "Subgraphs" of a model."""
    return [getattr(table, kind)(i) for i in range(getattr(table, f"{kind}Length")())]


def read(path: str | Path, parse: Callable[[dict[int, memoryview], str | Path], _T]) -> _T:
    """What `parse` makes of {kind: bytes of the mapped file} and the path.

    Raises UserError where the file is missing, is no bundle, or `parse` fails in whatever way.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(8) != core.HEADER_MAGIC_BYTES:
                raise UserError(f"{path} is no .litertlm bundle; make one with 'python -m conversion export'")
            raw = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; export a bundle first") from None
    with intact(path):
        (end,) = struct.unpack_from("<Q", raw, core.HEADER_END_LOCATION_BYTE_OFFSET)
        root = header.LiteRTLMMetaData.GetRootAs(bytes(raw[core.HEADER_BEGIN_BYTE_OFFSET : end]), 0)
        parts = entries(root.SectionMetadata(), "Objects")
        if max(part.EndOffset() for part in parts) > len(raw):
            raise ValueError("it is truncated")
        return parse({part.DataType(): raw[part.BeginOffset() : part.EndOffset()] for part in parts}, path)


def tflite(path: str | Path) -> memoryview:
    """The .tflite of a bundle; errors as `read`."""
    return read(path, lambda found, _: found[header.AnySectionDataType.TFLiteModel])
