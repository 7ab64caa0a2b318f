"""What it takes to run Arm programs here: QEMU's user mode, a cross compiler, and LiteRT-LM's own wheel for Arm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from conversion.kernel.build import cache, find_compiler
from moe_jax.errors import UserError

TARGET = "aarch64-linux-gnu"
_WHEEL = "litert-lm-api"
_PLATFORM = "manylinux_2_27_aarch64"
_TOO_OLD = 7  # 7.2 ends with a segmentation fault of its own
_MEMBER = "litert_lm/liblitert-lm.so"


@dataclass(frozen=True)
class Machine:
    """Where an engine's program runs.

    `target` is the GNU name of the compiler for it ("" for this machine), `before` are the words in front of its
    commands, and `runtime` is LiteRT-LM's library.
    """

    target: str
    before: tuple[str, ...]
    runtime: Path


def arm(processor: str) -> Machine:
    """An emulated `processor` by QEMU's name; one sentence for what is missing."""
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
    compiler = find_compiler(TARGET)
    if emulator is None or compiler is None:
        missing = "qemu-aarch64" if emulator is None else f"{TARGET}-g++"
        raise UserError(
            f"{missing} is not here; install qemu-user (10 is known to work, 7.2 not to) and g++-{TARGET}, "
            "or leave out --arm"
        )
    loader = subprocess.run(
        [compiler, "-print-file-name=ld-linux-aarch64.so.1"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(loader):  # what is not found comes back as it was asked for
        raise UserError(f"{compiler} has no C library for Arm; install libc6-dev-arm64-cross, or leave out --arm")
    said = subprocess.run([emulator, "--version"], capture_output=True, text=True).stdout
    number = re.search(r"version ((\d+)\S*)", said)
    if number and int(number[2]) <= _TOO_OLD:
        raise UserError(f"{emulator} is version {number[1]}, which crashes; install QEMU 10, or leave out --arm")
    root = Path(os.path.normpath(loader)).parents[1]  # above lib/
    before = (emulator, "-cpu", processor, "-L", str(root))
    tried = subprocess.run([*before, loader, "--version"], capture_output=True, text=True)
    if tried.returncode:
        said = (tried.stderr.strip().splitlines() or [f"status {tried.returncode}"])[0]
        raise UserError(f"no program runs on {processor} ({said}); {emulator} -cpu help lists the processors")
    return Machine(TARGET, before, _library())


def _library() -> Path:
    """LiteRT-LM's Arm library of the version that is installed here, fetched once."""
    release = version(_WHEEL)
    kept = cache() / "arm" / f"{_WHEEL}-{release}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        where = ["--platform", _PLATFORM, "--dest", scratch]
        done = subprocess.run([*pip, *where, f"{_WHEEL}=={release}"], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UserError(f"pip cannot fetch {_WHEEL} {release} for Arm ({last}); is the package index in reach?")
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            Path(archive.extract(_MEMBER, scratch)).replace(kept)
    return kept
