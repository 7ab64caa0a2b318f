"""The model's tensors on the PyTorch side: INT4 codes and scales, and the few floats, by name.

Everything after this file (reference model, LiteRT, verifier) reads weights here and nowhere else; a code or a
scale is computed once, from the float32 master weights of a QAT checkpoint, and never again. Tensors are read one
at a time, from memory, a file or a generator, so that a model may be larger than what there is of memory.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from conversion import keymap
from conversion.int4 import Int4, unpack_nibbles
from conversion.outputs import replacing
from conversion.tensor_file import DTYPES, make_header, read_header
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.ops import fake_quant
from moe_jax.overrides import from_dict, to_dict

_FORMAT = "mobilemoe-int4"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ROUNDED = 2**22  # weights that are rounded at once
_AT_HAND = 6  # tensors read last that stay in memory: codes and scales of a layer's experts, and then some


class Deferred(NamedTuple):
    """An array that `read` gives when it is asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Weights:
    """Read-only tensors of one model; INT4 weights stay packed until they are asked for.

    `arrays` holds what a safetensors file would: `<name>.qweight` uint8 [..., out, in/2], `<name>.weight_scale`
    float16 [..., out, in/group], and float32 tensors under their own names; each an array or `Deferred`.
    """

    def __init__(self, config: ModelConfig, group: int, arrays: Mapping[str, np.ndarray | Deferred]):
        self.config = config
        self.group = group
        self._arrays = dict(arrays)
        self._read = lru_cache(_AT_HAND)(lambda name: cast(Deferred, self._arrays[name]).read())
        self._check()

    def names(self) -> list[str]:
        """Names of all tensors, an INT4 weight counting once, in the order of the key map."""
        return [tensor.name for tensor in keymap.torch_tensors(self.config)]

    def int4_names(self) -> list[str]:
        """Names of the INT4 tensors."""
        return [tensor.name for tensor in keymap.torch_tensors(self.config) if tensor.int4]

    def int4(self, name: str) -> Int4:
        """Codes and scales of an INT4 tensor [..., out, in]."""
        return Int4(unpack_nibbles(self.packed(name)), self.scales(name))

    def packed(self, name: str) -> np.ndarray:
        """The codes of an INT4 tensor as the file holds them: uint8 [..., out, in/2], low nibble first."""
        return self.array(f"{name}.qweight")

    def scales(self, name: str) -> np.ndarray:
        """The float16 scales of an INT4 tensor [..., out, in/group]."""
        return self.array(f"{name}.weight_scale")

    def float(self, name: str) -> np.ndarray:
        """A tensor that is not quantised: norms, router, expert bias."""
        return self.array(name)

    def array(self, name: str) -> np.ndarray:
        """A tensor by its name in a safetensors file."""
        value = self._arrays[name]
        return self._read(name) if isinstance(value, Deferred) else value

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape [..., out, in] of an INT4 tensor, without reading it."""
        *lead, half = self._arrays[f"{name}.qweight"].shape
        return (*lead, 2 * half)

    def fused(self, names: tuple[str, ...]) -> Int4:
        """Several [out, in] weights on one input, their rows one below the other."""
        parts = [self.int4(name) for name in names]
        return Int4(np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts]))

    def _check(self) -> None:
        wanted = layout(self.config, self.group)
        if missing := sorted(wanted.keys() - self._arrays.keys()):
            raise UserError(f"the weights miss {keymap.listed(missing)}; export the model again")
        if extra := sorted(self._arrays.keys() - wanted.keys()):
            raise UserError(f"the weights hold unknown {keymap.listed(extra)}; they are of another model")
        for name, expected in wanted.items():
            array = self._arrays[name]
            if (tuple(array.shape), array.dtype) != expected:
                raise UserError(
                    f"{name} is {array.dtype} {tuple(array.shape)} where the configuration gives "
                    f"{expected[1]} {expected[0]}; they are of another model"
                )


def layout(config: ModelConfig, group: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and type of every array of a model, floats first, then codes and scales of one tensor after another."""
    floats: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    codes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for tensor in keymap.torch_tensors(config):
        if not tensor.int4:
            floats[tensor.name] = (tensor.shape, np.dtype(np.float32))
            continue
        *lead, width = tensor.shape
        if width % group:
            raise UserError(
                f"{tensor.name} has input width {width}, no multiple of the group {group}; "
                f"use {-(-width // group) * group}"
            )
        codes[f"{tensor.name}.qweight"] = ((*lead, width // 2), np.dtype(np.uint8))
        codes[f"{tensor.name}.weight_scale"] = ((*lead, width // group), np.dtype(np.float16))
    return floats | codes


def from_parameters(parameters: Mapping[str, Any], config: ModelConfig, group: int = 32) -> Weights:
    """Quantise JAX parameters (float32 by path, layers stacked) on the grid of QAT."""
    return Weights(config, group, dict(quantised(parameters, config, group)))


def quantised(
    parameters: Mapping[str, Any], config: ModelConfig, group: int = 32
) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of `from_parameters` one after another; a parameter needs a shape and layers by index only."""
    for tensor, value in keymap.to_torch(parameters, config):
        if not tensor.int4:
            yield tensor.name, value
            continue
        rows = value.reshape(-1, value.shape[-1])
        # In pieces, because rounding takes several times the memory of what is rounded.
        count = math.ceil(rows.size / _ROUNDED)
        parts = [Int4.from_float(part, group) for part in np.array_split(rows, count)]
        packed, scales = (np.concatenate(p) for p in zip(*((q.packed, q.scales) for q in parts), strict=True))
        yield f"{tensor.name}.qweight", packed.reshape(*value.shape[:-1], -1)
        yield f"{tensor.name}.weight_scale", scales.reshape(*value.shape[:-1], -1)


def random(config: ModelConfig, seed: int = 0, group: int = 32) -> Weights:
    """Random weights of any size, every kind of tensor non-trivial; each is made when it is read, always alike."""
    wanted = layout(config, group).items()
    arrays = {n: Deferred(s, t, partial(_random_array, n, s, t, seed, group)) for n, (s, t) in wanted}
    return Weights(config, group, arrays)


def _random_array(name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int, group: int) -> np.ndarray:
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    if name.endswith(".qweight"):
        size = math.prod(shape)
        packed = _UNBIASED[rng.integers(0, 2**64, -(-size // 8), np.uint64).view(np.uint8)[:size]]
        # Every group holds one end of the grid, so that its scale follows from its values: see `masters`.
        first = packed[:: group // 2]
        first[:] = (first & 0xF0) | np.where(first & 0x10, 8, 7).astype(np.uint8)
        return packed.reshape(shape)
    if name.endswith(".weight_scale"):
        # A small embedding lets the layers, not the input token, decide the tied head's answer.
        deviation = 0.1 if "embed" in name else (shape[-1] * group) ** -0.5
        return _bfloat16(rng.uniform(0.75, 1.25, shape).astype(np.float32) * (deviation / _DEVIATION))
    if name.endswith("expert_bias"):
        return rng.normal(0, 0.02, shape).astype(np.float32)
    if name.endswith("router.weight"):
        return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)


# Two codes of a byte, with 0 in place of -8, which has no opposite; and how far such codes spread.
_UNBIASED = np.arange(256, dtype=np.uint8)
_UNBIASED[_UNBIASED & 0x0F == 0x08] &= 0xF0
_UNBIASED[_UNBIASED & 0xF0 == 0x80] &= 0x0F
_DEVIATION = math.sqrt(2 * sum(i * i for i in range(1, 8)) / 16)


def _bfloat16(scales: np.ndarray) -> np.ndarray:
    """Scales as the grid has them: exact in bfloat16 and float16."""
    cut = (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.maximum(cut, np.float32(fake_quant.SMALLEST_SCALE)).astype(np.float16)


def write_safetensors(
    arrays: Iterable[tuple[str, np.ndarray]], config: ModelConfig, group: int, path: str | Path
) -> None:
    """Write one safetensors file of arrays that come one at a time, in any order, with the config in its metadata.

    OSError for what the disk refuses; a file that was there stays as it was.
    """
    described = {"format": _FORMAT, "group_size": group, "config": to_dict(config)}
    tensors = {name: (_NAMES[dtype], shape) for name, (shape, dtype) in layout(config, group).items()}
    header, places = make_header(tensors, {"mobilemoe": json.dumps(described, sort_keys=True)}, align=64)
    with replacing(Path(path)) as aside, aside.open("wb") as file:
        file.write(header)
        for name, array in arrays:
            file.seek(places[name])
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def through_file(parameters: Mapping[str, Any], config: ModelConfig, group: int, path: Path) -> Weights:
    """Quantise parameters, of which not all need fit in memory, into a file, and open it."""
    write_safetensors(quantised(parameters, config, group), config, group, path)
    return load_safetensors(path)


def load_safetensors(path: str | Path) -> Weights:
    """Open a file of `write_safetensors`; a tensor missing, added or of another shape or type is a UserError."""
    entries, metadata = read_header(Path(path))
    try:
        described = json.loads(metadata["mobilemoe"])
        if described["format"] != _FORMAT:
            raise ValueError
        config, group = from_dict(ModelConfig, described["config"]), described["group_size"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not of format {_FORMAT}; export it with this project") from None
    arrays = {name: Deferred(entry.shape, DTYPES[entry.dtype], entry.read) for name, entry in entries.items()}
    return Weights(config, group, arrays)
