"""The device mesh of a run: named axes, every size 1 or more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from moe_jax.config import MeshConfig
from moe_jax.errors import UserError

# Outermost first: neighbours on a torus go to the axes that talk most often.
AXES = ("slices", "data", "fsdp", "expert", "context", "tensor")


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all of them); one axis of -1 takes what the others leave.

    With several slices, the devices of one slice share an index on the `slices` axis, so that only that
    axis crosses the data-centre network.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(cfg, len(devices))
    return Mesh(_arrange(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each axis over so many devices; UserError where they do not multiply to that."""
    sizes = {axis: asdict(cfg)[axis] for axis in AXES}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    wanted = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "of one device"
    if free:
        sizes[free[0]] = max(1, devices // fixed)
    if math.prod(sizes.values()) != devices:
        which = "sizes beside the -1" if free else "sizes"
        mend = f"must multiply to {f'a divisor of {devices}' if free else f'{devices}, or leave one of them -1'}"
        raise UserError(f"mesh {wanted} does not fit {devices} device(s); the {which} {mend}")
    return sizes


def _arrange(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    hardware_slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(hardware_slices) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if len(hardware_slices) != shape[0]:
        raise UserError(f"the devices form {len(hardware_slices)} slices; set mesh.slices={len(hardware_slices)}")
    across = (shape[0],) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]), across, devices, allow_split_physical_axes=True
    )  # fmt: skip


def single_device_mesh() -> Mesh:
    """A mesh of one device, for generation and tests."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def local_mesh(width: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh that cuts parameters over this process's chips, as many as divide `width`; on a CPU one device."""
    found = devices or (jax.devices()[:1] if jax.default_backend() == "cpu" else jax.local_devices())
    count = math.gcd(len(found), width)
    return make_mesh(MeshConfig(fsdp=count), found[:count])


def platform(mesh: Mesh | AbstractMesh) -> str:
    """The platform of the mesh's devices, which ahead-of-time compilation need not share with the process.

    A mesh without devices is a plan for TPUs.
    """
    return "tpu" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform
