"""What a .litertlm really holds, read without the code that wrote it.

The flatbuffer is walked through its schema, nibbles are unpacked by another formula than the
writer's, and each INT4 tensor is put down to weights of the checkpoint by its name in the file.
"""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from ai_edge_litert import schema_py_generated as tflite
from litert_lm_builder import litertlm_header_schema_py_generated as header
from litert_lm_builder.runtime.proto import llm_metadata_pb2 as _pb2

from conversion.kernel import EMBEDDING, EXPERTS, LINEAR, MIXTURE, SELF_ATTENTION
from conversion.litert import container
from conversion.litert.container import entries, intact
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

pb2: Any = _pb2  # its classes are made at run time
Expected = Mapping[str, tuple[np.ndarray, np.ndarray]]
_AT_HAND = 1 << 26  # bytes of a file that may stay in memory
_ROWS, _BLOCK = 16, 32  # of a group in a bank, and weights that share a scale there
EXPERT = re.compile(r"(?P<layer>.+)/(?P<expert>\d+)(_x\d+)?")  # a graph of one expert


@dataclass(frozen=True)
class Sections:
    """The parts of a bundle: the .tflite as bytes of the mapped file, the LlmMetadata message, the tokenizer."""

    tflite: memoryview
    metadata: Any
    tokenizer: Tokenizer


def sections(path: str | Path) -> Sections:
    """Open a bundle; UserError where it is missing, is no bundle, or lacks one of the parts."""
    return container.read(path, _sections)


def _sections(found: dict[int, memoryview], path: str | Path) -> Sections:
    kinds = header.AnySectionDataType
    text = zlib.decompress(found[kinds.HF_Tokenizer_Zlib][8:])
    return Sections(
        found[kinds.TFLiteModel],
        pb2.LlmMetadata.FromString(bytes(found[kinds.LlmMetadataProto])),
        Tokenizer(tokenizers.Tokenizer.from_str(text.decode()), str(path)),
    )


@dataclass
class Findings:
    """Weights of the file against the checkpoint; a weight that is stored twice is compared twice, counted once."""

    codes_checked: int = 0
    scales_checked: int = 0
    mismatches: int = 0
    reports: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # labels of weights that are not in the file

    def wrong(self, count: int, report: str) -> None:
        """Note `count` values that differ."""
        self.mismatches += count
        self.reports.append(report)


class _Weight(NamedTuple):
    """INT4 weights in the file: codes [out, in], scales [out, in/group], and a bank's sums [out]."""

    names: list[str]
    expert: int | None
    codes: np.ndarray
    scales: np.ndarray
    sums: np.ndarray | None = None


def compare(model: memoryview, expected: Expected, path: str | Path = "the .tflite") -> Findings:
    """Every code and scale of every INT4 tensor in a .tflite against `expected`, and nothing expected left out.

    `expected` maps a weight's name to codes int8 [..., out, in] and scales float16 [..., out, in/group]. Of experts
    in the kernel's layout, the sums that it keeps for the zero point are compared too. Where the file is so damaged
    that it shows no weights, a UserError names its `path`.
    """
    result, left = Findings(), {}  # labels of each weight that was met, with their sizes, until they are met
    read = 0
    for names, expert, codes, scales, sums in _weights(model, path):
        if (read := read + codes.size // 2) > _AT_HAND and isinstance(model.obj, mmap.mmap):
            model.obj.madvise(mmap.MADV_DONTNEED)  # what was read of a mapped file counts as memory of the process
            read = 0
        unknown = [name for name in names if name not in expected]
        parts = [expected[n] if expert is None else _expert(expected[n], expert) for n in names if n in expected]
        heights = [part[0].shape[0] for part in parts]
        if unknown or sum(heights) != len(codes) or any(p[0].shape[1:] != codes.shape[1:] for p in parts):
            label = "+".join(names) + ("" if expert is None else f"[{expert}]")
            result.wrong(codes.size, f"{label} {list(codes.shape)} is no weight of the checkpoint")
            continue
        start = 0
        for name, (want_codes, want_scales), height in zip(names, parts, heights, strict=True):
            rows = slice(start, start := start + height)
            label = name if expert is None else f"{name}[{expert}]"
            left[name] = left[name] if name in left else labels(name, expected[name][0].shape)
            if left[name].pop(label, 0):
                result.codes_checked += want_codes.size
                result.scales_checked += want_scales.size
            pairs = [("codes", codes, want_codes), ("scales", scales, want_scales)]
            if sums is not None:  # of a bank, which has a scale for every block
                times = scales.shape[1] // want_scales.shape[1]
                pairs[1] = ("scales", scales, np.repeat(want_scales, times, axis=1))
                pairs.append(("sums", sums, _sums(want_codes, want_scales)))
            for kind, got, want in pairs:
                count = want.size if got[rows].shape != want.shape else np.sum(got[rows] != want)
                if count:
                    result.wrong(int(count), f"{label}: {count} of {want.size} {kind} differ")
    for name in expected:
        for label, size in (left[name] if name in left else labels(name, expected[name][0].shape)).items():
            result.missing.append(label)
            result.wrong(size, f"{label} is not in the file")
    return result


def labels(name: str, shape: Sequence[int]) -> dict[str, int]:
    """What a weight, or each of its experts, is called, and its number of codes."""
    *experts, rows, columns = shape
    return {f"{name}[{e}]": rows * columns for e in range(experts[0])} if experts else {name: rows * columns}


def _expert(weight: tuple[np.ndarray, np.ndarray], expert: int) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = weight
    empty = codes.ndim != 3 or expert >= len(codes)
    return (codes[:0], scales[:0]) if empty else (codes[expert], scales[expert])


def _weights(raw: memoryview, path: str | Path) -> Iterator[_Weight]:
    with intact(path):
        yield from _tensors(raw)
        yield from _banks(raw)


def _tensors(raw: memoryview) -> Iterator[_Weight]:
    """Each INT4 tensor, once per buffer and label."""
    model, seen = tflite.Model.GetRootAs(raw, 0), set()
    for graph in entries(model, "Subgraphs"):
        inside = EXPERT.fullmatch((graph.Name() or b"").decode())
        for tensor in entries(graph, "Tensors"):
            if tensor.Type() != tflite.TensorType.INT4:
                continue
            label, expert = tensor.Name().decode(), None
            if inside:
                label, expert = f"{inside['layer']}.{label}_proj", int(inside["expert"])
            scales = graph.Tensors(_blockwise(tensor).Scales())
            if (key := (label, expert, tensor.Buffer(), scales.Buffer())) in seen:
                continue
            seen.add(key)
            shape = tensor.ShapeAsNumpy()
            packed = _content(raw, model, tensor)
            codes = _signed(np.stack([packed & 15, packed >> 4], axis=-1)).reshape(shape)
            values = _content(raw, model, scales).view(np.float16).reshape(scales.ShapeAsNumpy())
            yield _Weight(label.split("+"), expert, codes, values)


def _banks(raw: memoryview) -> Iterator[_Weight]:
    """Each matrix that the kernel's ops read, whose layout is told in bank.py."""
    model, seen = tflite.Model.GetRootAs(raw, 0), set()
    for graph in entries(model, "Subgraphs"):
        for op in entries(graph, "Operators"):
            for tensor, shape in kernel_weights(model, graph, op):
                name = tensor.Name().decode()
                if (key := (name, tensor.Buffer(), shape)) not in seen:
                    seen.add(key)
                    read = _of_matrix if len(shape) == 2 else _of_experts
                    try:
                        yield from read(name, _content(raw, model, tensor), shape)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None


def kernel_weights(model: Any, graph: Any, op: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """The weights of an op of the kernel: tensors with their shapes, [out, in], or E, D, F of experts.

    Nothing for other ops; struct.error for options that are none of this op's.
    """
    kind = (model.OperatorCodes(op.OpcodeIndex()).CustomCode() or b"").decode()
    options, found = bytes(op.CustomOptionsAsNumpy()), {}  # shapes by the place among the op's inputs
    if kind in (LINEAR, EMBEDDING):
        found[1] = struct.unpack("<2I", options)
    elif kind == EXPERTS:
        count, _, width, hidden, _ = struct.unpack("<5I", options)
        found[3] = count, width, hidden
    elif kind == SELF_ATTENTION:
        width, heads, groups, head = struct.unpack("<4I8x", options)
        found |= {2: ((heads + 2 * groups) * head, width), 3: (width, heads * head)}
    elif kind == MIXTURE:
        count, width, hidden, shared = struct.unpack("<I4x2I16xI4x", options)
        found |= {4: (count, width, hidden)} | ({5: (1, width, shared)} if shared else {})
    return [(graph.Tensors(op.Inputs(place)), shape) for place, shape in found.items()]


def _of_matrix(name: str, content: np.ndarray, shape: tuple[int, ...]) -> Iterator[_Weight]:
    groups = content.view(_group(shape[1]))
    if len(groups) * _ROWS != shape[0]:
        raise ValueError(f"{len(groups)} groups of {_ROWS} rows")
    yield _unpacked(name.split("+"), None, groups)


def _of_experts(name: str, content: np.ndarray, shape: tuple[int, ...]) -> Iterator[_Weight]:
    """A name of several weights is that of a dense feed-forward: gate, up and down of the one expert."""
    count, width, hidden = shape
    groups = 2 * hidden // _ROWS, width // _ROWS
    expert = [("gate_up", _group(width), groups[0]), ("down", _group(hidden), groups[1])]
    for e, matrices in enumerate(content.view(expert).reshape(count)):
        *gate_up, down = name.split("+")
        if gate_up:
            yield _unpacked(gate_up, None, matrices["gate_up"])
            yield _unpacked([down], None, matrices["down"])
        else:
            for part in ("gate_up", "down"):
                yield _unpacked([f"{name}.{part}_proj"], e, matrices[part])


def _group(inputs: int) -> list:
    """How 16 rows lie in a bank."""
    blocks = inputs // _BLOCK
    return [("sums", "<f4", _ROWS), ("scales", "<u2", (blocks, _ROWS)), ("codes", "u1", (blocks, 4, _ROWS, 4))]


def _unpacked(names: list[str], expert: int | None, groups: np.ndarray) -> _Weight:
    packed, blocks = groups["codes"], groups["codes"].shape[1]
    codes = _signed(np.stack([packed & 15, packed >> 4], axis=-1))  # group, block, run, row, place, nibble
    codes = codes.transpose(0, 3, 1, 2, 5, 4).reshape(-1, blocks * _BLOCK)
    scales = (groups["scales"].astype(np.uint32) << 16).view(np.float32).swapaxes(1, 2).reshape(-1, blocks)
    return _Weight(names, expert, codes, scales, groups["sums"].reshape(-1))


def _sums(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Minus the sum of a row's weights, added up in float32 by half blocks in their order: [out]."""
    halves = codes.reshape(len(codes), -1, _BLOCK // 2).sum(-1, dtype=np.int32).astype(np.float32)
    halves *= np.repeat(scales.astype(np.float32), halves.shape[1] // scales.shape[1], axis=1)
    return -np.add.accumulate(halves, axis=1, dtype=np.float32)[:, -1]


def _signed(nibbles: np.ndarray) -> np.ndarray:
    return (nibbles.astype(np.int8) ^ 8) - 8


def _blockwise(tensor: Any) -> Any:
    quantisation = tensor.Quantization()
    if quantisation is None or quantisation.DetailsType() != tflite.QuantizationDetails.BlockwiseQuantization:
        raise UserError(f"INT4 tensor {tensor.Name().decode()} is not blockwise; export the bundle again")
    table, found = quantisation.Details(), tflite.BlockwiseQuantization()
    found.Init(table.Bytes, table.Pos)
    return found


def _content(raw: memoryview, model: Any, tensor: Any) -> np.ndarray:
    buffer = model.Buffers(tensor.Buffer())
    if buffer.Offset() > 1:  # behind the root of the flatbuffer
        return np.frombuffer(raw, np.uint8, buffer.Size(), buffer.Offset())
    return buffer.DataAsNumpy()
