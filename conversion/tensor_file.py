"""One safetensors file: its header read and made, its tensors read one at a time.

The header is parsed here, and every byte of a file is put down to a tensor, so that whatever is damaged has a name.
The errors of the package safetensors name no tensor, and it writes only what is in memory at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.errors import UserError

BF16, F16, F32, U8 = "BF16", "F16", "F32", "U8"
DTYPES = {
    BF16: np.dtype(ml_dtypes.bfloat16),
    F16: np.dtype(np.float16),
    F32: np.dtype(np.float32),
    U8: np.dtype(np.uint8),
}
MEND = "download or write it again"


@dataclass(frozen=True)
class Entry:
    """A tensor and where it lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file

    def read(self) -> np.ndarray:
        """The tensor as stored."""
        # Read, not mapped: what was read of a mapped file counts as memory of the process.
        flat = np.fromfile(self.file, DTYPES[self.dtype], math.prod(self.shape), offset=self.start)
        return flat.reshape(self.shape)


def make_header(
    described: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], align: int = 8
) -> tuple[bytes, dict[str, int]]:
    """What stands before the tensors of `described` ({name: (type, shape)}), which begin at a multiple of `align`.

    Also {name: byte of the file where the tensor begins}.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    places, end = {}, 0
    for name, (dtype, shape) in described.items():
        places[name], end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % align)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + at for name, at in places.items()}


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises UserError for a file that is missing or truncated, or whose header does not add up.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if length >= size:
                raise ValueError("it is longer than the file")
            fields = json.loads(raw.read(length))
        if not isinstance(fields, dict):
            raise ValueError("it is no table of tensors")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; name what holds the weights") from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise UserError(f"the header of {file} is damaged ({error}); {MEND}") from None
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"the header of {file} is damaged at __metadata__; {MEND}")
    entries, end = {}, 0
    for name, field in fields.items():
        entries[name] = _entry(file, name, field, 8 + length)
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != 8 + length + end:
            raise UserError(f"{name} does not start where the tensor before it ends in {file}; {MEND}")
        end += math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if 8 + length + end > size:
            raise UserError(f"{file} is truncated: {name} and what follows it is not all there; {MEND}")
    if 8 + length + end != size:
        raise UserError(f"{file} has {size - 8 - length - end} bytes that belong to no tensor; {MEND}")
    return entries, metadata


def _entry(file: Path, name: str, field: Any, base: int) -> Entry:
    try:
        dtype, shape = field["dtype"], tuple(field["shape"])
        start, stop = field["data_offsets"]
        if dtype not in DTYPES:
            raise ValueError(f"its type is {dtype}")
        if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
            raise ValueError(f"its shape {list(shape)} or place {[start, stop]} is not of whole numbers")
        if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{dtype} {list(shape)} does not fill its {stop - start} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the header of {file} is damaged at {name} ({error}); {MEND}") from None
    return Entry(file, dtype, shape, base + start)
