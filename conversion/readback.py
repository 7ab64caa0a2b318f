"""What a .litertlm really holds, read without the code that wrote it.

The container and the flatbuffer are walked through their schemas, nibbles are unpacked by another formula than the
writer's, and each INT4 tensor is put down to weights of the checkpoint by its name in the file.
"""

from __future__ import annotations

import mmap
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from ai_edge_litert import schema_py_generated as tflite
from litert_lm_builder import litertlm_core as core
from litert_lm_builder import litertlm_header_schema_py_generated as header
from litert_lm_builder.runtime.proto import llm_metadata_pb2 as _pb2

from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

pb2: Any = _pb2  # its classes are made at run time
Expected = Mapping[str, tuple[np.ndarray, np.ndarray]]
_AT_HAND = 1 << 26  # bytes of a file that may stay in memory
_EXPERT = re.compile(r"(?P<layer>.+)/(?P<expert>\d+)(_x\d+)?")  # a graph of one expert


@dataclass(frozen=True)
class Sections:
    """The parts of a bundle: the .tflite as bytes of the mapped file, the LlmMetadata message, the tokenizer."""

    tflite: memoryview
    metadata: Any
    tokenizer: Tokenizer


def sections(path: str | Path) -> Sections:
    """Open a bundle; UserError where it is missing, is no bundle, or lacks one of the parts."""
    kinds, found = header.AnySectionDataType, {}
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
        text = zlib.decompress(found[kinds.HF_Tokenizer_Zlib][8:])
        return Sections(
            found[kinds.TFLiteModel],
            pb2.LlmMetadata.FromString(bytes(found[kinds.LlmMetadataProto])),
            Tokenizer(tokenizers.Tokenizer.from_str(text.decode()), str(path)),
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; export a bundle first") from None
    except Exception as error:  # whatever parsers raise on bytes that are something else
        raise UserError(
            f"{path} is no whole .litertlm bundle of a language model ({error}); export it again"
        ) from None


@dataclass
class Findings:
    """Weights of the file against the checkpoint; a weight that is stored twice is compared twice, counted once."""

    codes_checked: int = 0
    scales_checked: int = 0
    mismatches: int = 0
    reports: list[str] = field(default_factory=list)

    def wrong(self, count: int, report: str) -> None:
        """Note `count` values that differ."""
        self.mismatches += count
        self.reports.append(report)


def compare(model: memoryview, expected: Expected) -> Findings:
    """Every code and scale of every INT4 tensor in a .tflite against `expected`, and nothing expected left out.

    `expected` maps a weight's name to codes int8 [..., out, in] and scales float16 [..., out, in/group].
    """
    result, left = Findings(), {}  # labels of each weight that was met, with their sizes, until they are met
    for names, expert, codes, scales in _tensors(model):
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
            left[name] = left[name] if name in left else _labels(name, expected)
            if left[name].pop(label, 0):
                result.codes_checked += want_codes.size
                result.scales_checked += want_scales.size
            for kind, got, want in (("codes", codes, want_codes), ("scales", scales, want_scales)):
                count = want.size if got[rows].shape != want.shape else np.sum(got[rows] != want)
                if count:
                    result.wrong(int(count), f"{label}: {count} of {want.size} {kind} differ")
    for name in expected:
        for label, size in (left[name] if name in left else _labels(name, expected)).items():
            result.wrong(size, f"{label} is not in the file")
    return result


def _labels(name: str, expected: Expected) -> dict[str, int]:
    """Codes of a weight, or of each of its experts."""
    codes, _ = expected[name]
    return {name: codes.size} if codes.ndim == 2 else {f"{name}[{e}]": codes[e].size for e in range(len(codes))}


def _expert(weight: tuple[np.ndarray, np.ndarray], expert: int) -> tuple[np.ndarray, np.ndarray]:
    codes, scales = weight
    empty = codes.ndim != 3 or expert >= len(codes)
    return (codes[:0], scales[:0]) if empty else (codes[expert], scales[expert])


def _tensors(raw: memoryview) -> Iterator[tuple[list[str], int | None, np.ndarray, np.ndarray]]:
    """(names, expert, codes [out, in], scales [out, in/group]) of each INT4 tensor, once per buffer and label."""
    model, seen, read = tflite.Model.GetRootAs(raw, 0), set(), 0
    for i in range(model.SubgraphsLength()):
        graph: Any = model.Subgraphs(i)
        inside = _EXPERT.fullmatch((graph.Name() or b"").decode())
        for j in range(graph.TensorsLength()):
            tensor = graph.Tensors(j)
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
            if (read := read + packed.size) > _AT_HAND and isinstance(raw.obj, mmap.mmap):
                raw.obj.madvise(
                    mmap.MADV_DONTNEED
                )  # what was read of a mapped file counts as memory of the process
                read = 0
            nibbles = np.stack([packed & 15, packed >> 4], axis=-1).astype(np.int8)
            values = _content(raw, model, scales).view(np.float16).reshape(scales.ShapeAsNumpy())
            yield label.split("+"), expert, ((nibbles ^ 8) - 8).reshape(shape), values


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
