"""C++ of this package, compiled at first use and kept in the user's cache by what it was made of.

CMakeLists.txt builds the kernel for phones; here a compiler is all that is needed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_jax.errors import UserError

# LiteRT looks for accelerators by this name, CPU ones included.
LIBRARY = "libLiteRtGpuAccelerator.so"
_SOURCES = Path(__file__).with_name("src")
_IDENTITY = ("--version", "-dumpmachine")  # what tells compilers apart
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-w")


@functools.cache
def library(target: str = "") -> Path:
    """The kernel, built if there is none of these sources; for another machine than this by its GNU name.

    Raises UserError without a C++ compiler or if it fails.
    """
    compiler = find_compiler(target)
    if compiler is None:
        wanted, package = "none of $CXX, c++, g++ and clang++ is", "g++"
        if target:
            wanted, package = f"{target}-g++ is not", f"g++-{target}"
        raise UserError(
            f"the kernel needs a C++ compiler and {wanted} there; install {package}, or export with --experts "
            "sparse, which needs no kernel"
        )
    sources = sorted(path for path in _SOURCES.iterdir() if path.stem != "layer_main")
    return compiled(LIBRARY, sources, compiler, (*_FLAGS, f"-Wl,-soname,{LIBRARY}"))


def find_compiler(target: str = "") -> str | None:
    """The path of $CXX or of the first usual C++ compiler; of the cross compiler for a target."""
    names = (f"{target}-g++",) if target else (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def cache() -> Path:
    """The folder of what is made once per user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_jax"


def compiled(name: str, sources: Sequence[Path], compiler: str, flags: Sequence[str]) -> Path:
    """A library or program of these sources (headers among them), built if there is none; UserError if it fails."""
    command = [compiler, *flags]
    # A home may be shared by machines of several kinds, and GCC's version does not tell them apart.
    kind = [subprocess.run([compiler, ask], capture_output=True, text=True).stdout for ask in _IDENTITY]
    digest = hashlib.sha256("\0".join([*command, *kind]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = cache() / "kernel" / digest.hexdigest()[:16]
    if not (folder / name).exists():
        _compile([*command, *(str(path) for path in sources if path.suffix == ".cc")], folder / name)
    return folder / name


def _compile(command: list[str], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch, path.name)
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                lines = done.stderr.splitlines() or [f"status {done.returncode}"]
                telling = (line for word in ("No space left", "error") for line in lines if word in line)
                first = next(telling, lines[0])
                raise UserError(f"{command[0]} cannot compile {path.name} ({first}); name another compiler in CXX")
            made.replace(path)
    except OSError as error:
        raise UserError(f"cannot build in {path.parent}: {error.strerror}; set XDG_CACHE_HOME elsewhere") from error
