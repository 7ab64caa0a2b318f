"""TPU slices by name: what Google calls each family, which shapes it has, and how many machines a shape takes.

A name is a family and a size as Google counts it (`v5e-256`, `v5p-128`), or a family and a shape (`v5p:4x4x4`).
Sizes count TensorCores where a chip has two (v4, v5p, tpu7x) and chips elsewhere; a size means the shape closest to
a cube, as in Google's own tables.
"""

from __future__ import annotations

import math
import re
from functools import cache
from typing import NamedTuple

from moe_jax.errors import UserError

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST = 64  # cubes of 4x4x4 along one axis


class Family(NamedTuple):
    """One TPU generation's names; an empty `runtime` means that queued resources do not offer it."""

    label: str  # node label cloud.google.com/gke-tpu-accelerator
    machine: str  # GKE machine type without its chip count
    cores: int  # per chip, as sizes count them
    cubes: int  # the largest slice; 0 for the families that are flat
    product: str  # prefix of accelerator types
    runtime: str  # TPU VM image with which queued resources start


FAMILIES = {
    "v4": Family("tpu-v4-podslice", "ct4p-hightpu", 2, 64, "v4", "tpu-ubuntu2204-base"),
    "v5e": Family("tpu-v5-lite-podslice", "ct5lp-hightpu", 1, 0, "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": Family("tpu-v5p-slice", "ct5p-hightpu", 2, 140, "v5p", "v2-alpha-tpuv5"),
    "v6e": Family("tpu-v6e-slice", "ct6e-standard", 1, 0, "v6e", "v2-alpha-tpuv6e"),
    "tpu7x": Family("tpu7x", "tpu7x-standard", 2, 144, "tpu7x", ""),
}


class Slice(NamedTuple):
    """One slice: `family` is a key of FAMILIES, `shape` its chips along each axis."""

    family: str
    shape: tuple[int, ...]

    @property
    def facts(self) -> Family:
        """What the family is called elsewhere."""
        return FAMILIES[self.family]

    @property
    def topology(self) -> str:
        """The shape as GKE writes it, `4x4x8`."""
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """Chips of one machine, the same on all of them."""
        return min(self.chips, 4)

    @property
    def hosts(self) -> int:
        """Machines of the slice."""
        return self.chips // self.chips_per_host

    @property
    def size(self) -> str:
        """`256` of `v5e-256`: cores or chips, as the family counts."""
        return str(self.chips * self.facts.cores)

    @property
    def machine_type(self) -> str:
        """The GKE machine type of its nodes."""
        return f"{self.facts.machine}-{self.chips_per_host}t"

    @property
    def is_default(self) -> bool:
        """Whether the size alone means this shape."""
        return _by_chips(self.family)[self.chips][0] == self.shape


def parse_slice(name: str) -> Slice:
    """The slice called `name` (`v5e-256`, `v5litepod-256` or `v5e:16x16`); a UserError names the nearest ones."""
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", name.lower())
    products = {facts.product: family for family, facts in FAMILIES.items()}
    if match is None or (family := products.get(match[1], match[1])) not in FAMILIES:
        raise UserError(
            f"--topology {name!r} is no TPU slice; write a family ({', '.join(FAMILIES)}) and a size or shape, "
            "as in v5e-256 or v5e:16x16"
        )
    known = _by_chips(family)
    if match[3]:
        shape = tuple(map(int, match[3].split("x")))
        if shape in known.get(math.prod(shape), ()):
            return Slice(family, shape)
        near = [Slice(family, item) for n in _nearest(list(known), math.prod(shape)) for item in known[n]]
        choices = [f"{family}:{item.topology}" for item in near]
    else:
        cores = FAMILIES[family].cores
        chips, odd = divmod(int(match[2]), cores)
        if chips in known and not odd:
            return Slice(family, known[chips][0])
        choices = [f"{family}-{n * cores}" for n in _nearest(list(known), chips)]
    raise UserError(
        f"--topology {name!r}: {family} has no slice of that form; the nearest are {', '.join(choices)}"
    )


def _nearest(sizes: list[int], wanted: int) -> list[int]:
    return sorted(sorted(sizes, key=lambda n: abs(math.log(n / max(wanted, 1))))[:3])


@cache
def _by_chips(family: str) -> dict[int, list[tuple[int, ...]]]:
    """Chips -> shapes, the most compact first: the default of that size."""
    cubes = FAMILIES[family].cubes
    shapes: list[tuple[int, ...]] = list(_BELOW_A_CUBE if cubes else _FLAT)
    for a in range(1, math.isqrt(cubes) + 1):
        for b in range(a, cubes // a + 1):
            shapes += [(4 * a, 4 * b, 4 * c) for c in range(b, min(cubes // (a * b), _LONGEST) + 1)]
    found: dict[int, list[tuple[int, ...]]] = {}
    for shape in sorted(shapes, key=lambda s: (math.prod(s), sum(s))):
        found.setdefault(math.prod(shape), []).append(shape)
    return found
