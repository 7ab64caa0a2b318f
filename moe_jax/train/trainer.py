"""One run: a folder, a mesh, data and a state, stepped from wherever its last checkpoint stands to the last step.

Starting, resuming and resuming again are the same call. Whatever kills it, the folder holds a complete checkpoint
and a log that ends at or after it, and the next call repeats the lost steps bit for bit.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.data.pipeline import TrainIterator, make_train_iterator
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import write_bytes, write_json
from moe_jax.overrides import differences, from_dict, to_dict
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train.checkpoint import Checkpoints, complete_steps, restore_model
from moe_jax.train.metrics import Metrics
from moe_jax.train.state import TrainState, abstract_state, init_state
from moe_jax.train.step import make_train_step, put_batch

# What a resumed run may change: none of it alters a batch or the update (a mesh only reassociates sums).
_MAY_CHANGE = ("mesh.", "checkpoint.", "log_every", "init_from", "data.tokenizer", "data.cache_dir")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def fit(cfg: RunConfig, run_dir: str | Path, devices: Sequence[jax.Device] | None = None) -> Path:
    """Train to `cfg.steps` in `run_dir`, from the last checkpoint there if it has one; the run folder.

    The mesh spans `devices`, by default all of them.

    Raises:
        UserError: a folder that is no run or holds another config, unusable data, mesh or tokenizer, a checkpoint
            that does not fit, a save that failed, or a non-finite loss; complete checkpoints stay as they were.
    """
    run_dir = Path(run_dir).absolute()
    _check_folder(cfg, run_dir)
    tokenizer = Tokenizer.load(cfg.data.tokenizer)
    tokenizer.require(cfg.model.vocab_size)
    mesh = make_mesh(cfg.mesh, devices)
    data = make_train_iterator(cfg.data, tokenizer)
    with _locked(run_dir):
        checkpoints = Checkpoints(run_dir, cfg.checkpoint.keep)
        checkpoints.clean()
        state, step = _first_state(cfg, mesh, tokenizer, checkpoints, data)
        _describe_run(cfg, run_dir, tokenizer, mesh)
        with Metrics(run_dir, cfg, step, list(mesh.devices.flat)) as metrics:
            metrics.event("start", step, data=data.stats)
            _loop(cfg, mesh, state, step, data, checkpoints, metrics, tokenizer.fingerprint)
            metrics.event("end", cfg.steps)
    return run_dir


def is_complete(cfg: RunConfig, run_dir: str | Path) -> bool:
    """Whether the run folder holds the checkpoint of this config's last step; UserError if it is another run's."""
    _check_folder(cfg, Path(run_dir).absolute())
    return complete_steps(run_dir)[-1:] == [cfg.steps]


@dataclass
class _Pending:
    """A step that was dispatched and not yet looked at: the host prepares the next batch meanwhile."""

    step: int
    metrics: dict[str, jax.Array]
    batch: Any  # the data position that yields this batch
    real: int


def _loop(
    cfg: RunConfig,
    mesh: Mesh,
    state: TrainState,
    start: int,
    data: TrainIterator,
    checkpoints: Checkpoints,
    metrics: Metrics,
    fingerprint: str,
) -> None:
    train_step: Any = make_train_step(cfg, mesh)
    clock, steps, real, trained = time.perf_counter(), 0, 0, 0.0
    pending: _Pending | None = None

    def settle() -> None:
        """Wait for the pending step, stop if it is not finite, log it where it is due."""
        nonlocal clock, steps, real, trained, pending
        if pending is None:
            return
        done, pending = pending, None
        values = jax.device_get(done.metrics)
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            _stop(done, values, checkpoints, metrics)
        steps, real, trained = steps + 1, real + done.real, trained + float(values["tokens"])
        if done.step % cfg.log_every == 0 or _saves(cfg, done.step):
            now = time.perf_counter()
            metrics.log(done.step, values, (now - clock) / steps, real // steps, trained)
            clock, steps, real, trained = now, 0, 0, 0.0

    for step in range(start + 1, cfg.steps + 1):
        position = data.get_state()["position"]
        batch = next(data)
        arrays = put_batch(batch, mesh)
        if step == start + 1:  # compiled apart, so that no step's time holds it
            train_step = train_step.lower(state, arrays).compile()
            metrics.event("compiled", start, seconds=time.perf_counter() - clock)
            clock = time.perf_counter()
        state, values = train_step(state, arrays)
        settle()
        pending = _Pending(step, values, position, int((batch["segment_ids"] > 0).sum()))
        if _saves(cfg, step):
            settle()  # before the save: a checkpoint never holds a step that is not finite or not logged
            stored = {"config": to_dict(cfg), "data": data.get_state(), "tokenizer": fingerprint}
            checkpoints.save(step, state, stored)
        checkpoints.check()
    checkpoints.wait()


def _saves(cfg: RunConfig, step: int) -> bool:
    return step % cfg.checkpoint.every_steps == 0 or step == cfg.steps


def _stop(done: _Pending, values: dict, checkpoints: Checkpoints, metrics: Metrics) -> NoReturn:
    name = "grad_norm" if math.isfinite(values["loss"]) else "loss"
    value = float(values[name])
    metrics.event("non_finite", done.step, quantity=name, value=str(value), batch=done.batch)
    checkpoints.wait()
    steps = complete_steps(checkpoints.run_dir)
    last = f"step {steps[-1]} stays the last checkpoint" if steps else "there is no checkpoint yet"
    raise UserError(
        f"{name} is {value} at step {done.step} on the batch at data position {json.dumps(done.batch)}; "
        f"{last}: look at the batch with 'python -m moe_jax batch', or lower optimizer.learning_rate"
    )


def _check_folder(cfg: RunConfig, run_dir: Path) -> None:
    """Refuse a folder that is not this run's; nothing is written."""
    path = run_dir / "config.json"
    if not path.is_file():
        if run_dir.exists() and (not run_dir.is_dir() or any(_visible(run_dir))):
            raise UserError(f"{run_dir} exists and is no run folder; name another with --run")
        return
    try:
        stored = from_dict(RunConfig, json.loads(path.read_text()))
    except (ValueError, UserError) as error:
        raise UserError(f"{path} cannot be read ({error}); name another folder with --run") from None
    changed = differences(stored, cfg)
    refused = {k: v for k, v in changed.items() if not k.startswith(_MAY_CHANGE)}
    if refused:
        listed = "; ".join(f"{name} was {a!r}, is {b!r}" for name, (a, b) in refused.items())
        raise UserError(f"{run_dir} holds another run: {listed}; restore the options or name another folder")


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """One trainer a folder: a second one would remove the first one's save under way. A kill releases the lock."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{run_dir} is in use by another run; wait for it or stop it") from None
        yield


def _first_state(
    cfg: RunConfig, mesh: Mesh, tokenizer: Tokenizer, checkpoints: Checkpoints, data: TrainIterator
) -> tuple[TrainState, int]:
    """The state to go on from and its step; `data` is moved to it."""
    vocab = cfg.model.vocab_size
    if steps := complete_steps(checkpoints.run_dir):
        state, stored = checkpoints.restore(abstract_state(cfg, mesh))
        tokenizer.require(vocab, stored["tokenizer"])
        data.set_state(stored["data"])
        return state, steps[-1]
    if not cfg.init_from:
        return init_state(cfg, mesh), 0
    previous = Checkpoints(cfg.init_from, keep=1)
    stored = previous.metadata()
    tokenizer.require(vocab, stored["tokenizer"])
    last, wanted = complete_steps(cfg.init_from)[-1], stored["config"]["steps"]
    if last != wanted:
        raise UserError(f"init_from {cfg.init_from} stopped at step {last} of {wanted}; finish it first")
    params, biases = restore_model(cfg.init_from, abstract_state(cfg, mesh))
    return replace(init_state(cfg, mesh), params=params, biases=biases), 0


def _describe_run(cfg: RunConfig, run_dir: Path, tokenizer: Tokenizer, mesh: Mesh) -> None:
    """Write what the run is. config.json comes first: by it a killed start is known as this run."""
    write_json(run_dir / "config.json", to_dict(cfg))
    if Path(cfg.data.tokenizer).absolute() != run_dir / "tokenizer.json":
        write_bytes(run_dir / "tokenizer.json", Path(cfg.data.tokenizer).read_bytes())
    device = mesh.devices.flat[0]
    environment = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": f"{mesh.devices.size} x {device.device_kind}",
        "mesh": dict(mesh.shape),
        "git": _git_commit(),
        "command": sys.argv,
    }
    write_json(run_dir / "environment.json", environment)


def _git_commit() -> str | None:
    """The commit of this code, with `-dirty` where it was changed; None outside a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
