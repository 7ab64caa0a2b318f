"""One run: a folder, a mesh, data and a state, stepped from wherever its last checkpoint stands to the last step.

Starting, resuming and resuming again are the same call, in one process or in many. Whatever kills it, the folder
holds a complete checkpoint and a log that ends at or after it, and the next call repeats the lost steps bit for
bit.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from moe_jax.config import RunConfig
from moe_jax.data.pipeline import TrainIterator, heldout_rows, make_train_iterator
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import Preempted, UserError
from moe_jax.files import AnyPath, is_remote, location, read_lines
from moe_jax.overrides import differences, from_dict, to_dict
from moe_jax.parallel.batches import put_batch, put_votes, share_of_batch
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.processes import barrier, is_first
from moe_jax.parallel.rules import check_divisible
from moe_jax.run_lock import exclusive
from moe_jax.train.agreement import by_first, together
from moe_jax.train.catalogue import complete_records, complete_steps
from moe_jax.train.checkpoint import Checkpoints, config_of, describe, final_checkpoint, restore_model
from moe_jax.train.goodput import Goodput
from moe_jax.train.guard import BadStep, LossGuard
from moe_jax.train.heldout import HeldoutLoss, why_unusable
from moe_jax.train.metrics import History, Metrics, StepClock
from moe_jax.train.run_folder import changed_model, changed_options, describe_run, listed
from moe_jax.train.state import TrainState, abstract_state, init_state
from moe_jax.train.step import make_train_step
from moe_jax.train.watch import StopRequest, Watchdog

# What a process asks of all, by a vote that travels with a step; the highest counts.
_SAVE, _STOP = 1, 2
_SLOW_MINUTES = 30.0  # that a compilation, a save or a restore may take
_READING_MINUTES, _COPYING_MINUTES = 7 * 24 * 60.0, 120.0  # that a host may have its tokens later than the first
_PATHS = (".path", "data.tokenizer", "data.cache_dir", "init_from")  # may differ, not what they lead to


def fit(
    cfg: RunConfig,
    run_dir: AnyPath,
    devices: Sequence[jax.Device] | None = None,
    *,
    new_data: bool = False,
    stop: StopRequest | None = None,
) -> epath.Path:
    """Train to `cfg.steps` in `run_dir`, from the last sound checkpoint there if it has one; the run folder.

    The mesh spans `devices`, by default all of them. Every process of a run calls this alike. With `new_data`,
    files and mixture may differ from what the checkpoint was trained on. `stop` still names afterwards a signal
    that came too late for this run.

    Raises:
        UserError: a folder that is no run, in use or of another config, unusable data, mesh or tokenizer, a
            checkpoint that does not fit, a save that failed, or a bad step; complete checkpoints stay as they were.
        Preempted: SIGTERM or SIGINT came; the step reached is saved.
    """
    goodput, run_dir = Goodput(), location(run_dir)
    changes = changed_options(cfg, run_dir, new_data) if is_first() else {}
    tokenizer = Tokenizer.load(cfg.data.tokenizer)
    tokenizer.require(cfg.model.vocab_size)
    mesh = make_mesh(cfg.mesh, devices)
    check_divisible(cfg, mesh)  # before hours of reading, as what follows
    if cfg.init_from and not complete_records(run_dir):
        final_checkpoint(cfg.init_from)
    if is_first() and not cfg.checkpoint.keep_best and (why := why_unusable(cfg.data)):
        _tell(f"held-out data cannot be measured on, as evaluate will: {why}")
    index, count = share_of_batch(mesh)
    with goodput.spent("data"):
        data = make_train_iterator(cfg.data, tokenizer, process_index=index, process_count=count)
        heldout = heldout_rows(cfg.data, tokenizer) if cfg.checkpoint.keep_best else []
    prints = {"data": data.get_state()["fingerprint"], "heldout": [rows.fingerprint for rows in heldout]}
    _require_same_everywhere(cfg, tokenizer=tokenizer.fingerprint, **prints)
    with contextlib.ExitStack() as stack:
        still_ours = stack.enter_context(exclusive(run_dir)) if is_first() else lambda: None
        history = stack.enter_context(History(run_dir))
        dump = None if is_remote(run_dir) else Path(run_dir) / f"hang-{jax.process_index()}.txt"
        stop = stack.enter_context(stop or StopRequest())
        dog = stack.enter_context(Watchdog(cfg.guard.hang_minutes, dump, partial(history.event, "hung")))
        trainer = _Trainer(
            cfg=cfg,
            run_dir=run_dir,
            mesh=mesh,
            tokenizer=tokenizer,
            data=data,
            new_data=new_data,
            heldout=HeldoutLoss(cfg, mesh, heldout) if heldout else None,
            history=history,
            goodput=goodput,
            stop=stop,
            dog=dog,
            still_ours=still_ours,
        )
        trainer.run(changes)
    return run_dir


def _tell(text: str) -> None:
    """A sentence on standard error, of one process for all."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


def _require_same_everywhere(cfg: RunConfig, **fingerprints: Any) -> None:
    """UserError where a process would train on something else: each has its own command line and files."""
    minutes = _COPYING_MINUTES if is_remote(cfg.data.cache_dir) else _READING_MINUTES
    first, *others = together("inputs", lambda: fingerprints | {"config": to_dict(cfg)}, minutes)
    for index, found in enumerate(others, 1):
        names = [name for name in fingerprints if found[name] != first[name]]
        options = differences(from_dict(RunConfig, first["config"]), from_dict(RunConfig, found["config"]))
        names += [name for name in options if not name.endswith(_PATHS)]
        if names:
            raise UserError(
                f"process {index} differs from process 0 in its {', '.join(names)}; start all with the same "
                "command, Python and files, or put the files in a bucket"
            )


def is_complete(cfg: RunConfig, run_dir: AnyPath, new_data: bool = False) -> bool:
    """Whether the run folder's newest checkpoint is this config's last; UserError if the run is another."""
    if is_first():  # the others may see a folder that the first is still making
        changed_options(cfg, location(run_dir), new_data)

    def newest_is_last() -> bool:
        records = complete_records(run_dir)
        return bool(records) and records[-1].step == cfg.steps and records[-1].final

    return by_first("stage complete", newest_is_last)


@dataclass
class _Pending:
    """A step that was dispatched and not yet looked at: the host prepares the next batch meanwhile."""

    step: int
    metrics: dict[str, jax.Array]
    batch: int  # the number of its batch


@dataclass(kw_only=True)
class _Trainer:
    cfg: RunConfig
    run_dir: epath.Path
    mesh: Mesh
    tokenizer: Tokenizer
    data: TrainIterator
    new_data: bool  # files and mixture may differ from the checkpoint's
    heldout: HeldoutLoss | None  # for keep_best
    history: History
    goodput: Goodput
    stop: StopRequest
    dog: Watchdog
    still_ours: Callable[[], None]  # raises where another run took the folder's lease

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.run_dir, self.cfg.checkpoint)
        self.guard = LossGuard(self.cfg.guard)
        self.train_step: Any = None  # compiled at the first step
        self.state: TrainState | None = None
        self.pending: _Pending | None = None
        self.fresh: dict[str, Any] = {"data": self.data.get_state(), "recent_losses": []}

    def run(self, changes: dict[str, tuple[Any, Any]]) -> None:
        """Train to the last step, going back and past bad batches where the config says so."""
        if removed := self.checkpoints.clean():
            _tell(f"removed {', '.join(removed)}, which no save ended (no checksums.json)")
        step = self._restore()
        if step == self.cfg.steps:
            self.checkpoints.mark_final(step)  # it may be of a run that was to go further
        if is_first():
            describe_run(self.cfg, self.run_dir, self.mesh)
        if changes:
            _tell(f"going on from step {step} with other options: {listed(changes)}")
            self.history.event("config_changed", step, changes={k: list(v) for k, v in changes.items()})
        while True:
            with Metrics(self.run_dir, self.cfg, step, list(self.mesh.devices.flat)) as metrics:
                self.history.event(
                    "start", step, processes=jax.process_count(), devices=self.mesh.size,
                    mesh=dict(self.mesh.shape), restored=step or None, lost=metrics.lost, data=self.data.stats,
                )  # fmt: skip
                with self.goodput.spent("step"):
                    bad = self._train(step, metrics)
            if bad is None:
                break
            step = self._go_back(bad)
        self._wait_for_save(self.cfg.steps)
        self._tell_completed()
        self._tell_goodput(self.cfg.steps)
        self.history.event("end", self.cfg.steps)
        _tell(f"complete at step {self.cfg.steps}: {self.run_dir}")
        barrier("end")

    def _restore(self) -> int:
        """Set state, data and guard to the last sound checkpoint or to the start; the step reached."""
        cfg, seen = self.cfg, len(self.checkpoints.set_aside)
        self.dog.beat(0, "restoring", _SLOW_MINUTES)
        with self.goodput.spent("restore"):
            found = self.checkpoints.restore_latest(abstract_state(cfg, self.mesh))
            for damage in self.checkpoints.set_aside[seen:]:
                _tell("checkpoint {path} is damaged ({reason}); it is now {moved_to}".format(**damage))
                self.history.event("damaged", found[2] if found else 0, **damage)
            if found is None:
                by_first("never saved", self._require_never_saved)
                self.state, step, stored = self._first_state(), 0, self.fresh
            else:
                self.state, stored, step = found
                self.tokenizer.require(cfg.model.vocab_size, stored["tokenizer"])
            if step > cfg.steps:
                raise UserError(f"{self.run_dir} is at step {step}, past steps={cfg.steps}; raise steps")
            if changed := self.data.set_state(stored["data"], self.new_data):
                _tell(f"going on from step {step} with other data: {'; '.join(changed)}")
                self.history.event("data_changed", step, changes=changed)
            self.guard.reset(stored["recent_losses"])
            jax.block_until_ready(self.state)
        self.dog.beat(step + 1)
        return step

    def _require_never_saved(self) -> None:
        """UserError where checkpoints were completed and none is there: training would go over what was reached."""
        steps = [line["step"] for line in read_lines(self.run_dir / "events.jsonl") if line["event"] == "complete"]
        if steps:
            raise UserError(
                f"{self.checkpoints.folder} is empty, where step {steps[-1]} was saved; put a checkpoint back, or "
                "train from the start in another folder"
            )

    def _first_state(self) -> TrainState:
        cfg = self.cfg
        if not cfg.init_from:
            return init_state(cfg, self.mesh)
        path = final_checkpoint(cfg.init_from)
        stored, _ = describe(path)
        self.tokenizer.require(cfg.model.vocab_size, stored["tokenizer"])
        if changes := changed_model(config_of(path, stored), cfg):
            _tell(f"starting from {cfg.init_from} as another model: {listed(changes)}")
            self.history.event("model_changed", 0, changes={k: list(v) for k, v in changes.items()})
        params, biases = restore_model(path, abstract_state(cfg, self.mesh))
        return replace(init_state(cfg, self.mesh), params=params, biases=biases)

    def _train(self, start: int, metrics: Metrics) -> BadStep | None:
        """Step from `start` to the end, or to a bad step."""
        cfg, clock, several = self.cfg, StepClock(), jax.process_count() > 1
        self.saved = time.monotonic()
        for step in range(start + 1, cfg.steps + 1):
            with self.goodput.spent(self._data_or_step):
                number, batch = self.data.batch_number, next(self.data)
                arrays = put_batch(batch, self.mesh)
            if several:
                arrays["votes"] = put_votes(self.mesh, self._vote())
            if self.train_step is None:
                self._compile(step, arrays)
                clock = StepClock()
            self.state, values = self.train_step(self.state, arrays)  # pyrefly: ignore[not-callable]
            bad, vote_of_all = self._settle(metrics, clock)
            if bad:
                return bad
            self.pending = _Pending(step, values, number)
            if self._saves(step) or vote_of_all:
                # Settled first: a checkpoint never holds a step that is bad or not logged.
                bad, _ = self._settle(metrics, clock, saving=True)
                if bad:
                    return bad
                metrics.flush()
                self._save(step, metrics, wait=vote_of_all == _STOP)
                clock = StepClock()  # no step's time holds a save
                if vote_of_all == _STOP:
                    raise Preempted(
                        f"{self.stop.name or 'another process'}: step {step} is saved in {self.run_dir}"
                    )
            self.checkpoints.check()
            self._tell_completed()
        return None

    def _data_or_step(self) -> str:
        """What went by while a batch was prepared: nothing is lost as long as the devices are at work."""
        loss: Any = self.pending and self.pending.metrics["loss"]
        return "data" if loss is None or loss.is_ready() else "step"

    def _settle(self, metrics: Metrics, clock: StepClock, saving: bool = False) -> tuple[BadStep | None, int]:
        """Wait for the pending step and log it where it is due: (what was wrong with it, what all voted)."""
        done, self.pending = self.pending, None
        if done is None:
            return None, 0
        values = jax.device_get(done.metrics)
        self.dog.beat(done.step + 1)
        vote = int(values.pop("vote")) if "vote" in values else self._vote()
        bad = self.guard.check(done.step, float(values["loss"]), float(values["grad_norm"]), done.batch)
        if bad is None:
            clock.add(values)
            if done.step % self.cfg.log_every == 0 or self._saves(done.step) or saving:
                routed, seconds, real, trained = clock.lap()
                metrics.log(done.step, values | routed, seconds, real, trained)
        return bad, vote

    def _vote(self) -> int:
        if self.stop.name:
            return _STOP
        minutes = self.cfg.checkpoint.every_minutes
        return _SAVE if minutes and is_first() and time.monotonic() - self.saved > 60 * minutes else 0

    def _saves(self, step: int) -> bool:
        return step % self.cfg.checkpoint.every_steps == 0 or step == self.cfg.steps

    def _compile(self, step: int, arrays: dict[str, jax.Array]) -> None:
        begin = time.perf_counter()
        self.dog.beat(step, "compiling", _SLOW_MINUTES)
        with self.goodput.spent("compile"):  # apart, so that no step's time holds it
            step_function: Any = make_train_step(self.cfg, self.mesh)
            self.train_step = step_function.lower(self.state, arrays).compile()
            together("compiled", lambda: None)  # else the first step would wait for the slowest
        self.history.event("compiled", step - 1, seconds=round(time.perf_counter() - begin, 3))
        self.dog.beat(step)

    def _save(self, step: int, metrics: Metrics, wait: bool) -> None:
        begin = time.perf_counter()
        self.still_ours()
        with self.goodput.spent("save"):
            heldout = self._heldout_loss(step)
            if heldout is not None:
                metrics.heldout(step, heldout)
            self.dog.beat(step, "saving", _SLOW_MINUTES)  # it waits for the save before
            stored = {
                "config": to_dict(self.cfg),
                "data": self.data.get_state(),
                "tokenizer": self.tokenizer.fingerprint,
                "recent_losses": self.guard.recent,
            }
            final = step == self.cfg.steps
            self.checkpoints.save(step, self.state, stored, final=final, heldout_loss=heldout)
            if wait:
                self.checkpoints.wait()
        self.saved = time.monotonic()
        self.dog.beat(step + 1)
        blocked = round(time.perf_counter() - begin, 3)
        self.history.note("saved", step, blocked=blocked, heldout_loss=heldout)
        self._tell_goodput(step)
        if wait:
            self.history.event("preempted", step, signal=self.stop.name)

    def _wait_for_save(self, step: int) -> None:
        self.dog.beat(step, "saving", _SLOW_MINUTES)
        with self.goodput.spent("save"):
            self.checkpoints.wait()

    def _tell_completed(self) -> None:
        while self.checkpoints.completed:
            done = self.checkpoints.completed.pop(0)
            self.history.event("complete", done["step"], seconds=round(done["seconds"], 3), bytes=done["bytes"])

    def _tell_goodput(self, step: int) -> None:
        self.history.event("goodput", step, seconds=self.goodput.seconds)

    def _heldout_loss(self, step: int) -> float | None:
        if self.heldout is None:
            return None
        assert self.state is not None
        self.dog.beat(step, "evaluating", 0 if self.heldout.compiled else _SLOW_MINUTES)
        return self.heldout(self.state, lambda: self.dog.beat(step, "evaluating"))

    def _go_back(self, bad: BadStep) -> int:
        """Restore the last sound checkpoint and skip the batch, or stop; the step restored."""
        guard = self.cfg.guard
        self.pending = self.state = None  # before its successor is read: memory holds one
        skipped = self.data.get_state()["skipped"]
        goes_on = guard.on_bad_step == "skip" and len(skipped) < guard.max_skipped and bad.batch not in skipped
        action = "skip" if goes_on else "stop"
        self.history.event(
            "bad_step", bad.step, quantity=bad.quantity, value=str(bad.value), batch=bad.batch, action=action
        )
        self._wait_for_save(bad.step)
        sentence = f"{bad.quantity} is {bad.value} at step {bad.step} on batch {bad.batch}"
        steps = complete_steps(self.run_dir)
        last = f"step {steps[-1]} stays the last checkpoint" if steps else "there is no checkpoint yet"
        if not goes_on:
            many = f"; {len(skipped)} batches were skipped before" if skipped else ""
            mend = "raise guard.max_skipped" if guard.on_bad_step == "skip" else "set guard.on_bad_step=skip"
            raise UserError(
                f"{sentence}{many}; {last}: look at it with 'python -m moe_jax batch "
                f"{self.run_dir / 'config.json'} --batch {bad.batch}', lower optimizer.learning_rate, "
                f"or {mend}"
            )
        self.data.skip(bad.batch)
        step = self._restore()
        _tell(f"{sentence}: back to step {step}, past that batch")
        self.history.event("rolled_back", bad.step, to=step)
        return step
