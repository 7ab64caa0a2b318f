"""The sections of a .litertlm, found through the container's own schema.

Imports little, because a process that is measured needs it to know what the engine must be given.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from litert_lm_builder import litertlm_core as core
from litert_lm_builder import litertlm_header_schema_py_generated as header

from moe_jax.errors import UserError

_T = TypeVar("_T")


def read(path: str | Path, parse: Callable[[dict[int, memoryview], str | Path], _T]) -> _T:
    """What `parse` makes of {kind: bytes of the mapped file} and the path.

    Raises UserError where the file is missing, is no bundle, or `parse` fails in whatever way.
    """
    found = {}
    try:
        with Path(path).open("rb") as file:
            raw = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if bytes(raw[:8]) != core.HEADER_MAGIC_BYTES:
            raise ValueError("it does not start with LITERTLM")
        (end,) = struct.unpack_from("<Q", raw, core.HEADER_END_LOCATION_BYTE_OFFSET)
        root = header.LiteRTLMMetaData.GetRootAs(bytes(raw[core.HEADER_BEGIN_BYTE_OFFSET : end]), 0)
        listed: Any = root.SectionMetadata()
        for i in range(listed.ObjectsLength()):
            part = listed.Objects(i)
            if part.EndOffset() > len(raw):
                raise ValueError("it is truncated")
            found[part.DataType()] = raw[part.BeginOffset() : part.EndOffset()]
        return parse(found, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; export a bundle first") from None
    except Exception as error:  # whatever parsers raise on bytes that are something else
        raise UserError(
            f"{path} is no whole .litertlm bundle of a language model ({error}); export it again"
        ) from None


def tflite(path: str | Path) -> memoryview:
    """The .tflite of a bundle; errors as `read`."""
    return read(path, lambda found, _: found[header.AnySectionDataType.TFLiteModel])
