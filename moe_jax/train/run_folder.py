"""A run is a folder: whether this one is this run's, what may have changed in it, and what the run was."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from moe_jax.config import TRAINING_OPTIONS, RunConfig
from moe_jax.errors import UserError
from moe_jax.files import location, write_bytes, write_json
from moe_jax.overrides import differences, from_dict, to_dict
from moe_jax.repository import git

if TYPE_CHECKING:  # a supervisor asks here too, and starts without JAX
    from jax.sharding import Mesh

# What a resumed run may change: nothing here changes the tree of arrays or which batch comes at which step.
_MAY_CHANGE = (
    "mesh.", "checkpoint.", "guard.", "optimizer.", "steps", "log_every", "init_from", "gradient_accumulation",
    "compute_dtype", "loss_chunk", "remat", "model.moe.buffer_factor", "data.heldout", "data.tokenizer",
    "data.cache_dir",
)  # fmt: skip
_DATA = ("data.sources", "data.max_bytes")  # and these where the user says so
_HELD = "'python -m moe_jax inspect {} --json found.json' gives what its last checkpoint holds as config"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
# What a supervisor, or a start that ended before config.json was written, may have left.
_BEFORE = ("launch.json", "process-*.log", "events.jsonl", "hang-*.txt")


def changed_options(cfg: RunConfig, run_dir: epath.Path, new_data: bool = False) -> dict[str, tuple[Any, Any]]:
    """Options that differ from those of the run in the folder, as {name: (old, new)}; nothing is written.

    Raises:
        UserError: the folder is no run, or options differ that a run cannot change.
    """
    path = run_dir / "config.json"
    if not path.exists():
        try:
            found = [entry.name for entry in run_dir.iterdir() if _is_foreign(entry)]
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            found = [run_dir.name]
        if "checkpoints" in found:
            raise UserError(f"{path} is gone; put it back ({_HELD.format(run_dir)})")
        if found:
            raise UserError(f"{run_dir} exists and is no run folder; name another with --run")
        return {}
    try:
        stored = from_dict(RunConfig, json.loads(path.read_text()))
    except (ValueError, UserError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); put it back ({_HELD.format(run_dir)}), or name another folder"
        ) from None
    changed = differences(stored, cfg)
    allowed = _MAY_CHANGE + (_DATA if new_data else ())
    if stored.model.moe and stored.model.moe.aux_loss:  # which balances within a microbatch
        allowed = tuple(name for name in allowed if name != "gradient_accumulation")
    if refused := {name: values for name, values in changed.items() if not name.startswith(allowed)}:
        mend = "restore the options or name another folder"
        if all(name.startswith(_DATA) for name in refused):
            mend = "restore them, name another folder, or go on with --new-data"
        raise UserError(f"{run_dir} holds another run: {listed(refused)}; {mend}")
    return changed


def changed_model(theirs: RunConfig, cfg: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Options by which `cfg` computes something else with the parameters of another run, as {name: (old, new)}.

    A longer context may want another rope, so that is no error; but no array's shape would tell.
    """
    changed = differences(theirs.model, cfg.model)
    same = (*TRAINING_OPTIONS, "max_position_embeddings")
    return {f"model.{name}": values for name, values in changed.items() if name not in same}


def listed(changed: dict[str, tuple[Any, Any]]) -> str:
    """The differences as a sentence's part."""
    return "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())


def describe_run(cfg: RunConfig, run_dir: epath.Path, mesh: Mesh) -> None:
    """Write what the run is. config.json comes first: by it a killed start is known as this run."""
    write_json(run_dir / "config.json", to_dict(cfg))
    if location(cfg.data.tokenizer) != run_dir / "tokenizer.json":
        write_bytes(run_dir / "tokenizer.json", location(cfg.data.tokenizer).read_bytes())
    environment = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "processes": len({device.process_index for device in mesh.devices.flat}),
        "mesh": dict(mesh.shape),
        "git": git("describe", "--always", "--dirty", "--abbrev=40").strip() or None,  # -dirty where it was changed
        "command": sys.argv,
    }
    write_json(run_dir / "environment.json", environment)


def _is_foreign(path: epath.Path) -> bool:
    return not path.name.startswith(".") and not any(Path(path.name).match(name) for name in _BEFORE)
