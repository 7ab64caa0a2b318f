"""safetensors folders as Hugging Face lays them out, one file or shards with an index, never whole in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from conversion.keymap import listed
from conversion.tensor_file import DTYPES, MEND, U8, Entry, make_header, read_header
from moe_jax.errors import UserError
from moe_jax.files import write_json

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the most in one file


class Folder:
    """The tensors of a folder, read one at a time.

    Raises UserError for a file that is missing, truncated, or whose header does not add up.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        for file in self._files():
            for name, entry in read_header(file)[0].items():
                if name in self.entries:
                    raise UserError(f"{name} is in {file} and in {self.entries[name].file}; {MEND}")
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
                    f"{' or '.join(dtypes)} {list(shape)}; {MEND}"
                )

    def read(self, name: str) -> np.ndarray:
        """The tensor as stored; UserError for floats that are not finite."""
        entry = self.entries[name]
        value = entry.read()
        if entry.dtype != U8 and not np.isfinite(value).all():
            raise UserError(f"{name} in {entry.file} holds values that are not finite; {MEND}")
        return value

    def _files(self) -> list[Path]:
        index = self.folder / _INDEX
        if not index.is_file():
            return [self.folder / _ONE]
        try:
            places = json.loads(index.read_text())["weight_map"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            raise UserError(f"{index} cannot be read, or is no index of tensors; {MEND}") from None
        for name, file in places:
            if not isinstance(file, str):
                raise UserError(f"{index} puts {name} into {file!r}, which is no file; {MEND}")
        return [self.folder / file for file in sorted({file for _, file in places})]


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
        # transformers reads nothing without this format.
        header, _ = make_header({name: described[name] for name in names}, {"format": "pt"})
        with (folder / file).open("wb") as raw:
            raw.write(header)
            for name in names:
                array = np.ascontiguousarray(next(coming))
                dtype, shape = described[name]
                assert (array.dtype, array.shape) == (DTYPES[dtype], shape), (
                    f"{name} is {array.dtype} {array.shape}"
                )
                raw.write(array.reshape(-1).view(np.uint8).data)
    if count > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": place})
