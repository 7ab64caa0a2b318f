"""What `python -m launch fit` says of a compiled step: the record for machines and the table for people."""

from __future__ import annotations

import math
from typing import Any

from launch.fit_compile import Compiled
from launch.fit_program import count_between_slices, count_grouped
from launch.hlo import Program, costliest, read_program
from launch.hlo_memory import Buffer, read_out_of_memory
from launch.roofline import roofline
from launch.slices import Slice
from moe_jax.chips import chip_named
from moe_jax.config import RunConfig
from moe_jax.flops import train_flops_per_token
from moe_jax.parallel.rules import BATCH_AXES

GB = 1e9
_RESERVED = 2**28  # bytes of a device's HBM that the runtime keeps
_BAR = 40


def available_bytes(kind: Slice) -> int:
    """HBM of a device that a program can use."""
    chip = chip_named(kind.family)
    return chip.hbm_bytes // chip.devices_per_chip - _RESERVED


def stage_cost(tokens: float, tokens_per_second_per_chip: float, chips: int) -> dict[str, float]:
    """`days` on so many chips and `chip_hours` for the tokens of a stage."""
    chip_hours = tokens / tokens_per_second_per_chip / 3600
    return {"chip_hours": chip_hours, "days": chip_hours / chips / 24}


def first_knob(cfg: RunConfig, mesh: dict[str, int], args: int, needed: int, available: int) -> str:
    """What to turn first when a step needs more than there is; `args` and `needed` in bytes per device.

    The state first if it alone is most of it, then what costs the least speed: recomputing more, smaller chunks of
    logits where they are large, fewer sequences at a time, a cut sequence.
    """
    devices, fsdp = math.prod(mesh.values()), mesh["fsdp"]
    wider = [n for n in range(fsdp + 1, devices + 1) if devices % n == 0 and cfg.model.d_model % n == 0]
    if args > available / 2:
        if wider and mesh["data"] > 1:
            return f"cut the state further: mesh.fsdp={wider[0]} mesh.data=-1"
        if not cfg.optimizer.offload:
            return "keep the optimizer's moments in the host's memory: optimizer.offload=true"
        return "the state alone takes more than half: use a larger slice"
    if cfg.remat != "full":
        return "recompute more in the backward pass: remat=full"
    logits = 2 * cfg.loss_chunk * cfg.model.vocab_size // mesh["tensor"]
    if logits > (needed - args) / 4 and cfg.loss_chunk > 256:
        return f"hold fewer logits at a time: loss_chunk={cfg.loss_chunk // 2}"
    shards = math.prod(mesh[axis] for axis in BATCH_AXES)
    sequences = cfg.data.global_batch_size // cfg.gradient_accumulation // shards
    if sequences > 1:
        share = (available - args) / (needed - args)
        fewer = max(1, 2 ** int(math.log2(max(1.0, sequences * share))))
        more = cfg.gradient_accumulation * math.ceil(sequences / fewer)
        return (
            f"fewer sequences at a time: gradient_accumulation={more} for the same step, or in launch fit "
            f"--per-device-batch {fewer * shards / devices:g}"
        )
    if mesh["context"] < 8:
        return f"cut the sequence: mesh.context={2 * mesh['context']}"
    return "use a larger slice, or a chip with more HBM"


def fit_record(
    name: str, cfg: RunConfig, kind: Slice, slices: int, compiled: Compiled, stage_tokens: float, rows: int = 10
) -> dict[str, Any]:
    """All figures of one step as JSON values; bytes in GB of 1e9, FLOPs in units of 1e12, per device.

    `stage_tokens` is what the whole stage trains on. What only a program tells is None where it does not fit.
    """
    chip, mesh = chip_named(kind.family), compiled.mesh
    devices, available = math.prod(mesh.values()), available_bytes(kind)
    tokens = cfg.tokens_per_step / devices
    model_flops = train_flops_per_token(cfg.model, cfg.data.seq_len) * tokens
    record: dict[str, Any] = {
        "config": name, "topology": f"{kind.family}:{kind.topology}", "slices": slices, "devices": devices,
        "mesh": mesh, "seq_len": cfg.data.seq_len,
        "per_device_batch": cfg.data.global_batch_size / cfg.gradient_accumulation / devices,
        "gradient_accumulation": cfg.gradient_accumulation, "remat": cfg.remat, "loss_chunk": cfg.loss_chunk,
        "versions": compiled.versions, "date": compiled.date, "compile_seconds": compiled.compile_seconds,
        "fits": not compiled.message,
        "args_gb": compiled.args / GB,
        "model_tflops_per_device": model_flops / 1e12,
    }  # fmt: skip
    if refused := read_out_of_memory(compiled.message):
        record |= _memory(compiled.args, refused.needed - compiled.args, refused.available)
        knob = first_knob(cfg, mesh, compiled.args, refused.needed, refused.available)
        unknown = ("estimated_gcycles_outside_kernels", "gmm_flops_over_ideal", "hardware_tflops_per_device",
                   "collectives", "kernels", "roofline", "stage")  # fmt: skip
        return record | dict.fromkeys(unknown) | {"largest": _largest(refused.largest), "first_knob": knob}
    program = read_program(compiled.text, devices // slices if slices > 1 else None, rows)
    program, over_ideal = count_grouped(program, compiled.text, cfg, mesh)
    program = count_between_slices(program, compiled.text, slices)
    line = roofline(program, chip, kind.shape, model_flops, tokens)
    hardware = program.issued_flops + sum(kernel.issued_flops or 0.0 for kernel in program.kernels.values())
    per_chip = line.tokens_per_second_per_chip
    return record | _memory(compiled.args, compiled.temp, available) | {
        "estimated_gcycles_outside_kernels": program.estimated_cycles / 1e9,
        "gmm_flops_over_ideal": over_ideal,
        "hardware_tflops_per_device": hardware / 1e12,
        "collectives": _collectives(program),
        "kernels": {kernel: found.count for kernel, found in program.kernels.items()},
        "roofline": {
            "step_seconds": line.step_seconds, "bound_by": line.bound_by, "mfu_ceiling": line.mfu_ceiling,
            "tokens_per_second_per_chip": per_chip, "hfu": line.hfu, "seconds": line.seconds,
            "compiler_seconds": line.compiler_seconds, "compiler_mfu": line.compiler_mfu,
            "uncounted_kernels": list(line.uncounted), "unknown_loops": list(program.unknown_loops),
        },
        "stage": {"tokens": stage_tokens} | stage_cost(stage_tokens, per_chip, kind.chips * slices),
        "largest": _largest(program.largest),
    }  # fmt: skip


def _memory(args: int, temp: int, available: int) -> dict[str, float]:
    peak = args + temp
    return {
        "args_gb": args / GB, "temp_gb": temp / GB, "peak_gb": peak / GB,
        "hbm_available_gb": available / GB, "hbm_headroom_gb": (available - peak) / GB,
    }  # fmt: skip


def _largest(buffers: tuple[Buffer, ...]) -> list[dict[str, Any]]:
    return [{"gb": b.bytes / GB, "shape": b.shape, "op_name": b.op_name} for b in buffers]


def _collectives(program: Program) -> dict[str, dict[str, float]]:
    """Kind -> count and gb of all its groups; `dcn_gb` is what concerns several slices."""
    found: dict[str, dict[str, float]] = {}
    for c in program.collectives:
        kind = found.setdefault(c.kind, {"count": 0, "gb": 0.0, "dcn_gb": 0.0})
        kind["count"] += c.count
        kind["gb"] += c.bytes / GB
        kind["dcn_gb"] += c.bytes / GB if c.slices > 1 else 0.0
    return found


# ---- for people -----------------------------------------------------------------------------------


def mesh_words(mesh: dict[str, int]) -> str:
    """`fsdp=16 data=2`: the axes above 1."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def _bar(share: float, mark: str = "#") -> str:
    return mark * round(_BAR * min(max(share, 0.0), 1.0))


def render(record: dict[str, Any]) -> str:
    """The report of one step, for a terminal of 100 columns."""
    where = f"{record['slices']} x " if record["slices"] > 1 else ""
    args, temp, available = (record[f"{key}_gb"] for key in ("args", "temp", "hbm_available"))
    held = f"{_bar(args / available)}{_bar(temp / available, '+')}"
    room = record["hbm_headroom_gb"]
    lines = [
        f"{record['config']} on {where}{record['topology']}, {record['devices']} devices: "
        f"{mesh_words(record['mesh'])}",
        f"{record['per_device_batch']:g} sequences of {record['seq_len']} per device, "
        f"{record['gradient_accumulation']} microbatch(es), remat {record['remat']}",
        "",
        f"{'FITS' if record['fits'] else 'DOES NOT FIT'}: {record['peak_gb']:.2f} of {available:.2f} GB, "
        + (f"{room:.2f} GB to spare" if room >= 0 else f"{-room:.2f} GB too much"),
        f"  HBM          [{held[:_BAR]:<{_BAR}}]  # state and batch {args:.2f} GB, + temporaries {temp:.2f} GB",
    ]
    if record["fits"]:
        lines += _speed(record)
    if record["largest"]:
        lines += ["", "Largest buffers, GB"]
        lines += [f"  {b['gb']:6.3f}  {b['shape']:28} {b['op_name']}" for b in record["largest"]]
    if not record["fits"]:
        lines += ["", f"First knob to turn: {record['first_knob']}"]
    made = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    lines += ["", f"Compiled in {record['compile_seconds']:.0f} s with {made} on {record['date']}"]
    return "\n".join(lines) + "\n"


def _speed(record: dict[str, Any]) -> list[str]:
    line, stage = record["roofline"], record["stage"]
    lines = ["", f"Least time of a step: {line['step_seconds']:.4f} s, bound by {line['bound_by']}"]
    for resource, seconds in line["seconds"].items():
        lines.append(f"  {resource:12} [{_bar(seconds / line['step_seconds']):<{_BAR}}]  {seconds:.4f} s")
    if line["compiler_seconds"]:
        lines.append(
            f"  compiler's estimate, without collectives: {line['compiler_seconds']:.4f} s, "
            f"MFU {line['compiler_mfu']:.1%}"
        )
    over = record["gmm_flops_over_ideal"]
    lines += [
        f"  MFU at most {line['mfu_ceiling']:.1%}, with all FLOPs that run {line['hfu']:.1%}; "
        f"{line['tokens_per_second_per_chip']:,.0f} tokens/s per chip",
        f"  stage of {stage['tokens'] / 1e9:,.0f}G tokens: at least {stage['days']:,.1f} days, "
        f"{stage['chip_hours']:,.0f} chip-hours",
        "",
        f"FLOPs per device and step: model {record['model_tflops_per_device']:.3f} T, "
        f"hardware {record['hardware_tflops_per_device']:.3f} T"
        + (f"; grouped products {over:.3f} of the ideal" if over else ""),
        f"Estimated cycles outside kernels: {record['estimated_gcycles_outside_kernels']:.3f} G",
        "Kernels: " + ", ".join(f"{name} {count}" for name, count in record["kernels"].items()),
        "Collectives:",
    ]
    for kind, moved in record["collectives"].items():
        across = f", {moved['dcn_gb']:.3f} GB of it between slices" if moved["dcn_gb"] else ""
        lines.append(f"  {kind:20} {moved['count']:6}  {moved['gb']:8.3f} GB{across}")
    if line["uncounted_kernels"]:
        lines.append(f"FLOPs not known, left out: {', '.join(line['uncounted_kernels'])}")
    if line["unknown_loops"]:
        lines.append(f"Loops of unknown length, counted once: {', '.join(line['unknown_loops'])}")
    return lines


def render_costliest(text: str, rows: int) -> str:
    """The costliest operations of a program by the compiler's estimate, kernels left out."""
    found = costliest(text, rows)
    lines = [f"  {cycles / 1e9:7.4f}  {calls:5}  {name}" for name, cycles, calls in found]
    return "\n".join(["Costliest outside kernels: G cycles, calls, operation", *lines]) + "\n"
