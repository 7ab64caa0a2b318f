"""`python -m launch status`: how far a run is, how fast, how healthy, and what it has been through.

Everything is read from the run folder, on a disk or in a bucket; nothing is written and nothing is locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from launch.record import RECORD, is_record
from moe_jax.command_line import add_command, add_json
from moe_jax.errors import UserError
from moe_jax.files import folders_in, location, parts, read_lines, write_json
from moe_jax.progress import file_size
from moe_jax.run_lock import holder
from moe_jax.train.catalogue import checkpoints_folder, complete_steps, health

_TAIL = 2**18  # bytes of a log that hold its last steps
_WATCH_SECONDS = 5.0
_ENDS = {"preempted": "preempted", "hung": "hung", "bad_step": "bad step", "end": "ended"}
_FIRST, _SAME = "first", "same process"
_FAULTS = (
    "damaged",
    "bad_step",
    "rolled_back",
    "preempted",
    "hung",
    "config_changed",
    "data_changed",
    "model_changed",
)


def run_status(run: str, verify: bool = False) -> dict[str, Any]:
    """What there is to know about a run, or a folder of stages, as JSON values; `verify` reads all checkpoints.

    Raises:
        UserError: the folder holds no run.
    """
    root = location(run)
    found = _json(root / RECORD)
    record = found if is_record(found) else {}
    planned = [(cfg["stage"], cfg["steps"]) for cfg in record.get("resolved", {}).values()]
    folders = [root] if _is_run(root) else _stage_folders(root, [stage for stage, _ in planned])
    stages = [stage_status(folder, verify) for folder in folders]
    if len(planned) > 1 or not stages:  # of one that has not begun only the record tells
        begun = {folder.name for folder in folders}
        stages += [{"stage": s, "state": "waiting", "step": 0, "steps": n} for s, n in planned if s not in begun]
    if not stages:
        raise UserError(f"{root} holds no run; name a run folder, or one of stages")
    job = record.get("job", {})
    keys = ("processes", "topology", "slices")
    return {
        "run": str(root),
        "launcher": record.get("launcher"),
        "where": {key: job[key] for key in keys if key in job},
        "complete": all(stage["state"] == "complete" for stage in stages),
        "stages": stages,
    }


def stage_status(folder: epath.Path, verify: bool = False) -> dict[str, Any]:
    """What is known about one run folder, plain JSON: state (running, complete, stopped), step of steps, loss,
    tokens/s, seconds left and since the last event, checkpoints with their health, and what `history` tells.

    With `verify` every complete checkpoint is read against its checksums.
    """
    steps = _json(folder / "config.json").get("steps", 0)
    lines, events, checkpoints = last_steps(folder), read_lines(folder / "events.jsonl"), health(folder)
    if verify:
        _verify(folder, checkpoints)
    newest = max((c["step"] for c in checkpoints if c["state"] == "complete"), default=0)
    last = lines[-1] if lines else {}
    step = max(last.get("step", 0), newest)
    running = holder(folder)
    done = any(c["final"] and c["state"] == "complete" and c["step"] >= steps for c in checkpoints)
    # One step alone says little: a short one follows each that waited.
    pace, speed = (_usual(lines[-20:], name) for name in ("seconds", "tokens_per_second"))
    sign = events[-1]["time"] if events else None
    return {
        "stage": folder.name if not lines else last["stage"],
        "folder": str(folder),
        "state": "running" if running else "complete" if done else "stopped",
        "holder": running,
        "step": step,
        "steps": steps,
        "loss": last.get("loss"),
        "tokens_per_second": speed,
        "seconds_left": None if pace is None else round(max(0, steps - step) * pace, 1),
        "seconds_since_event": None if sign is None else round(time.time() - sign, 1),
        "checkpoints": checkpoints,
        **history(events),
    }


def _usual(lines: list[dict[str, Any]], name: str) -> float | None:
    return statistics.median(line[name] for line in lines) if lines else None


def history(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Restarts by what ended the process before, faults by kind, steps replayed, and wall time by kind.

    Wall time is that of all starts as far as they told of it; `untold` is the rest since the first: what a kill
    cut off, and the time between two starts.
    """
    restarts, faults, ended = Counter[str](), Counter[str](), _FIRST
    told, current, replayed = dict[str, float](), dict[str, float](), 0
    for event in events:
        name = event["event"]
        faults[name] += name in _FAULTS
        if name == "goodput":
            current = event["seconds"]
        elif name == "rolled_back":
            ended = _SAME  # its process starts over
        elif name in _ENDS and event.get("action") != "skip":
            ended = _ENDS[name]
        elif name == "start":
            replayed += event.get("lost") or 0
            if ended != _SAME:
                told, current = _sum(told, current), {}
                restarts[ended] += 1
            ended = "killed or crashed"
    starts = sum(restarts.values())
    for uneventful in (_FIRST, _ENDS["end"]):
        restarts.pop(uneventful, None)
    seconds = {kind: round(value, 3) for kind, value in _sum(told, current).items()}
    if events:
        seconds["untold"] = round(max(0.0, events[-1]["time"] - events[0]["time"] - sum(seconds.values())), 3)
    total = sum(seconds.values()) or 1.0
    return {
        "starts": starts,
        "restarts": dict(restarts),
        "faults": {kind: count for kind, count in faults.items() if count},
        "steps_replayed": replayed,
        "seconds": seconds,
        "goodput": {kind: round(value / total, 4) for kind, value in seconds.items()},
    }


def _sum(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {kind: one.get(kind, 0.0) + other.get(kind, 0.0) for kind in one | other}


def last_steps(folder: epath.Path | Path) -> list[dict[str, Any]]:
    """The last whole step lines of a run: some hundred, all of a short one.

    Raises:
        UserError: one of them is no JSON.
    """
    path, data, begin = folder / "metrics.jsonl", b"", 0
    for part in reversed(parts(path)):
        try:
            with part.open("rb") as file:
                begin = max(0, file.seek(0, os.SEEK_END) - (_TAIL - len(data)))
                file.seek(begin)
                data = file.read() + data
        except FileNotFoundError:  # a run that goes on from a checkpoint has just cut it
            continue
        if begin:
            break
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in lines[1 if begin else 0 :]]
    except ValueError:
        return read_lines(path)  # from its start, and so it knows the number of the line


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_run(folder: epath.Path) -> bool:
    return _json(folder / "config.json").keys() >= {"stage", "steps"}


def _stage_folders(root: epath.Path, order: list[str]) -> list[epath.Path]:
    """In the order of the record, then of their first starts."""
    found = [path for path in folders_in(root) if _is_run(path)]

    def key(path: epath.Path) -> tuple[int, float]:
        events = read_lines(path / "events.jsonl")
        return order.index(path.name) if path.name in order else len(order), events[0]["time"] if events else 1e12

    return sorted(found, key=key)


def _verify(folder: epath.Path, checkpoints: list[dict[str, Any]]) -> None:
    """Read every complete checkpoint against its checksums and note what is wrong."""
    from moe_jax.train.checkpoint import verify

    for found in [entry for entry in checkpoints if entry["state"] == "complete"]:
        path = checkpoints_folder(folder) / str(found["step"])
        print(f"reading {path} ({file_size(found['bytes'])})", file=sys.stderr, flush=True)
        try:
            verify(path)
            found["reason"] = "checksums are right"
        except UserError as error:
            if found["step"] not in complete_steps(folder):  # the run goes on and kept it no longer
                checkpoints.remove(found)
            found |= {"state": "damaged", "reason": str(error)}


# ---- as text --------------------------------------------------------------------------------------

_HEAD = (
    f"{'stage':14} {'state':9} {'step':>17} {'done':>5} {'loss':>9} {'tokens/s':>12} {'left':>9} {'restarts':>8}"
)


def render(status: dict[str, Any]) -> str:
    """The status for a terminal."""
    where = ", ".join(f"{key} {value}" for key, value in status["where"].items())
    by = f"  ({status['launcher']}{': ' + where if where else ''})" if status["launcher"] else ""
    lines = [status["run"] + by, "", _HEAD]
    for stage in status["stages"]:
        share = f"{stage['step'] / stage['steps']:.0%}" if stage["steps"] else "-"
        lines.append(
            f"{stage['stage']:14} {stage['state']:9} {stage['step']:>8,}/{stage['steps']:<8,} {share:>5} "
            f"{_number(stage.get('loss'), '.4f'):>9} {_number(stage.get('tokens_per_second'), ',.0f'):>12} "
            f"{_time(stage.get('seconds_left')):>9} {sum(stage.get('restarts', {}).values()):>8}"
        )
    for stage in status["stages"]:
        if stage["state"] != "waiting":
            lines += ["", *_details(stage)]
    return "\n".join(lines) + "\n"


def _details(stage: dict[str, Any]) -> Iterator[str]:
    ago = stage["seconds_since_event"]
    sign = f"last event {_time(ago)} ago" if ago is not None else "no event yet"
    yield f"{stage['stage']}: {'held by ' + stage['holder'] if stage['holder'] else 'nobody trains here'}, {sign}"
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in stage["goodput"].items() if share >= 0.005)
    if shares:
        yield f"  goodput      {shares} of {_time(sum(stage['seconds'].values()))}"
    for name in ("restarts", "faults"):
        if stage[name]:
            told = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in stage[name].items())
            replayed = f"; {stage['steps_replayed']} steps replayed" if name == "restarts" else ""
            yield f"  {name:12} {told}{replayed}"
    for found in stage["checkpoints"]:
        marks = ["final"] if found["final"] else []
        if found["heldout_loss"] is not None:
            marks.append(f"held-out loss {found['heldout_loss']:.4f}")
        if found["time"]:
            marks.append(f"{_time(time.time() - found['time'])} ago")
        more = ", ".join([*marks, *([found["reason"]] if found["reason"] else [])])
        size = file_size(found["bytes"])
        yield f"  {'checkpoint':12} {found['step']:>8,}  {size:>9}  {found['state']:12}  {more}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    return (
        f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
        if days < 2 else f"{days:.1f} d"
    )  # fmt: skip


def add_status_command(commands: Any) -> None:
    """Add `status` to the subparsers of `python -m launch`."""
    text = "show stage, step, loss, speed, checkpoints with their health, restarts and goodput of a run"
    examples = ("runs/a", "gs://b/mobilemoe-s --watch", "runs/four --verify --json status.json")
    sub = add_command(commands, "status", _command, text, *examples)
    sub.add_argument("run", help="run folder or a folder of stages, local or gs://")
    sub.add_argument(
        "--watch", action="store_true", help=f"again every {_WATCH_SECONDS:.0f} s until it is complete"
    )
    sub.add_argument("--verify", action="store_true", help="read all checkpoints against their checksums")
    add_json(sub)


def _command(arguments: Any) -> None:
    with contextlib.suppress(KeyboardInterrupt) if arguments.watch else contextlib.nullcontext():
        _show(arguments)


def _show(arguments: Any) -> None:
    while True:
        status = run_status(arguments.run, arguments.verify)
        if arguments.json:
            write_json(arguments.json, status)
        clear = "\033[H\033[2J" if arguments.watch and sys.stdout.isatty() else ""
        print(clear + render(status), end="", flush=True)
        if status["complete"] or not arguments.watch:
            return
        time.sleep(_WATCH_SECONDS)
