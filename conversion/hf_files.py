"""safetensors folders as Hugging Face lays them out: one file or shards with an index, read and written in pieces.

The header is parsed here, and every byte of a file is put down to a tensor, so that whatever is damaged has a name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion.keymap import listed
from moe_jax.errors import UserError
from moe_jax.files import write_json

BF16, F16, F32, U8 = "BF16", "F16", "F32", "U8"
DTYPES = {
    BF16: np.dtype(ml_dtypes.bfloat16),
    F16: np.dtype(np.float16),
    F32: np.dtype(np.float32),
    U8: np.dtype(np.uint8),
}
_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the most in one file
_MEND = "download or write it again"


@dataclass(frozen=True)
class Entry:
    """A tensor and where it lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # byte in the file


class Folder:
    """The tensors of a folder, read one at a time.

    Raises UserError for a file that is missing, truncated, or whose header does not add up.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            for name, entry in _header(file).items():
                if name in self.entries:
                    raise UserError(f"{name} is in {file} and in {self.entries[name].file}; {_MEND}")
                self.entries[name] = entry

    def require(self, wanted: dict[str, tuple[Sequence[str], tuple[int, ...]]]) -> None:
        """UserError unless the tensors are just these, each of one of the types and of the shape."""
        if missing := [name for name in wanted if name not in self.entries]:
            raise UserError(f"{self.folder} misses {listed(missing)}; it is not whole or not of its config.json")
        if extra := [name for name in self.entries if name not in wanted]:
            raise UserError(f"{self.folder} holds unknown {listed(extra)}; it is not of its config.json")
        for name, (dtypes, shape) in wanted.items():
            entry = self.entries[name]
            if entry.dtype not in dtypes or entry.shape != shape:
                raise UserError(
                    f"{name} in {entry.file} is {entry.dtype} {list(entry.shape)} where config.json gives "
                    f"{' or '.join(dtypes)} {list(shape)}; {_MEND}"
                )

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored; UserError for floats that are not finite."""
        entry = self.entries[name]
        # Read, not mapped: what was read of a mapped file counts as memory of the process.
        flat = np.fromfile(entry.file, DTYPES[entry.dtype], math.prod(entry.shape), offset=entry.start)
        if entry.dtype != U8 and not np.isfinite(flat).all():
            raise UserError(f"{name} in {entry.file} holds values that are not finite; {_MEND}")
        return flat.reshape(entry.shape)

    def _files(self) -> list[Path]:
        index = self.folder / _INDEX
        if not index.is_file():
            return [self.folder / _ONE]
        try:
            places = json.loads(index.read_text())["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            raise UserError(f"{index} cannot be read, or is no index of tensors; {_MEND}") from None
        for name, file in places:
            if not isinstance(file, str):
                raise UserError(f"{index} puts {name} into {file!r}, which is no file; {_MEND}")
        return [self.folder / file for file in sorted({file for _, file in places})]


def _header(file: Path) -> dict[str, Entry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            fields = json.loads(raw.read(length)) if length < size else None
        if not isinstance(fields, dict):
            raise ValueError("its header is longer than the file")
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; name a folder with config.json and weights"
        ) from None
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise UserError(f"the header of {file} is damaged ({error}); {_MEND}") from None
    fields.pop("__metadata__", None)
    entries, end = {}, 0
    for name, field in fields.items():
        entries[name] = _entry(file, name, field, 8 + length)
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != 8 + length + end:
            raise UserError(f"{name} does not start where the tensor before it ends in {file}; {_MEND}")
        end += math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if 8 + length + end > size:
            raise UserError(f"{file} is truncated: {name} and what follows it is not all there; {_MEND}")
    if 8 + length + end != size:
        raise UserError(f"{file} has {size - 8 - length - end} bytes that belong to no tensor; {_MEND}")
    return entries


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
        raise UserError(f"the header of {file} is damaged at {name} ({error}); {_MEND}") from None
    return Entry(file, dtype, shape, base + start)


def write(folder: Path, described: dict[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Write `arrays`, which come one at a time in the order of `described` ({name: (type, shape)}), in shards."""
    shards: list[list[str]] = [[]]
    sizes = {n: math.prod(shape) * DTYPES[dtype].itemsize for n, (dtype, shape) in described.items()}
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    count, coming, place = len(shards), iter(arrays), {}
    for number, names in enumerate(shards, 1):
        file = _ONE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        place |= dict.fromkeys(names, file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads nothing without it
        end = 0
        for name in names:
            start, end = end, end + sizes[name]
            dtype, shape = described[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as raw:
            raw.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = np.ascontiguousarray(next(coming))
                dtype, shape = described[name]
                assert (array.dtype, array.shape) == (DTYPES[dtype], shape), (
                    f"{name} is {array.dtype} {array.shape}"
                )
                raw.write(array.reshape(-1).view(np.uint8).data)
    if count > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place})
