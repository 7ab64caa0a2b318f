"""Asynchronous checkpoints under `run/checkpoints/<step>`: what is saved, when it counts, how it is refused.

`moe_jax.train.stored` says what is in one. It counts once `checksums.json` is in it; only then do older ones go.
With several processes all of them call all of this at the same step, and process 0 alone renames and removes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from typing import Any, NoReturn

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from moe_jax.config import CheckpointConfig
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location
from moe_jax.train.agreement import Elsewhere, by_first, together
from moe_jax.train.catalogue import (
    checkpoint_path,
    checkpoints_folder,
    clean,
    complete_records,
    complete_steps,
    final_checkpoint,
    health,
    remove,
    set_aside,
    set_aside_names,
)
from moe_jax.train.checksums import Record, digest, file_sizes, read_record, share, write_record
from moe_jax.train.retention import kept
from moe_jax.train.stored import (
    FORMAT,
    config_of,
    describe,
    find_damage,
    flatten,
    load_parameters,
    reason_of,
    restore_arrays,
    restore_model,
    stored_name,
    tree_of,
    verify,
)

__all__ = [
    "Checkpoints", "checkpoint_path", "complete_steps", "config_of", "describe", "final_checkpoint", "health",
    "load_parameters", "restore_model", "verify",
]  # fmt: skip

_CHUNK = 64 * 2**20  # bytes that another mesh has to read for any part of them; less would stay in malloc's heaps


class Checkpoints:
    """The checkpoints of one run folder: at most one save is under way, older ones go when it is complete.

    `completed` grows by {step, seconds, bytes} with each save that ended well, for whoever logs them; `set_aside`
    by {path, reason, moved_to} with each damaged checkpoint that `restore_latest` met.
    """

    def __init__(self, run_dir: AnyPath, policy: CheckpointConfig | None = None) -> None:
        self.run_dir, self._policy = location(run_dir), policy or CheckpointConfig()
        self.folder = checkpoints_folder(run_dir)
        self.completed: list[dict[str, Any]] = []
        self.set_aside: list[dict[str, str]] = []
        self._saver: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1

    def save(
        self,
        step: int,
        state: Any,
        metadata: dict[str, Any],
        *,
        final: bool = False,
        heldout_loss: float | None = None,
    ) -> None:
        """Start saving `state` (copied to the host before this returns, so that the caller may donate it).

        Raises:
            UserError: this save could not start or the one before it failed.
        """
        self.wait()
        self._step, started = step, time.time()
        trees: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
        for name, leaf in flatten(state).items():
            trees[tree_of(name)][stored_name(name)] = leaf
        try:
            by_first("clean", lambda: clean(self.run_dir))
            with _saving():
                response = ocp.save_checkpointables_async(
                    str(self.folder / str(step)), trees, custom_metadata={"format": FORMAT, **metadata}
                )
        except Exception as error:
            self._fail(error)
        record = Record({}, step, final, heldout_loss, started)
        self._saver = threading.Thread(target=self._finish, args=(response, record), daemon=True)
        self._saver.start()

    def check(self) -> None:
        """Raise the UserError of a save that failed in the background; cheap enough for every step."""
        if self._saver is not None and not self._saver.is_alive():
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way; raise if it failed."""
        if self._saver is None:
            return
        self._saver.join()
        self._saver = None
        if self._error is not None:
            error, self._error = self._error, None
            self._fail(error)

    def restore_latest(self, abstract: Any) -> tuple[Any, dict[str, Any], int] | None:
        """(state on the shardings of `abstract`, stored JSON, step) of the newest checkpoint that is whole.

        Damaged ones on the way are renamed, never removed. None where the folder has no checkpoint at all.

        Raises:
            UserError: all are damaged, or the newest whole one is foreign or of other leaves than `abstract`.
        """
        while (step := by_first("newest", lambda: max(complete_steps(self.run_dir), default=None))) is not None:
            path = self.folder / str(step)
            if (reason := find_damage(path)) is None:
                metadata, shapes = describe(path)
                return restore_arrays(path, abstract, shapes), metadata, step
            moved = by_first("set aside", lambda path=path: set_aside(path))
            self.set_aside.append({"path": str(path), "reason": reason, "moved_to": moved})
        if left := by_first("damaged", lambda: set_aside_names(self.run_dir)):
            reasons = {epath.Path(e["moved_to"]).name: f": {e['reason']}" for e in self.set_aside}
            listed = "; ".join(name + reasons.get(name, "") for name in left)
            raise UserError(
                f"{self.folder} holds only damaged checkpoints ({listed}); put one back from a copy, or train "
                "from the start in another folder"
            )
        return None

    def mark_final(self, step: int) -> None:
        """Let a complete checkpoint count as the run's last."""

        def mark() -> None:
            path = self.folder / str(step)
            if not (record := read_record(path)).final:
                write_record(path, replace(record, final=True))

        by_first("final", mark)

    def clean(self) -> list[str]:
        """Remove what a killed save or removal left behind, whatever is half-written; the names of it."""
        return by_first("clean", lambda: clean(self.run_dir))

    def _finish(self, response: ocp.AsyncResponse, record: Record) -> None:
        try:
            if sys.platform == "linux":  # of this thread alone: hashing gives way to the step
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            response.result()
            path = self.folder / str(record.step)
            sizes = by_first("files", lambda: file_sizes(path))

            def digests() -> dict[str, tuple[int, str]]:
                names = share(sizes, jax.process_index(), jax.process_count())
                return {name: (sizes[name], digest(path / name)) for name in names}

            files = {name: entry for part in together("checksums", digests) for name, entry in part.items()}
            sealed = replace(record, files=files, time=time.time())
            by_first("complete", lambda: write_record(path, sealed))
            seconds = sealed.time - record.time
            self.completed.append({"step": record.step, "seconds": seconds, "bytes": sealed.bytes})
            by_first("retention", self._remove_older)
        except BaseException as error:
            self._error = error

    def _remove_older(self) -> None:
        records = complete_records(self.run_dir)
        for step in {record.step for record in records} - kept(records, self._policy):
            remove(self.folder / str(step))

    def _fail(self, error: BaseException) -> NoReturn:
        steps = complete_steps(self.run_dir)
        last = f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"
        where = "" if isinstance(error, Elsewhere) else f"process {jax.process_index()}: "
        raise UserError(
            f"saving checkpoint {self.folder / str(self._step)} failed ({where}{reason_of(error)}); {last}: "
            "free disk space or make the folder writable, then run the same command to go on"
        ) from error


def _saving() -> ocp.Context:
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False  # a folder that cannot be made is told at once
    context.array.saving.use_compression = False  # of random mantissas: 7 % fewer bytes for half as much time again
    context.array.saving.storage_options.chunk_byte_size = _CHUNK
    return context
