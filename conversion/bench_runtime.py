"""A bundle's .tflite in LiteRT's CompiledModel through its C interface, because only that gives out a profile.

The same runtime, delegate and options as in the LiteRT-LM engine, driven as the engine does it: prefill in the
signatures' lengths, then one token at a time, with the cache's buffers being input and output at once.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ai_edge_litert
import numpy as np

from conversion import MASKED
from moe_jax.errors import UserError

_ALIGN, _CPU = 64, 1
_FOLDER, _STRING = 22, 8  # an environment's option: where accelerators are looked for, and that it is a string
_SIDES = (("Input", "NumSignatureInputs"), ("Output", "NumSignatureOutputs"))


class Event(NamedTuple):
    """Something that the runtime timed: `kind` 2 for a node of a graph, 4 or 8 for an op of its delegate."""

    name: str
    kind: int
    microseconds: int
    node: int
    graph: int


class _Event(ctypes.Structure):
    _fields_ = (
        ("tag", c_char_p), ("kind", c_int), ("start", c_uint64), ("elapsed", c_uint64),
        ("memory", c_size_t * 6), ("node", c_uint64), ("graph", c_uint64), ("source", c_int),
    )  # fmt: skip


class _Any(ctypes.Structure):
    _fields_ = (("kind", c_int), ("value", c_char_p))


class _Option(ctypes.Structure):
    _fields_ = (("tag", c_int), ("any", _Any))


class Runtime:
    """A model with its signatures' buffers; `tokens` are those taken in so far."""

    def __init__(self, tflite: memoryview, threads: int, cache_path: str | Path) -> None:
        """Load a model that stays in `tflite`; packed weights go to `cache_path`."""
        self._content = np.frombuffer(tflite, np.uint8)
        self.tokens, self._arrays, self._calls = 0, {}, {}
        with quiet():
            environment, options = _environment(tflite), _new("LiteRtCreateOptions")
            _do("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
            _add_options(options, b"runtime_options_string", "enable_profiling = true\n")
            cpu = f'num_threads = {threads}\nweight_cache_file_path = "{cache_path}"\n'
            _add_options(options, b"xnnpack", cpu)
            place = c_void_p(self._content.ctypes.data), c_size_t(self._content.size)
            self._model = _new("LiteRtCreateModelFromBuffer", environment, *place)
            self._compiled = _new("LiteRtCreateCompiledModel", environment, self._model, options)
            self._profiler = _new("LiteRtCompiledModelGetProfiler", self._compiled)
            for index in range(_count("LiteRtGetNumModelSignatures", self._model)):
                self._add_signature(index)
        lengths = (name.removeprefix("prefill_") for name in self._calls if name != "decode")
        self.lengths = sorted(map(int, lengths), reverse=True)

    def prefill(self, ids: Sequence[int]) -> list[int]:
        """Take in tokens in calls as long as there are signatures for: the lengths of the calls."""
        calls, begun = [], 0
        while begun < len(ids):
            left = len(ids) - begun
            length = next((n for n in self.lengths if n <= left), self.lengths[-1])
            part = list(ids[begun : begun + length])
            self._run(f"prefill_{length}", [*part, *[0] * (length - len(part))], len(part))
            calls.append(length)
            begun += len(part)
        return calls

    def decode(self, token: int) -> np.ndarray:
        """Take in one token: the logits [V] of the next."""
        self._run("decode", [token], 1)
        return self._view("decode", "logits", np.float32)

    @contextmanager
    def profiled(self) -> Iterator[list[Event]]:
        """A list that holds, after the block, what ran in it, in order."""
        events: list[Event] = []
        _do("LiteRtStartProfiler", self._profiler)
        yield events
        _do("LiteRtStopProfiler", self._profiler)
        count = c_int()
        _do("LiteRtGetNumProfilerEvents", self._profiler, byref(count))
        found = (_Event * count.value)()
        _do("LiteRtGetProfilerEvents", self._profiler, count, found)
        events += [Event(e.tag.decode(), e.kind, e.elapsed, e.node, e.graph) for e in found]

    def _run(self, call: str, ids: list[int], used: int) -> None:
        index, *buffers = self._calls[call]
        places = np.arange(self.tokens, self.tokens + len(ids), dtype=np.int32)
        self._view(call, "tokens", np.int32)[:] = ids
        self._view(call, "input_pos", np.int32)[:] = places
        if (call, "mask") in self._arrays:
            mask = self._view(call, "mask", np.float32).reshape(len(ids), -1)
            mask[:] = np.where(np.arange(mask.shape[1]) <= places[:, None], 0, MASKED)
        inputs, outputs = ((c_size_t(len(b)), b) for b in buffers)
        _do("LiteRtRunCompiledModel", self._compiled, c_size_t(index), *inputs, *outputs)
        self.tokens += used

    def _view(self, call: str, name: str, dtype: Any) -> np.ndarray:
        return self._arrays[call, name].view(dtype)

    def _add_signature(self, index: int) -> None:
        signature = _new("LiteRtGetModelSignature", self._model, c_size_t(index))
        call = _text("LiteRtGetSignatureKey", signature)
        sides: list[Any] = []
        for side, count in _SIDES:
            buffers = (c_void_p * _count(f"LiteRtGet{count}", signature))()
            for i in range(len(buffers)):
                name = _text(f"LiteRtGetSignature{side}Name", signature, c_size_t(i))
                tensor = _new(f"LiteRtGetSignature{side}TensorByIndex", signature, c_size_t(i))
                kind = ctypes.create_string_buffer(256)  # its layout is the library's business
                _do("LiteRtGetRankedTensorType", tensor, kind)
                needs = _new(
                    f"LiteRtGetCompiledModel{side}BufferRequirements", self._compiled, c_size_t(index), c_size_t(i)
                )
                size = _count("LiteRtGetTensorBufferRequirementsBufferSize", needs)
                shared = name.startswith("kv_cache")
                array = self._arrays.setdefault(("" if shared else call, name), _aligned(size))
                place = c_void_p(array.ctypes.data), c_size_t(size), None
                buffers[i] = _new("LiteRtCreateTensorBufferFromHostMemory", kind, *place)
            sides.append(buffers)
        self._calls[call] = (index, *sides)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what native code writes to standard error: the runtime tells of accelerators it does not find."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@cache
def quiet_at_exit() -> None:
    """The same for the end of this process, where the runtime tells of the accelerators that go."""
    atexit.register(os.dup2, os.open(os.devnull, os.O_WRONLY), 2)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(ai_edge_litert.__file__).with_name("libLiteRt.so")))


def _do(name: str, *arguments: Any) -> None:
    if status := getattr(_library(), name)(*arguments):
        raise UserError(f"LiteRT's {name} failed with status {status}; export the bundle again")


def _new(name: str, *arguments: Any) -> c_void_p:
    found = c_void_p()
    _do(name, *arguments, byref(found))
    return found


def _count(name: str, *arguments: Any) -> int:
    found = c_size_t()
    _do(name, *arguments, byref(found))
    return found.value


def _text(name: str, *arguments: Any) -> str:
    found = c_char_p()
    _do(name, *arguments, byref(found))
    return (found.value or b"").decode()


def _environment(tflite: memoryview) -> c_void_p:
    """With the kernel where the model has ops of it."""
    from conversion.kernel import register
    from conversion.kernel.build import library

    if not register.needed(tflite):
        return _new("LiteRtCreateEnvironment", 0, None)
    option = _Option(_FOLDER, _Any(_STRING, str(library().parent).encode()))
    return _new("LiteRtCreateEnvironment", 1, byref(option))


def _add_options(options: c_void_p, name: bytes, text: str) -> None:
    libc = ctypes.CDLL(None)
    libc.strdup.restype = c_void_p
    opaque = _new("LiteRtCreateOpaqueOptions", name, c_void_p(libc.strdup(text.encode())), libc.free)
    _do("LiteRtAddOpaqueOptions", options, opaque)


def _aligned(size: int) -> np.ndarray:
    array = np.zeros(size + _ALIGN, np.uint8)
    start = -array.ctypes.data % _ALIGN
    return array[start : start + size]
