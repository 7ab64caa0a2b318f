"""Compiling the real train step for TPU slices that are not here, here or in a child whose result is kept.

Kept results lie in .cache/fit, by the config, the slices, the versions and the code that the step is made of; what
is read out of them is worked out anew each time. The child is
`python -m launch.fit_compile CONFIG.json TOPOLOGY SLICES RESULT`.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import configs
from launch.slices import Slice, parse_slice
from moe_jax.chips import chip_named
from moe_jax.config import RunConfig
from moe_jax.errors import MISTAKEN, UserError
from moe_jax.files import write_bytes
from moe_jax.overrides import to_dict

CACHE = Path(".cache/fit")
_PACKAGE = Path(__file__).parents[1] / "moe_jax"
_SOURCES = (
    "model", "ops", "parallel", "chips.py", "config.py", "paths.py", "train/step.py", "train/state.py",
    "train/optimizer.py", "train/balance.py",
)  # fmt: skip
# libtpu asks the cloud's metadata server what machine this is unless told not to, and locks a device file.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler gave for one step; bytes are per device.

    Attributes:
        text: the scheduled program, empty if it did not fit.
        message: the compiler's message if it did not fit, else empty.
        args: state and batch.
        temp: all else that is alive at one time; 0 if it did not fit.
        mesh: axis -> size.
        compile_seconds: trace, lower and compile.
        versions: of the packages that decide the result.
        date: UTC, to the day.
    """

    text: str
    message: str
    args: int
    temp: int
    mesh: dict[str, int]
    compile_seconds: float
    versions: dict[str, str]
    date: str


def use_libtpu() -> None:
    """Make libtpu loadable beside whatever else runs here, before JAX starts a backend.

    Raises:
        UserError: it is not installed.
    """
    found = importlib.util.find_spec("libtpu")
    if found is None or found.origin is None:
        raise UserError("fit needs libtpu, the TPU's compiler; run: pip install -r requirements/tpu.txt")
    os.environ |= _ENVIRONMENT
    import jax

    jax.config.update("jax_platforms", "cpu")  # where jax was imported before, it has read the environment


def devices_of(kind: Slice, slices: int) -> list[Any]:
    """The devices of so many slices, for compiling only."""
    use_libtpu()
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind.family == "v4":
        options["chip_config_name"] = "megacore"  # its machines join both cores of a chip; libtpu unasked does not
    if kind.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # libtpu takes every host for one of four chips
    with _quiet():
        topology = topologies.get_topology_desc(f"{kind.family}:{kind.topology}", platform="tpu", **options)
    return list(topology.devices)


def device_count(kind: Slice, slices: int) -> int:
    """JAX devices of so many slices."""
    return slices * kind.chips * chip_named(kind.family).devices_per_chip


def check_mesh(cfg: RunConfig, kind: Slice, slices: int) -> None:
    """UserError where the mesh does not make up these devices, or cannot cut this run; nothing is compiled."""
    from jax.sharding import AbstractMesh

    from moe_jax.parallel.mesh import AXES, mesh_sizes
    from moe_jax.parallel.rules import check_divisible

    sizes = mesh_sizes(cfg.mesh, device_count(kind, slices))
    if slices > 1 and sizes["slices"] != slices:
        raise UserError(f"mesh.slices is {sizes['slices']}, but the devices form {slices} slices; say it once")
    check_divisible(cfg, AbstractMesh(tuple(sizes.values()), AXES))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what libtpu writes of the host's missing TPUs, unless something fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compile_step(cfg: RunConfig, kind: Slice, slices: int = 1) -> Compiled:
    """Trace, lower and compile one step of `cfg`.

    Raises:
        UserError: the mesh cannot cut this run; nothing has been compiled.
    """
    devices = devices_of(kind, slices)
    import jax
    import jax.numpy as jnp

    from launch.hlo_memory import read_out_of_memory
    from moe_jax.parallel.mesh import make_mesh
    from moe_jax.parallel.rules import sharding
    from moe_jax.train.state import abstract_state
    from moe_jax.train.step import make_train_step

    mesh = make_mesh(cfg.mesh, devices)
    state = abstract_state(cfg, mesh)
    shape, where = (cfg.data.global_batch_size, cfg.data.seq_len), sharding(mesh, ("batch", "sequence"))
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "loss_mask" else jnp.int32, sharding=where)
        for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")
    }
    start, text, message = time.perf_counter(), "", ""
    args = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state, batch))
        if leaf.sharding.memory_kind != "pinned_host"
    )
    temp = 0
    try:
        jitted: Any = make_train_step(cfg, mesh)
        step = jitted.trace(state, batch).lower(lowering_platforms=("tpu",)).compile()
        memory, text = step.memory_analysis(), step.as_text() or ""
        args, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if read_out_of_memory(message) is None:
            raise
    seconds = time.perf_counter() - start
    sizes = {axis: int(size) for axis, size in mesh.shape.items()}
    return Compiled(text, message, args, temp, sizes, seconds, versions(), time.strftime("%Y-%m-%d", time.gmtime()))


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"# {text}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """The packages that decide what comes out of the compiler."""
    return {name: version(name) for name in ("jax", "jaxlib", "libtpu")}


# ---- kept results ---------------------------------------------------------------------------------


def cache_path(cfg: RunConfig, kind: Slice, slices: int) -> Path:
    """Where the result for exactly this step is kept."""
    use_libtpu()
    files = [file for part in _SOURCES for file in sorted((_PACKAGE / part).rglob("*.py")) or [_PACKAGE / part]]
    code = [ast.dump(ast.parse(file.read_text())) for file in files]  # comments and layout decide nothing
    flags = [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    what = json.dumps([to_dict(cfg), kind, slices, versions(), flags, code])
    return CACHE / f"{hashlib.sha256(what.encode()).hexdigest()[:20]}.json.gz"


def _read(path: Path) -> Compiled:
    return Compiled(**json.loads(gzip.decompress(path.read_bytes())))


def compile_kept(cfg: RunConfig, kind: Slice, slices: int = 1) -> Compiled:
    """The kept result, else that of a child process: its memory is free again when it ends.

    Raises:
        UserError: the child refused the mesh, or died; nothing is kept then.
    """
    path = cache_path(cfg, kind, slices)
    if path.exists():
        return _read(path)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        config.write_text(json.dumps(to_dict(cfg)))
        words = [str(config), f"{kind.family}:{kind.topology}", str(slices), str(path)]
        found = [str(_PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        child = subprocess.run(
            [sys.executable, "-m", "launch.fit_compile", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if path.exists():
        return _read(path)
    said = (child.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")
    raise UserError(said if child.returncode == MISTAKEN else f"the compiler ended with {child.returncode}: {said}")


def _child(config: str, topology: str, slices: str, path: str) -> None:
    compiled = compile_step(configs.load(config), parse_slice(topology), int(slices))
    write_bytes(path, gzip.compress(json.dumps(asdict(compiled)).encode()))


if __name__ == "__main__":
    try:
        _child(*sys.argv[1:])
    except UserError as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        sys.exit(MISTAKEN)
