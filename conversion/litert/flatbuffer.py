"""A small builder over the object API of the .tflite schema: read, edit, write.

It decides how INT4 blockwise weights, control flow and signatures are spelled in the file, and nothing
else. A tensor is its index within its `Graph`; a new output is `(shape, type)`, an old one its index.

    m = Model()                                # or Model.read(path), then edit, then m.write(path)
    w = m.store(Int4(codes, scales))           # stored once, however many graphs use it
    g = m.graph("main")
    x = g.input((1, 768), "float32", "x")
    h = g.fully_connected(x, g.int4(w))
    s = g.add("LOGISTIC", [h], g.like(h))      # any builtin; options by the schema's names: axis=1
    g.outputs = [g.add("MUL", [h, s], g.like(h))]
    m.signature("decode", g, {"x": x}, {"y": g.outputs[0]})
    for op in g.custom_ops("marker"):          # surgery: what is added inside takes the place of `op`
        with g.replace(op):
            g.fully_connected(op.inputs[0], g.int4(w), out=op.outputs[0])
    m.sweep(); m.write(path)                   # drop what nothing refers to; same model, same bytes
"""

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from conversion.int4 import Int4, unpack_nibbles

_ALIGN = 64  # bytes between the starts of buffers that lie behind the root
_INLINE_LIMIT = 1 << 30  # a flatbuffer ends at 2 GiB; beyond this, weights go behind the root
_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
    "bool": schema.TensorType.BOOL,
    "int4": schema.TensorType.INT4,
}
_TYPE_NAMES = {code: name for name, code in _TYPES.items()}
# Ops whose options table is not their own name in camel case.
_REDUCTIONS = ("SUM", "MEAN", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_ANY", "REDUCE_ALL", "REDUCE_PROD")
_OPTIONS = {
    "TOPK_V2": "TopKV2",
    "BATCH_MATMUL": "BatchMatMul",
    "MAXIMUM": "MaximumMinimum",
    "MINIMUM": "MaximumMinimum",
    "PADV2": "PadV2",
    **dict.fromkeys(_REDUCTIONS, "Reducer"),
    **dict.fromkeys(("LOGISTIC", "TANH", "SQRT", "RSQRT", "SIN", "LOG", "FLOOR", "ROUND"), ""),
    **dict.fromkeys(("EMBEDDING_LOOKUP", "CUSTOM"), ""),
}
Kind = tuple[Sequence[int], str]  # shape and type of a tensor
Out = int | Kind  # an existing tensor, or a new one


class Stored(NamedTuple):
    """An INT4 weight in a file: the buffers of its nibbles and scales, its shape [out, in], its group."""

    packed: int
    scales: int
    shape: tuple[int, int]
    group: int


class Model:
    """A .tflite file under construction. `t` is the schema's own object, for what has no helper here."""

    def __init__(self, t: Any = None) -> None:
        if t is None:
            t = schema.ModelT(version=3, operatorCodes=[], subgraphs=[], signatureDefs=[])
            t.buffers = [schema.BufferT()]  # buffer 0 is the empty one, by convention
        self.t = t
        self._digests: dict[tuple[int, bytes], int] = {}
        self.graphs = [Graph(self, i, g) for i, g in enumerate(t.subgraphs)]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Model":
        """Open a file; its weights stay on disk until they are touched."""
        with open(path, "rb") as f:
            raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        t: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(raw))
        t.signatureDefs = t.signatureDefs or []
        for buffer in t.buffers:
            if buffer.offset > 1:  # content behind the root
                buffer.data = np.frombuffer(raw, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
        return cls(t)

    def write(self, path: str | os.PathLike[str], *, behind_root: bool | None = None) -> None:
        """Write aside, then rename; a failure leaves `path` as it was.

        `behind_root` puts buffers after the flatbuffer, where its limit of 2 GiB does not hold.
        """
        sizes = [0 if b.data is None else len(b.data) for b in self.t.buffers]
        if behind_root is None:
            behind_root = sum(sizes) > _INLINE_LIMIT
        aside = Path(f"{path}.partial")
        try:
            with aside.open("wb") as f:
                if behind_root:
                    self._write_behind_root(f, sizes)
                else:
                    f.write(self._pack(sum(sizes)))
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def _write_behind_root(self, f: Any, sizes: list[int]) -> None:
        contents = [b.data for b in self.t.buffers]
        try:
            # Two passes: offsets are fixed-width fields, so the root's length does not depend on them.
            end = 2
            for _ in range(2):
                for buffer, size in zip(self.t.buffers, sizes, strict=True):
                    buffer.data = None
                    if size:
                        buffer.offset, buffer.size = end, size
                        end = _round_up(end + size, _ALIGN)
                root = self._pack(0)
                end = _round_up(len(root), _ALIGN)
            f.write(root)
            for buffer, data in zip(self.t.buffers, contents, strict=True):
                if buffer.size:
                    f.write(b"\0" * (buffer.offset - f.tell()))
                    f.write(np.ascontiguousarray(data, np.uint8).data)
        finally:
            for buffer, data in zip(self.t.buffers, contents, strict=True):
                buffer.data, buffer.offset, buffer.size = data, 0, 0

    def _pack(self, content: int) -> bytearray:
        builder = flatbuffers.Builder(content + (1 << 20))
        plain = self.t.buffers
        self.t.buffers = [_AlignedBuffer(b.data, b.offset, b.size) for b in plain]
        try:
            builder.Finish(self.t.Pack(builder), b"TFL3")
        finally:
            self.t.buffers = plain
        return builder.Output()

    def buffer(self, array: np.ndarray) -> int:
        """The index of a buffer with the bytes of `array`; equal contents are stored once."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        key = (data.size, hashlib.blake2b(data.data, digest_size=16).digest())
        if key not in self._digests:
            self._digests[key] = len(self.t.buffers)
            self.t.buffers.append(schema.BufferT(data=data))
        return self._digests[key]

    def store(self, weight: Int4) -> Stored:
        """Put one INT4 weight [out, in] into the file; any number of graphs may then use it."""
        rows, columns = weight.codes.shape
        packed, scales = self.buffer(weight.packed), self.buffer(weight.scales.astype(np.float16))
        return Stored(packed, scales, (rows, columns), weight.group)

    def opcode(self, name: str, version: int = 1, custom: str | None = None) -> int:
        """The index of an operator code, made at first use."""
        code = getattr(schema.BuiltinOperator, name)
        for i, known in enumerate(self.t.operatorCodes):
            if (known.builtinCode, known.version) == (code, version) and (
                custom is None or _text(known.customCode) == custom
            ):
                return i
        # The deprecated field is 8 bits wide; 127 says "look at builtinCode".
        new = schema.OperatorCodeT(min(code, 127), custom, version, code)
        self.t.operatorCodes.append(new)
        return len(self.t.operatorCodes) - 1

    def graph(self, name: str) -> "Graph":
        """Append an empty subgraph; the first one of a file is the main one."""
        t = schema.SubGraphT(tensors=[], inputs=[], outputs=[], operators=[], name=name)
        self.t.subgraphs.append(t)
        self.graphs.append(Graph(self, len(self.graphs), t))
        return self.graphs[-1]

    def signature(self, key: str, graph: "Graph", inputs: dict[str, int], outputs: dict[str, int]) -> None:
        """Name a subgraph's inputs and outputs for callers."""
        given, got = ([schema.TensorMapT(n, i) for n, i in d.items()] for d in (inputs, outputs))
        self.t.signatureDefs.append(schema.SignatureDefT(given, got, key, graph.index))

    def sweep(self) -> None:
        """Drop tensors, buffers and operator codes that nothing refers to. Graphs stay."""
        for g in self.graphs:
            g._sweep([s for s in self.t.signatureDefs if s.subgraphIndex == g.index])
        used = {t.buffer for g in self.graphs for t in g.t.tensors} | {0}
        used |= {m.buffer for m in self.t.metadata or []}
        new = {old: i for i, old in enumerate(sorted(used))}
        self.t.buffers = [self.t.buffers[old] for old in sorted(used)]
        for t in [t for g in self.graphs for t in g.t.tensors] + list(self.t.metadata or []):
            t.buffer = new[t.buffer]
        self._digests = {k: new[i] for k, i in self._digests.items() if i in new}
        ops = [op for g in self.graphs for op in g.ops]
        codes = sorted({op.opcodeIndex for op in ops})
        self.t.operatorCodes = [self.t.operatorCodes[c] for c in codes]
        for op in ops:
            op.opcodeIndex = codes.index(op.opcodeIndex)


class Graph:
    """One subgraph; `inputs` and `outputs` are lists of tensor indices."""

    def __init__(self, model: Model, index: int, t: Any) -> None:
        self.model, self.index, self.t = model, index, t
        t.operators = t.operators or []
        t.inputs, t.outputs = ([int(i) for i in v] for v in (t.inputs, t.outputs))

    @property
    def ops(self) -> list[Any]:
        """The operators in the order in which they run."""
        return self.t.operators

    @property
    def inputs(self) -> list[int]:
        return self.t.inputs

    @property
    def outputs(self) -> list[int]:
        return self.t.outputs

    @outputs.setter
    def outputs(self, tensors: Sequence[int]) -> None:
        self.t.outputs = list(tensors)

    # Tensors

    def tensor(self, shape: Sequence[int], dtype: str, name: str = "", buffer: int = 0) -> int:
        """A new tensor; without a buffer it holds a value that is computed at run time."""
        self.t.tensors.append(
            schema.TensorT(
                shape=np.asarray(shape, np.int32),
                type=_TYPES[dtype],
                buffer=buffer,
                name=name or f"t{len(self.t.tensors)}",
                hasRank=True,
            )
        )
        return len(self.t.tensors) - 1

    def input(self, shape: Sequence[int], dtype: str, name: str = "") -> int:
        """A new tensor that the caller fills."""
        self.t.inputs.append(self.tensor(shape, dtype, name))
        return self.t.inputs[-1]

    def const(self, value: np.ndarray | np.generic | Sequence[int], name: str = "") -> int:
        """A constant; a plain list means int32."""
        array = np.asarray(value, None if isinstance(value, np.ndarray | np.generic) else np.int32)
        return self.tensor(array.shape, str(array.dtype), name, self.model.buffer(array))

    def int4(self, weight: Int4 | Stored, name: str = "") -> int:
        """An INT4 weight [out, in] with FLOAT16 scales [out, in/group], for fully_connected or a lookup.

        XNNPACK reads a scale as bf16 and wants it normal (>= 2**-14): see moe_jax.ops.fake_quant.
        """
        w = self.model.store(weight) if isinstance(weight, Int4) else weight
        rows, columns = w.shape
        scale = self.tensor((rows, columns // w.group), "float16", f"{name}_scale", w.scales)
        tensor = self.tensor(w.shape, "int4", name, w.packed)
        self.t.tensors[tensor].quantization = schema.QuantizationParametersT(
            detailsType=schema.QuantizationDetails.BlockwiseQuantization,
            details=schema.BlockwiseQuantizationT(scale, -1, w.group),
            quantizedDimension=0,
        )
        return tensor

    def read_int4(self, tensor: int) -> Int4:
        """The codes int8 [out, in] and scales float16 [out, in/group] of an INT4 tensor, bit for bit."""
        t = self.t.tensors[tensor]
        packed = np.asarray(self.model.t.buffers[t.buffer].data, np.uint8)
        codes = unpack_nibbles(packed.reshape(t.shape[0], -1))
        return Int4(codes, self.array(t.quantization.details.scales))

    def array(self, tensor: int) -> np.ndarray:
        """The value of a constant that is not INT4."""
        t = self.t.tensors[tensor]
        data = np.asarray(self.model.t.buffers[t.buffer].data, np.uint8)
        return data.view(_TYPE_NAMES[t.type]).reshape(t.shape)

    def shape(self, tensor: int) -> tuple[int, ...]:
        """The static shape of a tensor."""
        return tuple(int(n) for n in self.t.tensors[tensor].shape)

    def like(self, tensor: int) -> tuple[tuple[int, ...], str]:
        """(shape, type) of a tensor: an `Out` for one that looks the same."""
        return self.shape(tensor), _TYPE_NAMES[self.t.tensors[tensor].type]

    # Operators

    def add(self, op: str, inputs: Sequence[int], *outs: Out, version: int = 1, **options: Any) -> Any:
        """Append a builtin op; returns its output tensor, or a tuple of them when there are several.

        `options` are the fields of the op's options table, under the schema's names (numSplits=2).
        """
        outputs = [o if isinstance(o, int | np.integer) else self.tensor(*o) for o in outs]
        t = schema.OperatorT(opcodeIndex=self.model.opcode(op, version))
        t.inputs, t.outputs = (np.asarray(v, np.int32) for v in (inputs, outputs))
        table = _OPTIONS.get(op, "".join(word.capitalize() for word in op.split("_"))) + "Options"
        if table != "Options":
            t.builtinOptionsType = getattr(schema.BuiltinOptions, table)
            t.builtinOptions = getattr(schema, table + "T")(**options)
        self.ops.append(t)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def fully_connected(self, x: int, weight: int, out: Out | None = None) -> int:
        """x [..., in] times an INT4 or float weight [out, in], without bias: [..., out]."""
        *rows, _ = self.shape(x)
        if out is None:
            out = ((*rows, self.shape(weight)[0]), "float32")
        version = 12 if self.t.tensors[weight].type == schema.TensorType.INT4 else 5
        keep = len(rows) != 1
        return self.add("FULLY_CONNECTED", [x, weight, -1], out, version=version, keepNumDims=keep)

    def embedding_lookup(self, ids: int, table: int, out: Out | None = None) -> int:
        """Rows of an INT4 table [V, D], as float32: ids [n] to [n, D]."""
        if out is None:
            out = ((*self.shape(ids), self.shape(table)[1]), "float32")
        return self.add("EMBEDDING_LOOKUP", [ids, table], out, version=4)

    def custom_ops(self, name: str) -> list[Any]:
        """The CUSTOM operators of that name, in order."""
        codes = self.model.t.operatorCodes
        return [op for op in self.ops if _text(codes[op.opcodeIndex].customCode) == name]

    @contextmanager
    def replace(self, op: Any) -> Iterator[None]:
        """Ops added inside take the place of `op`; one of them must write `op.outputs`."""
        at = next(i for i, known in enumerate(self.ops) if known is op)
        tail = self.ops[at + 1 :]
        del self.ops[at:]
        try:
            yield
        finally:
            self.ops.extend(tail)

    def _sweep(self, signatures: list[Any]) -> None:
        tensors = self.t.tensors
        named = [m for s in signatures for m in [*(s.inputs or []), *(s.outputs or [])]]
        used = {*self.inputs, *self.outputs, *(m.tensorIndex for m in named)}
        used |= {int(i) for op in self.ops for i in (*op.inputs, *op.outputs)} - {-1}
        blockwise = schema.BlockwiseQuantizationT
        details = {i: t.quantization.details for i, t in enumerate(tensors) if t.quantization}
        details = {i: d for i, d in details.items() if i in used and isinstance(d, blockwise)}
        used |= {d.scales for d in details.values()}
        new = {old: i for i, old in enumerate(sorted(used))} | {-1: -1}
        self.t.tensors = [tensors[i] for i in sorted(used)]
        self.t.inputs, self.t.outputs = ([new[i] for i in v] for v in (self.inputs, self.outputs))
        for op in self.ops:
            op.inputs, op.outputs = (np.array([new[int(i)] for i in v], np.int32) for v in (op.inputs, op.outputs))
        for d in details.values():
            d.scales = new[d.scales]
        for m in named:
            m.tensorIndex = new[m.tensorIndex]


class _AlignedBuffer(schema.BufferT):
    """Honours the schema's force_align: 16, which the generated writer ignores."""

    def Pack(self, builder: Any) -> int:
        data = self.data
        if data is not None:
            builder.StartVector(1, len(data), 16)
            builder.head -= len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = np.ascontiguousarray(data, np.uint8).data
            data = builder.EndVector()
        schema.BufferStart(builder)
        if data is not None:
            schema.BufferAddData(builder, data)
        schema.BufferAddOffset(builder, self.offset)
        schema.BufferAddSize(builder, self.size)
        return schema.BufferEnd(builder)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value
