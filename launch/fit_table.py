"""`python -m launch fit --table`: docs/fit.md, the shipped sizes on the usual slices, and their QAT stages on one.

Mesh, batch and remat policy of a row follow from model, chip and sequence length by one rule: of the candidates of
`--search` with data and fsdp alone, the one that promises most among those whose estimate fits; if the compiler
finds that it does not, the next. What was compiled is kept (`fit_compile.py`): an interrupted table goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import configs
from launch.fit import on_slices, sized
from launch.fit_compile import device_count, say, versions
from launch.fit_report import available_bytes, mesh_words
from launch.fit_search import measure_kept, plan, search
from launch.slices import parse_slice
from moe_jax.files import write_bytes
from moe_jax.progress import time_left

PATH = Path("docs/fit.md")
_TRIES = 3
_HEAD = """\
# What fits where

The pre-training step of every size, and the QAT step on one slice, compiled for real TPU slices without owning
one: memory is what the compiler allocates, the speed is a *ceiling*, at which products, HBM and interconnect each
run at their published peak and hide each other wholly (`launch/roofline.py`). "By the compiler" is the MFU of its
own cycles, one operation after the other, with kernels at peak and without collectives, where a chip's clock is
known. Days and chip-hours are for the stage's {tokens} tokens at the ceiling. The optimizer step has the config's
tokens, in as many microbatches as it takes; batch is sequences per device and microbatch. Mesh, batch and remat
policy are chosen by one rule (`launch/fit_table.py`); `--search` may find better ones.

Made {date} with {versions} by

    pip install -r requirements/tpu.txt
    python -m launch fit --table

The same command goes on after a stop. One row in full: `python -m launch fit mobilemoe_s --topology v5e:4x4`.
"""
_COLUMNS = (
    "config", "slice", "seq", "mesh", "batch", "accum.", "remat", "fits", "args GB", "temp GB", "headroom GB",
    "tokens/s/chip", "MFU at most", "by the compiler", "bound by", "days", "chip-hours", "compile s",
)  # fmt: skip


class Row(NamedTuple):
    """One line of the table."""

    config: str
    topology: str
    seq_len: int


_SIZES = ("mobilemoe_s", "mobilemoe_m", "mobilemoe_l")
ROWS = (
    *(
        Row(config, topology, seq_len)
        for config in _SIZES
        for topology in ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4")
        for seq_len in (2048, 8192)
    ),
    *(Row(f"{config}_qat", "v5e:16x16", 8192) for config in _SIZES),
)


def fit_row(row: Row, overrides: Sequence[str] = ()) -> dict[str, Any] | None:
    """The record of the first choice that fits, else of the last that did not; None if the compiler died of all."""
    kind, base = parse_slice(row.topology), configs.load(row.config, list(overrides))
    cfg = sized(on_slices(base, 1), device_count(kind, 1), row.seq_len, None)
    candidates = plan(cfg, kind, 1, plain=True).candidates
    measure = measure_kept(row.config, kind, 1, base.steps * base.tokens_per_step)
    records = search(candidates, available_bytes(kind), measure, max_compiles=_TRIES, first_fit=True)
    return records[0] if records else None


def make_table(rows: Sequence[Row] = ROWS, path: Path = PATH, overrides: Sequence[str] = ()) -> int:
    """Compile what is missing and write the table; status 1 if a row could not be compiled, 0 otherwise."""
    done: list[tuple[Row, dict[str, Any] | None]] = []
    spent: list[float] = []  # on rows that were not kept
    for number, row in enumerate(rows):
        left = f", at most {time_left(sum(spent) / len(spent) * (len(rows) - number))}" if spent else ""
        say(f"row {number + 1} of {len(rows)}{left}: {row.config} on {row.topology}, {row.seq_len}")
        start = time.monotonic()
        done.append((row, fit_row(row, overrides)))
        if time.monotonic() - start > 5:
            spent.append(time.monotonic() - start)
    write_bytes(path, render_table(done).encode())
    say(f"{path} is written")
    return int(any(record is None for _, record in done))


def render_table(done: Sequence[tuple[Row, dict[str, Any] | None]]) -> str:
    """docs/fit.md of (row, record); the date is that of the oldest record."""
    found = [record for _, record in done if record]
    counts = sorted({r["stage"]["tokens"] for r in found if r["stage"]})
    made = ", ".join(f"{name} {number}" for name, number in (found[0]["versions"] if found else versions()).items())
    head = _HEAD.format(
        tokens=" or ".join(f"{n / 1e9:,.0f}B" for n in counts),
        date=min((r["date"] for r in found), default="-"),
        versions=made,
    )
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    return "\n".join([head, *lines, *(_line(_cells(row, record)) for row, record in done)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, r: dict[str, Any] | None) -> list[str]:
    first = [row.config, row.topology, str(row.seq_len)]
    if r is None:
        return [*first, "the compiler failed", *["-"] * (len(_COLUMNS) - 4)]
    cells = [
        *first, mesh_words(r["mesh"]), f"{r['per_device_batch']:g}", str(r["gradient_accumulation"]), r["remat"],
        "yes" if r["fits"] else "no", f"{r['args_gb']:.2f}", f"{r['temp_gb']:.2f}", f"{r['hbm_headroom_gb']:.2f}",
    ]  # fmt: skip
    if r["fits"]:
        line, stage = r["roofline"], r["stage"]
        cells += [
            f"{line['tokens_per_second_per_chip']:,.0f}", f"{line['mfu_ceiling']:.0%}",
            f"{mfu:.0%}" if (mfu := line["compiler_mfu"]) else "-", line["bound_by"],
            f"{stage['days']:.2g}" if stage["days"] < 0.1 else f"{stage['days']:,.1f}",
            f"{stage['chip_hours']:,.0f}",
        ]  # fmt: skip
    else:
        cells += ["-"] * 6
    return [*cells, f"{r['compile_seconds']:.0f}"]
