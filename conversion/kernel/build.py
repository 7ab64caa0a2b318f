"""The kernel's shared library, compiled at first use and kept in the user's cache by what it was made of.

CMakeLists.txt builds the same sources for phones; here a compiler is all that is needed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from moe_jax.errors import UserError

# LiteRT looks for accelerators by this name, CPU ones included.
LIBRARY = "libLiteRtGpuAccelerator.so"
_SOURCES = Path(__file__).with_name("src")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-w")


@functools.cache
def library() -> Path:
    """The library, built if there is none of these sources; UserError without a C++ compiler or if it fails."""
    compiler = find_compiler()
    if compiler is None:
        raise UserError(
            "the kernel needs a C++ compiler and none of $CXX, c++, g++ and clang++ is there; "
            "install g++, or export with --experts sparse, which needs no kernel"
        )
    sources = sorted(path for path in _SOURCES.iterdir() if path.stem != "layer_main")
    command = [compiler, *_FLAGS, f"-Wl,-soname,{LIBRARY}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    # A home may be shared by machines of several kinds, and GCC's version does not tell them apart.
    digest = hashlib.sha256("\0".join([*command, version, platform.machine()]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "moe_jax" / "kernel" / digest.hexdigest()[:16]
    if not (folder / LIBRARY).exists():
        _compile([*command, *(str(path) for path in sources if path.suffix == ".cc")], folder)
    return folder / LIBRARY


def find_compiler() -> str | None:
    """The path of $CXX or of the first usual C++ compiler."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compile(command: list[str], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, LIBRARY)
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.splitlines() or [f"status {done.returncode}"]
                first = next((line for line in lines if "error" in line), lines[0])
                raise UserError(f"{command[0]} cannot compile the kernel ({first}); name another compiler in CXX")
            made.replace(folder / LIBRARY)
    except OSError as error:
        raise UserError(f"cannot build in {folder}: {error.strerror}; set XDG_CACHE_HOME elsewhere") from error
