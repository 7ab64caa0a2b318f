"""`python -m launch fit`: does this config fit these TPU slices, and how fast can it be there?"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import configs
from launch.fit_compile import CACHE, Compiled, cache_path, check_mesh, compile_kept, device_count, say, use_libtpu
from launch.slices import Slice, parse_slice
from moe_jax.command_line import at_least
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import write_json

_NO_ROOM = 2  # the exit status of a step that does not fit
_EXAMPLES = """\
Examples:
  python -m launch fit mobilemoe_s --topology v5e:4x4 --per-device-batch 8
  python -m launch fit mobilemoe_l --topology v5p:4x4x4 --slices 2 --seq-len 8192 --per-device-batch 1 mesh.data=2
  python -m launch fit mobilemoe_s --topology v5e:16x16 --search
  python -m launch fit --table                  docs/fit.md: S, M and L on six slices; the same command goes on
"""


def sized(cfg: RunConfig, devices: int, seq_len: int | None, per_device_batch: float | None) -> RunConfig:
    """`cfg` with sequences of `seq_len` and so many of them per device and microbatch.

    Without `per_device_batch` a step keeps its tokens. With context or tensor above 1, several devices share a
    sequence: `per_device_batch` may be a fraction then.
    """
    data = cfg.data
    if seq_len is not None:
        data = replace(data, seq_len=seq_len, global_batch_size=max(1, cfg.tokens_per_step // seq_len))
    if per_device_batch is not None:
        sequences = per_device_batch * devices * cfg.gradient_accumulation
        if sequences < 1 or sequences != int(sequences):
            raise UserError(
                f"--per-device-batch {per_device_batch:g} makes {sequences:g} sequences on {devices} devices; "
                "use a whole number, or a fraction that makes one"
            )
        data = replace(data, global_batch_size=int(sequences))
    return replace(cfg, data=data)


def on_slices(cfg: RunConfig, slices: int) -> RunConfig:
    """`cfg` for so many slices; another number in its mesh is a UserError."""
    if cfg.mesh.slices not in (1, slices):
        raise UserError(f"--slices {slices} but mesh.slices={cfg.mesh.slices}; say it once")
    return replace(cfg, mesh=replace(cfg.mesh, slices=slices))


def fit(
    name: str, cfg: RunConfig, kind: Slice, slices: int, stage_tokens: float, rows: int = 10
) -> tuple[dict[str, Any], Compiled]:
    """(record, what was compiled).

    libtpu names no buffers of a step that does not fit: they are then those on as many devices with more HBM.
    """
    from launch.fit_report import fit_record

    compiled = _compiled(cfg, kind, slices)
    record = fit_record(name, cfg, kind, slices, compiled, stage_tokens, rows)
    bigger = _roomier(kind, record["devices"])
    if not record["fits"] and not record["largest"] and bigger is not None:
        where = f"{bigger.family}:{bigger.topology}"
        say(f"does not fit; compiling for {where} to see its largest buffers")
        elsewhere = fit_record(name, cfg, bigger, 1, _compiled(cfg, bigger), stage_tokens, rows)
        record["largest"] = elsewhere["largest"]
    return record, compiled


def _compiled(cfg: RunConfig, kind: Slice, slices: int = 1) -> Compiled:
    """What is kept of this step, or else a child makes: the compiler would not hear a Ctrl-C."""
    check_mesh(cfg, kind, slices)
    if not cache_path(cfg, kind, slices).exists():
        say(f"compiling for {kind.family}:{kind.topology}, which takes minutes; the result is kept in {CACHE}")
    return compile_kept(cfg, kind, slices)


def _roomier(kind: Slice, devices: int) -> Slice | None:
    """A slice with as many devices, of the chip with the most HBM per device; None if there is none."""
    if kind.family in ("v5p", "tpu7x"):
        return None
    try:
        return parse_slice(f"v5p-{2 * devices}")
    except UserError:
        return None


def check_fit(cfg: RunConfig, kind: Slice, slices: int) -> float:
    """Tokens per second and chip at the roofline, from a kept result where there is one.

    Raises:
        UserError: the step does not fit, or libtpu is missing.
    """
    from launch.fit_report import fit_record

    cfg = on_slices(cfg, slices)
    record = fit_record(cfg.stage, cfg, kind, slices, compile_kept(cfg, kind, slices), 0.0)
    if not record["fits"]:
        raise UserError(
            f"{cfg.stage} needs {record['peak_gb']:.1f} of {record['hbm_available_gb']:.1f} GB per device; "
            f"{record['first_knob']}"
        )
    return record["roofline"]["tokens_per_second_per_chip"]


def add_fit_command(commands: Any) -> None:
    """Add `fit` to the subparsers of `python -m launch`."""
    sub = commands.add_parser(
        "fit",
        help="compile the train step for TPU slices that are not here: memory, roofline, days",
        description="compile the train step for TPU slices that are not here: memory, roofline, days",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("config", nargs="?", help="what python -m moe_jax train takes")
    sub.add_argument("overrides", nargs="*", help="dotted.name=value", metavar="OVERRIDE")
    sub.add_argument("--topology", help="one slice: v5e-16 or v5e:4x4")
    sub.add_argument("--slices", type=at_least(1), default=1)
    sub.add_argument(
        "--seq-len", type=at_least(1), metavar="N", help="tokens of a sequence (default: the config's)"
    )
    sub.add_argument(
        "--per-device-batch", type=at_least(0, float), metavar="N",
        help="sequences per device and microbatch (default: from the config's global batch)",
    )  # fmt: skip
    sub.add_argument("--json", metavar="PATH", help="write the figures there")
    sub.add_argument("--top", type=at_least(0), default=0, metavar="N", help="list the N costliest operations too")
    sub.add_argument(
        "--search", action="store_true", help="try meshes, remat policies and batches; rank those that fit"
    )
    sub.add_argument("--max-compiles", type=at_least(1), default=6, metavar="N", help="of --search (default: 6)")
    sub.add_argument("--table", action="store_true", help="write docs/fit.md")
    sub.set_defaults(command=_command)


def _command(arguments: Any) -> int:
    if arguments.table:
        if arguments.config or arguments.topology or arguments.search:
            raise UserError("--table has configs and slices of its own; leave out all else")
        from launch.fit_table import make_table

        use_libtpu()
        return make_table()
    if not arguments.config or not arguments.topology:
        raise UserError("fit needs a config and --topology, as in fit mobilemoe_s --topology v5e:4x4, or --table")
    kind = parse_slice(arguments.topology)
    base = configs.load(arguments.config, arguments.overrides)
    stage_tokens = base.steps * base.tokens_per_step
    use_libtpu()
    if arguments.search:
        return _search(arguments, on_slices(base, arguments.slices), kind, stage_tokens)
    devices = device_count(kind, arguments.slices)
    cfg = sized(on_slices(base, arguments.slices), devices, arguments.seq_len, arguments.per_device_batch)
    record, compiled = fit(arguments.config, cfg, kind, arguments.slices, stage_tokens)
    from launch.fit_report import render, render_costliest

    if arguments.json:
        write_json(arguments.json, record)
    print(render(record), end="")
    if arguments.top and compiled.text:
        print(render_costliest(compiled.text, arguments.top), end="")
    return 0 if record["fits"] else _NO_ROOM


def _search(arguments: Any, base: RunConfig, kind: Slice, stage_tokens: float) -> int:
    from launch.fit_report import available_bytes
    from launch.fit_search import measure_kept, plan, render_search, search

    devices = device_count(kind, arguments.slices)
    # The search sets the accumulation itself: a device's batch must make whole sequences without it.
    sized(replace(base, gradient_accumulation=1), devices, None, arguments.per_device_batch)
    cfg = sized(base, devices, arguments.seq_len, None)
    planned = plan(cfg, kind, arguments.slices, arguments.per_device_batch)
    measure = measure_kept(arguments.config, kind, arguments.slices, stage_tokens)
    records = search(planned.candidates, available_bytes(kind), measure, max_compiles=arguments.max_compiles)
    if arguments.json:
        write_json(arguments.json, {"pruned": planned.pruned, "results": records})
    print(render_search(records, planned), end="")
    return 0 if any(record["fits"] for record in records) else _NO_ROOM
