"""INT4 of the published folders against the grid of this project: what moves unchanged, and what rounding costs.

The release groups experts along the output and takes any float16 scale; the grid groups along the input and has
scales that are exact in bfloat16 too. A checkpoint holds floats, so imported codes become floats that the grid
rounds to those very codes, and that give codes and scales back bit for bit. (Of floats that were dequantised, a
group whose codes leave room may come back with larger codes and a smaller scale: the same values.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conversion.int4 import Int4
from moe_jax.ops.fake_quant import int4_codes, int4_dequantize, int4_scales

_AT_ONCE = 2**22  # weights
# Ends of the grid, by code: where the largest weight of a group must stand for its scale to follow from it. Both -8
# and 7 come of a weight of 7.5; what came out as -7 was a little less. All are exact in float32.
_ENDS = {-8: -7.5, 7: 7.5, -7: -7.4921875}


def masters(weight: Int4) -> np.ndarray:
    """Floats [..., n] that the grid takes to the codes of `weight`, scales rounded to bfloat16.

    Groups that do not reach an end of the grid, which rounding never makes, are dequantised as they are.
    """
    codes, exact = _grouped(weight.codes, weight.group), weight.scales.astype(np.float32)[..., None]
    plain = codes * exact
    on_grid = int4_scales(exact * np.float32(7.5), -1, 1)  # the grid's scale nearest to this one
    ends = _ends(codes)
    placed = np.where(ends != 0, ends * on_grid, plain)
    flat = placed.reshape(weight.codes.shape)
    scales = int4_scales(flat, -1, weight.group)
    kept = (_grouped(int4_codes(flat, scales, -1, weight.group), weight.group) == codes).all(-1, keepdims=True)
    return np.where(kept & ends.any(-1, keepdims=True), placed, plain).reshape(weight.codes.shape)


def recovered(values: np.ndarray, group: int, placed: bool) -> tuple[Int4, bool]:
    """(codes and scales that `values` [..., n] were made from, whether all of them were), the grid's elsewhere.

    `placed` says that they were made by `masters`, else by dequantising.
    """
    scales = int4_scales(values, -1, group)
    weight = Int4(int4_codes(values, scales, -1, group), scales.astype(np.float16))
    codes, scales = _grouped(weight.codes, group).copy(), weight.scales.copy()
    grouped = _grouped(values, group)
    found = np.zeros(scales.shape, bool)
    if placed:
        scales = _inner_scales(codes, grouped, scales)
        found = (_grouped(masters(Int4(weight.codes, scales)), group) == grouped).all(-1)
    for count in range(8, 0, -1):
        left = np.nonzero(~found)
        if not len(left[0]):
            break
        some = grouped[left]
        peak = np.abs(some).max(-1)
        scale = (peak / np.float32(count)).astype(np.float16)
        step = scale.astype(np.float32)[:, None]
        guess = np.round(some / np.where(step > 0, step, 1))
        fits = (guess * step == some).all(-1) & (guess >= -8).all(-1) & (guess <= 7).all(-1)
        fits &= (step[:, 0] > 0) & np.isfinite(scale)
        places = tuple(axis[fits] for axis in left)
        codes[places], scales[places], found[places] = guess[fits], scale[fits], True
    found |= ~grouped.any(-1)  # nothing but zeros: any scale will do
    missing = ~found
    scales[missing] = weight.scales[missing]
    codes[missing] = _grouped(weight.codes, group)[missing]
    return Int4(codes.reshape(values.shape), scales), bool(found.all())


def _inner_scales(codes: np.ndarray, grouped: np.ndarray, default: np.ndarray) -> np.ndarray:
    """The scale that a weight of each group tells which stands at no end of the grid."""
    size = np.where(_ends(codes) != 0, 0, np.abs(codes))
    best = size.argmax(-1)[..., None]
    code, value = (np.take_along_axis(array, best, -1)[..., 0] for array in (codes, grouped))
    told = np.take_along_axis(size, best, -1)[..., 0] > 0
    return np.where(told, value / np.where(told, code, 1).astype(np.float32), default).astype(np.float16)


def _ends(codes: np.ndarray) -> np.ndarray:
    """What the codes that end each group stand for, zeros elsewhere."""
    ends = np.zeros(codes.shape, np.float32)
    for code, end in _ENDS.items():
        np.copyto(ends, end, where=(codes == code) & ~ends.any(-1, keepdims=True))
    return ends


def _grouped(array: np.ndarray, group: int) -> np.ndarray:
    return array.reshape(*array.shape[:-1], -1, group)


@dataclass
class Loss:
    """How far weights moved, per tensor and in sum: root mean square over that of the weights, and the most."""

    _sums: dict[str, np.ndarray] = field(default_factory=dict)  # of squared differences and squares
    _most: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        """Compare a tensor, or a part of it, before and after."""
        difference = after - before
        sums = np.array([np.square(d, dtype=np.float64).sum() for d in (difference, before)])
        self._sums[name] = self._sums.get(name, np.zeros(2)) + sums
        self._most[name] = max(self._most.get(name, 0.0), float(np.abs(difference).max()))

    @property
    def tensors(self) -> dict[str, dict[str, float]]:
        """The tensors that moved."""
        return {
            name: {"relative_rms": _ratio(sums), "max_abs": self._most[name]}
            for name, sums in self._sums.items()
            if sums[0]
        }

    @property
    def relative_rms(self) -> float:
        """Over all tensors noted, 0 if none moved."""
        return _ratio(sum(self._sums.values(), np.zeros(2)))

    def report(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"relative_rms": self.relative_rms, "tensors": self.tensors}


def _ratio(sums: np.ndarray) -> float:
    return float(np.sqrt(sums[0] / sums[1])) if sums[1] else 0.0


def parts(shape: tuple[int, ...]) -> list[Any]:
    """Indices that cut a tensor into experts, or into blocks of rows: rounding takes many times what it rounds."""
    if len(shape) == 3:
        return list(range(shape[0]))
    rows = max(1, _AT_ONCE // shape[-1])
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def on_grid(values: np.ndarray, axis: int, group: int) -> np.ndarray:
    """`values` as QAT and export see them, in groups along `axis`."""
    scales = int4_scales(values, axis, group)
    return int4_dequantize(int4_codes(values, scales, axis, group), scales, axis, group)
