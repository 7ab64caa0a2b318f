"""The folders under `run/checkpoints`: which count, which are damaged, which go; without JAX or an array read."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from etils import epath

from moe_jax.errors import UserError
from moe_jax.files import AnyPath, folders_in, location
from moe_jax.train.checksums import FILE, Damaged, Record, file_sizes, read_record, wrong_size

SET_ASIDE = ".damaged-"
_UNCOMMITTED = ".orbax-checkpoint-tmp"


def checkpoints_folder(run_dir: AnyPath) -> epath.Path:
    """Where a run keeps its checkpoints."""
    return location(run_dir) / "checkpoints"


def complete_steps(run_dir: AnyPath) -> list[int]:
    """Steps whose checkpoint is complete, ascending; half-written folders do not count."""
    paths = folders_in(checkpoints_folder(run_dir))
    return sorted(int(path.name) for path in paths if path.name.isdecimal() and (path / FILE).exists())


def complete_records(run_dir: AnyPath) -> list[Record]:
    """The records of the complete checkpoints, ascending by step, but for unreadable ones."""
    records = []
    for step in complete_steps(run_dir):
        with contextlib.suppress(Damaged, FileNotFoundError):
            records.append(read_record(checkpoints_folder(run_dir) / str(step)))
    return records


def checkpoint_path(run_dir: AnyPath, step: int | None) -> epath.Path:
    """Folder of the checkpoint of `step`, the last complete one for None; UserError when there is none."""
    steps = complete_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        which = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
        have = f"it has {', '.join(map(str, steps))}" if steps else _mend(run_dir)
        raise UserError(f"{run_dir} has no {which}; {have}")
    return checkpoints_folder(run_dir) / str(steps[-1] if step is None else step)


def _mend(run_dir: AnyPath) -> str:
    stages = [folder.name for folder in folders_in(location(run_dir)) if complete_steps(folder)]
    return f"its stages are runs: name {location(run_dir) / stages[-1]}" if stages else "train it first"


def final_checkpoint(run_dir: AnyPath) -> epath.Path:
    """The folder of the newest complete checkpoint, which must be marked final; else a UserError.

    An older one may be marked, too, of a run that was finished and then extended: it is not what was asked for.
    """
    path = checkpoint_path(run_dir, None)
    if not record_of(path).final:
        raise UserError(f"{run_dir} stopped at step {path.name} and has no final checkpoint; finish it first")
    return path


def record_of(path: epath.Path) -> Record:
    """The record of a checkpoint that a user named; UserError where it is damaged or was removed meanwhile."""
    try:
        return read_record(path)
    except Damaged as damage:
        raise UserError(damaged_sentence(path, str(damage))) from None
    except FileNotFoundError:
        require_present(path)
        raise


def health(run_dir: AnyPath) -> list[dict[str, Any]]:
    """One dictionary a folder under `checkpoints`, by step: step, bytes, final, heldout_loss, time, state, reason.

    The state is complete, damaged (missing or shortened files, or set aside as such) or half-written; contents are
    not read.
    """
    found: list[dict[str, Any]] = []
    for path in folders_in(checkpoints_folder(run_dir)):
        step, dot, rest = path.name.partition(".")
        if not step.isdecimal():
            continue
        record, state, reason = _state(path, dot + rest)
        marks: dict[str, Any] = {"final": False, "heldout_loss": None, "time": None}
        if record is not None:
            marks = {name: getattr(record, name) for name in marks}
        size = sum(file_sizes(path).values())
        found.append({"step": int(step), "bytes": size} | marks | {"state": state, "reason": reason})
    return sorted(found, key=lambda entry: entry["step"])


def clean(run_dir: AnyPath) -> list[str]:
    """Remove what a killed save or removal left behind; its names."""
    removed = []
    for path in folders_in(checkpoints_folder(run_dir)):
        unfinished = path.name.isdecimal() and not (path / FILE).exists()
        if unfinished or _UNCOMMITTED in path.name:
            remove(path)
            removed.append(path.name)
    return removed


def remove(path: epath.Path) -> None:
    """Remove a checkpoint so that a kill meanwhile leaves one that does not count."""
    (path / FILE).unlink(missing_ok=True)
    path.rmtree()


def require_present(path: epath.Path) -> None:
    """Raise a UserError if a checkpoint was removed while it was read: what is missing reads as zeros."""
    if not (path / FILE).exists():
        raise UserError(
            f"checkpoint {path} was removed while it was read, as a run that trains does with older ones; "
            "run the same command again"
        )


def set_aside(path: epath.Path) -> str:
    """Rename a damaged checkpoint, so that it no longer counts; its new path."""
    return str(path.rename(path.with_name(f"{path.name}{SET_ASIDE}{time.time_ns()}")))


def set_aside_names(run_dir: AnyPath) -> list[str]:
    """Names of the folders of damaged checkpoints."""
    return sorted(path.name for path in folders_in(checkpoints_folder(run_dir)) if SET_ASIDE in path.name)


def damaged_sentence(path: epath.Path, reason: str) -> str:
    """What is wrong with a checkpoint that a user named, and the mend."""
    earlier = [s for s in complete_steps(path.parents[1]) if path.name.isdecimal() and s < int(path.name)]
    mend = f"to fall back to step {earlier[-1]}" if earlier else "and train again"
    return f"checkpoint {path} is truncated or damaged ({reason}); remove it {mend}"


def _state(path: epath.Path, suffix: str) -> tuple[Record | None, str, str | None]:
    if suffix.startswith(SET_ASIDE):
        return None, "damaged", f"set aside as {path.name}"
    unfinished = None, "half-written", "its save has not ended"
    if suffix:
        return unfinished
    try:
        record = read_record(path)
    except FileNotFoundError:
        return unfinished
    except Damaged as damage:
        return None, "damaged", str(damage)
    reason = wrong_size(path, record)
    if reason is not None and not (path / FILE).exists():
        return None, "half-written", "it is being removed"
    return record, "complete" if reason is None else "damaged", reason
