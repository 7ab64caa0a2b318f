"""Phones: what their memory and processor could do at most, and what was published about MobileMoE on them.

Bandwidths are the memory's (bus width times rate), clocks the makers'. A core multiplies and adds 32 INT8 pairs an
instruction (Arm's i8mm) in as many instructions a cycle as it has vector pipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from moe_jax.errors import UserError

_PAIRS = 32  # of one SMMLA instruction on 128 bits


@dataclass(frozen=True)
class Measured:
    """Published figures of one model: tokens/s written at a context, seconds until the first token of a prompt."""

    decode: Mapping[int, float]
    first_token: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Phone:
    """`bandwidth` in GB/s, `memory` in GB; `cores` that run a model: (how many, GHz, vector pipes) of each kind.

    `measured` by config name: arXiv 2605.27358 and articles on it; ExecuTorch with a fused operator for experts,
    INT4 weights, on the CPU with as many threads as there are `cores`. (Articles name the GPU for the iPhone's
    fastest prefill; the paper's own table was not at hand.)
    """

    name: str
    chip: str
    bandwidth: float
    memory: int
    cores: tuple[tuple[int, float, int], ...]
    measured: Mapping[str, Measured] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def peak(self) -> float:
        """INT8 multiply-adds a second."""
        return sum(count * clock * 1e9 * pipes * _PAIRS for count, clock, pipes in self.cores)


PHONES = (
    Phone(
        # LPDDR5X-10600 on 64 bits; Oryon, 4 pipes.
        "Galaxy S25", "Snapdragon 8 Elite for Galaxy", 84.8, 12, ((2, 4.47, 4), (2, 3.53, 4)),
        {
            "dense_twin": Measured(
                {256: 61.3, 1024: 45.8, 4096: 18.6, 8192: 10.6}, {1024: 4.26, 4096: 35.62}
            ),
            "mobilemoe_s": Measured(
                {256: 138.1, 1024: 112.0, 4096: 48.9, 8192: 25.8}, {1024: 2.01, 4096: 16.36}
            ),
            "mobilemoe_m": Measured({256: 83.6, 8192: 15.4}),
            "mobilemoe_l": Measured({256: 53.4, 8192: 8.9}),
        },
    ),
    Phone(
        # LPDDR5X-7500 on 64 bits; two performance cores, 4 pipes.
        "iPhone 16 Pro", "A18 Pro", 60.0, 8, ((2, 4.04, 4),),
        {
            "dense_twin": Measured(
                {256: 61.0, 1024: 48.5, 4096: 17.9, 8192: 10.6}, {1024: 6.03, 4096: 39.08}
            ),
            "mobilemoe_s": Measured(
                {256: 204.6, 1024: 148.4, 4096: 54.2, 8192: 32.2}, {1024: 2.14, 4096: 13.86}
            ),
            "mobilemoe_m": Measured({256: 106.8, 8192: 17.2}),
            "mobilemoe_l": Measured({256: 59.4, 8192: 10.8}),
        },
    ),
    # LPDDR5X-9600 on 64 bits; Cortex-X4 with 4 pipes, A720 with 2.
    Phone("Galaxy S24", "Snapdragon 8 Gen 3", 76.8, 8, ((1, 3.3, 4), (3, 3.2, 2))),
    # LPDDR5-6400 on 64 bits.
    Phone("iPhone 15 Pro", "A17 Pro", 51.2, 8, ((2, 3.78, 4),)),
    # LPDDR5X-8533 on 64 bits; Cortex-X4, A720.
    Phone("Pixel 9", "Tensor G4", 68.3, 12, ((1, 3.1, 4), (3, 2.6, 2))),
    # The middle of the market: LPDDR5-6400 on 32 bits; four A720.
    Phone("Redmi Note 14 Pro+", "Snapdragon 7s Gen 3", 25.6, 8, ((1, 2.5, 2), (3, 2.4, 2))),
)  # fmt: skip


def find(name: str) -> Phone:
    """The phone of a name, whatever its case; UserError with the names there are."""
    for phone in PHONES:
        if phone.name.casefold() == name.casefold():
            return phone
    names = ", ".join(phone.name for phone in PHONES)
    raise UserError(
        f"there is no phone {name!r} in the table; take one of {names}, or add it to conversion/phones.py"
    )
