"""An engine that runs as a program on another machine than this one, behind the calls that `verify` judges by."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from conversion.arm.machine import Machine
from conversion.kernel import register
from conversion.kernel.build import compiled, find_compiler, library
from conversion.litert import container
from conversion.litert.engine import Engine
from moe_jax.errors import UserError

_SOURCE = Path(__file__).with_name("engine_main.cc")
_FLAGS = ("-std=c++17", "-O2", "-Wl,--no-as-needed", "-ldl")


class RemoteEngine:
    """A bundle loaded there, a context manager; `here` is the same bundle in this machine's engine.

    Tokens are looked up in `here`; likelihoods and choices are computed there, by `engine_main.cc`.
    """

    def __init__(self, path: str | Path, here: Engine, machine: Machine, threads: int = 1) -> None:
        self.token_text, self._start = here.token_text, here.start_text
        compiler = find_compiler(machine.target)
        if compiler is None:
            raise UserError("asking another engine needs a C++ compiler; install g++")
        with container.intact(path):
            needs_kernel = register.needed(container.tflite(path))
        self._where = " ".join(["the engine", *machine.before[:3]])
        command = [*machine.before, compiled("engine", [_SOURCE], compiler, _FLAGS), machine.runtime, path]
        with contextlib.ExitStack() as stack:
            command += [stack.enter_context(tempfile.TemporaryDirectory()), threads]
            command += [library(machine.target)] if needs_kernel else []
            self._said = stack.enter_context(tempfile.TemporaryFile())
            self._process = stack.enter_context(
                subprocess.Popen(
                    [*map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
                )
            )
            self._read("ready")
            self._resources = stack.pop_all()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def next_token(self, prefix: str) -> str:
        """As `Engine.next_token`."""
        return self._ask(prefix, "", "text").decode()

    def score(self, text: str) -> np.ndarray:
        """As `Engine.score`."""
        return np.frombuffer(self._ask(self._start, text, "scores"), np.float32).astype(np.float64)

    def _ask(self, prefix: str, text: str, kind: str) -> bytes:
        first, second = prefix.encode(), text.encode()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said at its end is read below
            self._process.stdin.write(b"%d %d\n%s%s" % (len(first), len(second), first, second))
            self._process.stdin.flush()
        return self._read(kind)

    def _read(self, kind: str) -> bytes:
        assert self._process.stdout is not None
        found, _, count = self._process.stdout.readline().decode().partition(" ")
        if found == kind:
            return self._process.stdout.read(int(count) * (4 if kind == "scores" else 1))
        if found == "refused":
            raise UserError("the engine refused a text; it must be shorter than the bundle's context")
        status = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines() or ["without a word"]
        raise UserError(
            f"{self._where} ended with status {status} ({lines[0]}); another processor may do, or QEMU 10 where it "
            "is older"
        )
