"""What is in a checkpoint, for `python -m moe_jax inspect`: tree, shapes, sizes, marks, config, and its health.

Every file is read against its checksum first; a checkpoint that is damaged is refused with the file's name.
"""

from __future__ import annotations

import math
import time
from typing import Any

from etils import epath

from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location
from moe_jax.overrides import differences
from moe_jax.progress import Progress, file_size
from moe_jax.train.catalogue import checkpoint_path, complete_records, health, record_of
from moe_jax.train.checkpoint import config_of, verify
from moe_jax.train.checksums import FILE
from moe_jax.train.retention import best_step
from moe_jax.train.stored import describe


def inspect(path: AnyPath) -> dict[str, Any]:
    """The contents of a checkpoint folder, or of a run folder's last complete checkpoint, as JSON.

    `trees` holds {tree: {leaf: {shape, dtype, bytes}}}, `config` the stored config, `folders` the health of all
    checkpoints beside this one.

    Raises:
        UserError: there is no checkpoint, or it is foreign, or damaged (the file is named).
    """
    path = _checkpoint(location(path))
    verify(path, progress=Progress(f"reading {path}"))
    metadata, shapes = describe(path)
    record, run_dir = record_of(path), path.parent.parent
    trees = {
        tree: {
            name: {
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
            }
            for name, leaf in leaves.items()
        }
        for tree, leaves in shapes.items()
    }
    return {
        "path": str(path),
        "step": record.step,
        "final": record.final,
        "best": record.step == best_step([*complete_records(run_dir), record]),
        "heldout_loss": record.heldout_loss,
        "time": record.time,
        "files": len(record.files),
        "bytes": record.bytes,
        "trees": trees,
        "folders": health(run_dir),
    } | metadata


def render(found: dict[str, Any]) -> str:
    """What `inspect` returns, for people: a line for each leaf, of the config only what is not the default."""
    marks = [name for name in ("final", "best") if found[name]]
    if found["heldout_loss"] is not None:
        marks.append(f"held-out loss {found['heldout_loss']:.4f}")
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["time"]))
    lines = [
        f"{found['path']}",
        f"step {found['step']}{''.join(f', {mark}' for mark in marks)}, saved {saved}",
        f"{found['files']} files of {file_size(found['bytes'])}, all checksums are right",
    ]
    for tree, leaves in found["trees"].items():
        count = sum(math.prod(leaf["shape"]) for leaf in leaves.values())
        lines += ["", f"{tree}: {len(leaves)} arrays, {count:,} numbers, {file_size(sum(_bytes(leaves)))}"]
        width = max(map(len, leaves), default=0)
        lines += [
            f"  {name:{width}}  {leaf['dtype']}{leaf['shape']}  {file_size(leaf['bytes'])}"
            for name, leaf in leaves.items()
        ]
    lines += ["", "config, where it differs from the defaults:", *_options(found)]
    lines += ["", "checkpoints of the run:"]
    for entry in found["folders"]:
        reason = f" ({entry['reason']})" if entry["reason"] else ""
        final = ", final" if entry["final"] else ""
        lines.append(f"  step {entry['step']}: {entry['state']}{final}, {file_size(entry['bytes'])}{reason}")
    return "\n".join(lines)


def _checkpoint(path: epath.Path) -> epath.Path:
    if (path / "checkpoints").is_dir():
        return checkpoint_path(path, None)
    if not (path / FILE).exists():
        raise UserError(f"{path} is neither a run folder with checkpoints nor a complete checkpoint; name another")
    return path


def _bytes(leaves: dict[str, Any]) -> list[int]:
    return [leaf["bytes"] for leaf in leaves.values()]


def _options(found: dict[str, Any]) -> list[str]:
    try:
        cfg = config_of(location(found["path"]), found)
    except UserError as error:
        return [f"  {error}"]
    return [f"  {name}={value}" for name, (_, value) in differences(RunConfig(), cfg).items()]
