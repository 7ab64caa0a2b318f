"""The engine as a program answers what the engine in this process answers; what it cannot do is one sentence.

The program runs on this machine here, with the library of the installed wheel; on Arm in tests/conversion/arm.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import litert_lm
import numpy as np
import pytest

from conversion.arm import machine
from conversion.arm.engine import RemoteEngine
from conversion.arm.machine import Machine
from conversion.kernel import build
from conversion.litert.engine import Engine
from moe_jax.errors import UserError
from tests.conversion.conftest import CONTEXT

HERE = Machine("", (), Path(litert_lm.__file__).with_name("liblitert-lm.so"))
TEXT = "def add(first):\n    return first + 1  # und nochmal: ä€"
pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")
routed = pytest.mark.parametrize("exported", ["moe"], indirect=True)


@routed
@pytest.mark.parametrize("experts", ["sparse", "kernel"])
def test_the_program_gives_the_bits_of_the_engine_in_this_process(exported, tmp_path, experts):
    path = exported.bundle if experts == "sparse" else exported.again(tmp_path, experts)
    with Engine(path, threads=1) as engine, RemoteEngine(path, engine, HERE) as program:
        assert np.array_equal(program.score(TEXT), engine.score(TEXT))
        for prefix in (TEXT, "def", "while True:\n"):
            assert program.next_token(prefix) == engine.next_token(prefix)
        assert program.token_text(70) == engine.token_text(70)
        assert not any(program.token_text(token) for token in engine.stop_tokens)


@routed
def test_a_text_that_does_not_fit_is_refused_and_the_next_is_answered(exported):
    with Engine(exported.bundle, threads=1) as engine, RemoteEngine(exported.bundle, engine, HERE) as program:
        for ask in (program.score, program.next_token):
            with pytest.raises(UserError, match="refused a text; it must be shorter than the bundle's context"):
                ask("def add(first):\n" * CONTEXT)
        assert np.array_equal(program.score(TEXT), engine.score(TEXT))


@routed
def test_a_program_that_dies_says_how(exported):
    with Engine(exported.bundle, threads=1) as engine, RemoteEngine(exported.bundle, engine, HERE) as program:
        os.kill(program._process.pid, signal.SIGKILL)
        with pytest.raises(
            UserError, match=r"the engine ended with status -9 \(without a word\); another processor"
        ):
            program.score(TEXT)


@routed
def test_what_cannot_start_says_why(exported):
    with Engine(exported.bundle, threads=1) as engine:
        with pytest.raises(UserError, match=r"ended with status 1 \(.*nowhere\.so.*No such file"):
            RemoteEngine(exported.bundle, engine, Machine("", (), Path("/nowhere.so")))
        with pytest.raises(UserError, match=r"the engine env -i false ended with status 1"):
            RemoteEngine(exported.bundle, engine, Machine("", ("env", "-i", "false"), HERE.runtime))


@pytest.mark.parametrize(
    ("there", "missing"), [([], "qemu-aarch64"), (["qemu-aarch64-static"], f"{machine.TARGET}-g++")]
)
def test_what_emulation_lacks_is_named(monkeypatch, tmp_path, there, missing):
    for name in there:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=rf"{missing.replace('+', '.')} is not here; install qemu-user"):
        machine.arm("cortex-a76")


def test_a_cross_compiler_alone_is_not_enough(monkeypatch, tmp_path):
    (tmp_path / "qemu-aarch64").touch(mode=0o755)
    compiler = tmp_path / f"{machine.TARGET}-g++"
    compiler.write_text("#!/bin/sh\necho ld-linux-aarch64.so.1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"aarch64-linux-gnu-g\+\+ has no C library for Arm; install libc6-dev"):
        machine.arm("cortex-a76")


def test_an_emulator_that_crashes_is_told_before_the_climb(monkeypatch, tmp_path):
    loader = tmp_path / "lib/ld-linux-aarch64.so.1"
    for name, said in (
        ("qemu-aarch64", "qemu-aarch64 version 7.2.22 (Debian)"),
        (f"{machine.TARGET}-g++", str(loader)),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"qemu-aarch64 is version 7\.2\.22, which crashes; install QEMU 10"):
        machine.arm("cortex-a76")


def test_a_package_index_out_of_reach_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        UserError, match=r"pip cannot fetch litert-lm-api .* for Arm \(.*\); is the package index in"
    ):
        machine._library()
    assert list((tmp_path / "moe_jax/arm").iterdir()) == []
