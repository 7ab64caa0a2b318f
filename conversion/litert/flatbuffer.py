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
    m.write(path)                              # the same model gives the same bytes
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, cast

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from conversion.int4 import Int4
from conversion.outputs import replacing

_ALIGN = 64  # bytes between the starts of buffers that lie behind the root
_OFFSET_FIELD = 6  # where a buffer's vtable says where its offset is
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
F32, I32, BOOL = "float32", "int32", "bool"
_TYPE_NAMES = {code: name for name, code in _TYPES.items()}
BUILTIN_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if name.isupper()}
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
Read = Callable[[], np.ndarray]


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
        """OSError for what the disk refuses; a file that was there stays as it was.

        `behind_root` puts buffers after the flatbuffer, where its limit of 2 GiB does not hold.
        """
        sizes = [
            b.length if isinstance(b, _Later) else len(() if b.data is None else b.data) for b in self.t.buffers
        ]
        if behind_root is None:
            behind_root = sum(sizes) > _INLINE_LIMIT or any(isinstance(b, _Later) for b in self.t.buffers)
        with replacing(Path(path)) as aside, aside.open("wb") as f:
            if behind_root:
                self._write_behind_root(f, sizes)
            else:
                f.write(self._pack(sum(sizes)))

    def _write_behind_root(self, f: Any, sizes: list[int]) -> None:
        contents = [b.data for b in self.t.buffers]
        try:
            for buffer, size in zip(self.t.buffers, sizes, strict=True):
                buffer.data, buffer.offset, buffer.size = None, 2 * bool(size), size  # 0 and 1 stand for no offset
            root = self._pack(0)
            end, packed = _round_up(len(root), _ALIGN), cast(Any, schema.Model.GetRootAs(root))
            for i, size in enumerate(sizes):
                if size:  # now that the root's length is known
                    table = packed.Buffers(i)._tab
                    struct.pack_into("<Q", root, table.Pos + table.Offset(_OFFSET_FIELD), end)
                    end = _round_up(end + size, _ALIGN)
            f.write(root)
            for buffer, data, size in zip(self.t.buffers, contents, sizes, strict=True):
                if size:
                    f.write(b"\0" * (-f.tell() % _ALIGN))
                    data = buffer.read() if isinstance(buffer, _Later) else data
                    content = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
                    if len(content) != size:
                        raise ValueError(f"a buffer of {size} bytes was given {len(content)}")
                    f.write(content.data)
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

    def store_later(self, shape: tuple[int, int], group: int, packed: Read, scales: Read) -> Stored:
        """`store` of a weight that is read when the file is written: nibbles [out, in/2] and scales."""
        size = shape[0] * shape[1]
        return Stored(self.later(size // 2, packed), self.later(size // group * 2, scales), shape, group)

    def later(self, length: int, read: Read) -> int:
        """The index of a buffer of `length` bytes that are read when the file is written."""
        self.t.buffers.append(_Later(length, read))
        return len(self.t.buffers) - 1

    def opcode(self, name: str, version: int = 1, custom: str | None = None) -> int:
        """The index of an operator code, made at first use."""
        return self.opcode_of(getattr(schema.BuiltinOperator, name), version, custom)

    def opcode_of(self, code: int, version: int = 1, custom: str | None = None) -> int:
        """`opcode` by the schema's number."""
        for i, known in enumerate(self.t.operatorCodes):
            if (known.builtinCode, known.version) == (code, version) and (
                custom is None or text_of(known.customCode) == custom
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


class Graph:
    """One subgraph; `inputs` and `outputs` are lists of tensor indices."""

    def __init__(self, model: Model, index: int, t: Any) -> None:
        self.model, self.index, self.t = model, index, t
        self._consts: dict[tuple[int, tuple[int, ...], str], int] = {}
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
        """A constant; a plain list means int32. Equal ones are one tensor, which has its first name.

        LiteRT takes a time to load that grows with the square of a graph's tensors: it walks a list for each.
        """
        array = np.asarray(value, None if isinstance(value, np.ndarray | np.generic) else np.int32)
        key = self.model.buffer(array), array.shape, str(array.dtype)
        if key not in self._consts:
            self._consts[key] = self.tensor(array.shape, key[2], name, key[0])
        return self._consts[key]

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
        # Without keepNumDims the XNNPACK delegate reshapes x to [-1, in], which copies it even with two axes.
        return self.add("FULLY_CONNECTED", [x, weight, -1], out, version=version, keepNumDims=True)

    def embedding_lookup(self, ids: int, table: int, out: Out | None = None) -> int:
        """Rows of an INT4 table [V, D], as float32: ids [n] to [n, D]."""
        if out is None:
            out = ((*self.shape(ids), self.shape(table)[1]), "float32")
        return self.add("EMBEDDING_LOOKUP", [ids, table], out, version=4)

    def branch(self, cond: int, inputs: Sequence[int], then: "Graph", other: "Graph", out: Out) -> int:
        """Run one of two subgraphs on `inputs`, which both take: the first if `cond`, [] or [1], holds."""
        options = {"thenSubgraphIndex": then.index, "elseSubgraphIndex": other.index}
        return self.add("IF", [cond, *inputs], out, **options)

    def chain(
        self, conds: Sequence[int], branches: Sequence["Graph"], skip: "Graph", inputs: Sequence[int], out: Out
    ) -> int:
        """Append an IF for each of `conds`, with the same `inputs` but for the first, the value so far.

        A branch, or where its cond does not hold `skip`, gives the next value, the last of them `out`. The others
        are written to two tensors in turn, which nothing but the next IF may read. A tensor for each of the 1,880
        IFs in a token of size S took 0.4 ms of 9.6: the runtime looks at the shape of each output, which weights
        have driven out of the processor's cache since the last token.
        """
        value, *others = inputs
        kind = self.like(value)
        turns = [self.tensor(*kind) for _ in range(min(len(conds) - 1, 2))]
        ends: list[Out] = [turns[i % 2] for i in range(len(conds) - 1)] + [out]
        for cond, branch, end in zip(conds, branches, ends, strict=True):
            value = self.branch(cond, [value, *others], branch, skip, end)
        return value

    def copy(self, op: Any, source: "Graph", known: dict[int, int], label: str) -> None:
        """Append an operator of another file's graph; `known`, its tensors to mine, grows by those it brings along.

        Its constants come with it, stored once; its other tensors get the name `label` and the operator's.
        """
        code = source.model.t.operatorCodes[op.opcodeIndex]
        t = copy(op)
        t.opcodeIndex = self.model.opcode_of(code.builtinCode, code.version, text_of(code.customCode))
        name = f"{label}/{BUILTIN_NAMES[code.builtinCode].lower()}"
        for i in {int(i) for i in (*op.inputs, *op.outputs)} - {-1, *known}:
            data = source.model.t.buffers[source.t.tensors[i].buffer].data
            known[i] = self.const(source.array(i)) if data is not None else self.tensor(*source.like(i), name)
        t.inputs, t.outputs = (
            np.array([known.get(int(i), -1) for i in v], np.int32) for v in (op.inputs, op.outputs)
        )
        self.ops.append(t)


class _Later(schema.BufferT):
    """A buffer whose content is read when the file is written."""

    def __init__(self, length: int, read: Read) -> None:
        super().__init__()
        self.length, self.read = length, read


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


def text_of(value: Any) -> Any:
    """A name of the schema, which is bytes in what was read and text in what was made."""
    return value.decode() if isinstance(value, bytes) else value
