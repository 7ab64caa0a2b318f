"""Ops that only move numbers about a graph: other shapes, rows, parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conversion.litert.flatbuffer import BOOL, Graph


def reshape(g: Graph, tensor: int, *shape: int) -> int:
    """The same numbers in another shape."""
    kind = (shape, g.like(tensor)[1])
    return g.add("RESHAPE", [tensor, g.const(shape)], kind, newShape=list(shape))


def take(g: Graph, table: int, ids: int) -> int:
    """Rows of `table` along its first axis."""
    (_, *rest), kind = g.like(table)
    return g.add("GATHER", [table, ids], ((*g.shape(ids), *rest), kind))


def split(g: Graph, tensor: int, sizes: Sequence[int], axis: int = 0) -> list[int]:
    """The parts of a tensor which have these sizes along an axis."""
    if len(sizes) == 1:
        return [tensor]
    shape, kind = g.like(tensor)
    outs = [((*shape[:axis], size, *shape[axis + 1 :]), kind) for size in sizes]
    parts = g.add("SPLIT_V", [tensor, g.const(sizes), g.const(np.int32(axis))], *outs, numSplits=len(outs))
    return list(parts)


def unpack(g: Graph, tensor: int, axis: int = 0) -> list[int]:
    """The slices along an axis, as tensors of one rank less."""
    shape, kind = g.like(tensor)
    outs = [((*shape[:axis], *shape[axis + 1 :]), kind)] * shape[axis]
    parts = g.add("UNPACK", [tensor], *outs, num=len(outs), axis=axis)
    return list(parts) if len(outs) > 1 else [parts]


def equal(g: Graph, number: int, values: range) -> list[int]:
    """For each of some values whether a number [] is it."""
    all_of_them = g.const(np.arange(values.start, values.stop, dtype=np.int32))
    return unpack(g, g.add("EQUAL", [number, all_of_them], ((len(values),), BOOL)))
