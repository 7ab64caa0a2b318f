"""What a .pte file holds, against the weights that it was made of: every code and scale.

Experts and the embedding's table are arguments of the program's calls. Products' weights belong to XNNPACK's
delegates and are filed under the hash of their bytes (`backends/xnnpack/operators/node_visitor.py`); that each
delegate asks for its own is for the logits to show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import _ExtendedHeader

from conversion.executorch.packing import unpack
from conversion.executorch.program import BIASED, mixture_names, products, swapped
from conversion.int4 import Int4, pack_nibbles, unpack_nibbles
from conversion.readback import Findings
from conversion.torch_model import EMBEDDING
from conversion.weights import Weights

TABLE = "the table"
_KINDS = {"BYTE": np.uint8, "FLOAT": np.float32}


class Contents:
    """The constants of a file, mapped: those that calls take as arguments, and those of delegates by key."""

    def __init__(self, path: Path) -> None:
        self._file = np.memmap(path, np.uint8, "r")
        header = _ExtendedHeader.from_bytes(bytes(self._file[8 : _ExtendedHeader.NUM_HEAD_BYTES]))
        program = _flatbuffer_to_program(bytes(self._file[: header.program_size]))
        self._segments, self._base = program.segments, header.segment_base_offset
        self._constants, self._plan = program.constant_segment, program.execution_plan[0]
        self._named = {data.key: data.segment_index for data in program.named_data or ()}

    def named(self, key: str) -> np.ndarray:
        """The bytes that a delegate asks for by this key, none if there are none."""
        if key not in self._named:
            return np.empty(0, np.uint8)
        segment = self._segments[self._named[key]]
        return self._cut(segment.offset, segment.size)

    def calls(self, name: str) -> Iterator[list[Any]]:
        """For each call of an operator its arguments, constants as arrays and all else as None."""
        names = [operator.name for operator in self._plan.operators]
        for instruction in self._plan.chains[0].instructions:
            call = instruction.instr_args
            if hasattr(call, "op_index") and names[call.op_index] == name:
                yield [self._constant(self._plan.values[i].val) for i in call.args]

    def _constant(self, value: Any) -> np.ndarray | None:
        index = getattr(value, "data_buffer_idx", 0)
        if not index:
            return None
        kind = np.dtype(_KINDS[value.scalar_type.name])
        start = self._segments[self._constants.segment_index].offset + self._constants.offsets[index]
        return self._cut(start, int(np.prod(value.sizes)) * kind.itemsize).view(kind).reshape(value.sizes)

    def _cut(self, start: int, size: int) -> np.ndarray:
        return self._file[self._base + start : self._base + start + size]


def compare(path: Path, weights: Weights) -> Findings:
    """Every code and scale of the file against `weights`; the embedding, which it holds twice, is counted once."""
    found = Findings()
    for name, got, want in _weights(Contents(path), weights):
        if name != TABLE:
            found.codes_checked += want.codes.size
            found.scales_checked += want.scales.size
        if got is None:
            found.wrong(want.codes.size, f"{name} is not there")
        elif wrong := int((got.codes != want.codes).sum() + (got.scales != want.scales).sum()):
            found.wrong(wrong, f"{name}: {wrong} codes and scales differ")
    return found


def _weights(contents: Contents, weights: Weights) -> Iterator[tuple[str, Int4 | None, Int4]]:
    """For each INT4 weight its name, what the file has, and what it should."""
    ((table, scales, *_),) = contents.calls("quantized_decomposed::embedding_4bit")
    yield TABLE, Int4(unpack_nibbles(swapped(table) ^ BIASED), scales.astype(np.float16)), weights.int4(EMBEDDING)
    for names in products(weights.config):
        want = weights.fused(names)
        yield "+".join(names), _filed(contents, want), want
    calls = contents.calls("llama::quantized_moe_ffn")
    for layer in range(weights.config.num_layers if weights.config.moe else 0):
        call = next(calls, None)
        for place, name in enumerate(mixture_names(layer)[1:], 3):
            want = weights.int4(name)
            yield name, unpack(call[place], want.codes.shape, want.group) if call else None, want


def _filed(contents: Contents, want: Int4) -> Int4 | None:
    """What the file has under the keys of this weight."""
    packed, scales = pack_nibbles(want.codes) ^ BIASED, want.scales.astype(ml_dtypes.bfloat16)
    filed = contents.named(_key(packed))
    filed_scales = contents.named(f"scale_{_key(scales)}")
    if filed.size != packed.size or filed_scales.size != scales.nbytes:
        return None
    codes = unpack_nibbles(filed.reshape(packed.shape) ^ BIASED)
    return Int4(codes, filed_scales.view(ml_dtypes.bfloat16).reshape(scales.shape).astype(np.float16))


def _key(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()
