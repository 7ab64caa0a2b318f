"""The one table of TPU chips: what a roofline, MFU and the memory check divide by.

Figures are the published peaks of a whole chip. A jax device is a chip, but for tpu7x, where it is half of one:
divide by `devices_per_chip`. Sources: the Cloud TPU pages named in the table for FLOPs, HBM, ICI and data-centre
network; https://jax-ml.github.io/scaling-book/tpus/ for v4's links and network and for v5e's clock;
https://arxiv.org/abs/2304.01433 for v4's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_jax.errors import UserError

GiB = 2**30
LANES = 128  # of every TPU's vector registers


@dataclass(frozen=True)
class Chip:
    """One generation. Bandwidths in bytes/s.

    Attributes:
        name: as in a topology's name, "v5e" of "v5e:4x4".
        device_kinds: `device_kind` of its jax devices.
        bf16_flops: peak FLOP/s of the matrix units.
        hbm_bytes: HBM of the chip; the runtime keeps about a quarter GiB of it.
        hbm_bandwidth: peak, reads and writes together.
        ici_link_bandwidth: of one inter-chip link in ONE direction (the pages give all links, both directions).
        torus_dims: dimensions of the torus; a chip has two links in each.
        wraps_at: an axis whose length is a multiple of this closes to a ring in slices that have the links for it.
        dcn_bandwidth: data-centre network, the chip's share of its host's, one direction.
        devices_per_chip: jax devices per chip.
        clock_hz: of the cores, to turn the compiler's cycles into seconds; None where nothing public gives it.
        source: where the figures stand.
    """

    name: str
    device_kinds: tuple[str, ...]
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_link_bandwidth: float
    torus_dims: int
    wraps_at: int
    dcn_bandwidth: float
    devices_per_chip: int
    clock_hz: float | None
    source: str

    def links(self, topology: tuple[int, ...], group: int | None = None) -> int:
        """Links on which a chip sends in a ring of `group` chips (default: all) within a slice of this shape.

        An axis gives two where it closes to a ring, else one; a group lies along as few axes as hold it.
        """
        # Only whole cubes have the optical links that close a 3-D torus.
        whole = self.torus_dims < 3 or (len(topology) == 3 and all(n % self.wraps_at == 0 for n in topology))
        links, reach = 0, 1
        for length in sorted((n for n in topology if n > 1), reverse=True):
            if reach < (group or math.prod(topology)):
                links += 2 if whole and length % self.wraps_at == 0 else 1
                reach *= length
        return max(links, 1)


_AT = "https://docs.cloud.google.com/tpu/docs/"

# Clocks of v5p and v6e are not published; they follow from the peak and 8 * 128^2 (v5p) or 4 * 256^2 (v6e, whose
# page has two MXUs of that size; then it would run at 3.5 GHz) multiply-adds a cycle. With them the compiler's
# estimate of a copy comes to 72 to 81 % of the HBM's peak on v4, v5e, v5p and v6e alike.
CHIPS = (
    Chip("v4", ("TPU v4",), 275e12, 32 * GiB, 1200e9, 45e9, 3, 4, 6.25e9, 1, 1.05e9, _AT + "v4"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GiB, 819e9, 50e9, 2, 16, 3.125e9, 1, 1.5e9, _AT + "v5e"),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GiB, 2765e9, 100e9, 3, 4, 6.25e9, 1, 1.75e9, _AT + "v5p"),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GiB, 1638e9, 100e9, 2, 16, 12.5e9, 1, 1.75e9, _AT + "v6e"),
    Chip("tpu7x", ("TPU7x",), 2307e12, 192 * GiB, 7380e9, 100e9, 3, 4, 12.5e9, 2, None, _AT + "tpu7x"),
)


def chip_named(name: str) -> Chip:
    """The chip of that name, or UserError with the names there are."""
    for chip in CHIPS:
        if chip.name == name:
            return chip
    raise UserError(f"no chip is called {name!r}: choose one of {', '.join(chip.name for chip in CHIPS)}")


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose jax devices say this `device_kind`; None if it is not in the table."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)
