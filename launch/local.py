"""`python -m launch local`: a run's processes on this machine, started again from the last checkpoint if one dies.

A run survives what kills a process, not what a user must mend: status MISTAKEN ends it, PREEMPTED goes on without
counting, and everything else is a crash, of which there may be `--max-restarts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import configs
from launch.processes import Ended, Processes, python, say
from launch.record import environment_of_interest, job_record, write_record
from moe_jax.command_line import add_command
from moe_jax.config import RunConfig
from moe_jax.errors import INTERRUPTED, MISTAKEN, PREEMPTED, UserError
from moe_jax.files import is_remote, location
from moe_jax.run_lock import holder
from moe_jax.train.catalogue import complete_steps

_SAVE_SECONDS = 900.0  # from a notice to the end: a checkpoint of the current step must fit
_TOGETHER_SECONDS = 120.0  # between the orderly ends of the first process and the last
_LAST_WORDS_SECONDS = 1.0  # for what the peers of a failed process still say; it may be the true cause
_FREED_SECONDS = 10.0
_LONGEST_PAUSE = 30.0
_OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class LocalJob:
    """What to run on this machine. Every field is plain JSON, so that a record of it rebuilds the same job."""

    config: str  # what `python -m moe_jax train` takes
    overrides: list[str]
    run: str
    processes: int = 1
    devices: int = 0  # fake CPU devices of each process; 0 uses what is there
    max_restarts: int = 3
    new_data: bool = False
    folder: str = field(default_factory=os.getcwd)  # that relative paths are relative to
    environment: dict[str, str] = field(default_factory=lambda: environment_of_interest(_OURS))

    def __post_init__(self) -> None:
        if self.processes < 1 or self.devices < 0 or self.max_restarts < 0:
            raise UserError("--processes must be 1 or more, --devices-per-process and --max-restarts 0 or more")

    @property
    def root(self) -> str:
        """The run folder, wherever this process stands."""
        run = os.path.expanduser(self.run)  # a shell leaves --run=~/a as it is
        return str(location(run if is_remote(run) else os.path.join(self.folder, run)))

    @property
    def stages(self) -> list[tuple[RunConfig, Any]]:
        """(config, run folder) of each, as the trainer lays them out."""
        runs = [configs.load(name, self.overrides) for name in self.config.split(",")]
        root = location(self.root)
        return [(cfg, root / cfg.stage if len(runs) > 1 else root) for cfg in runs]

    @property
    def command(self) -> list[str]:
        """What each process runs."""
        words = ["-m", "moe_jax", "train", self.config, *self.overrides, "--run", self.run]
        return python(*words, *(["--new-data"] if self.new_data else []))

    def new_environments(self) -> list[dict[str, str]]:
        """Of each process, for one attempt: each call finds another free port."""
        common = {k: v for k, v in os.environ.items() if k not in _OURS} | self.environment
        common["PYTHONUNBUFFERED"] = "1"
        if self.devices:
            common |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.devices)}
        if self.processes == 1:
            return [common]
        # A new port each time: the last coordinator's may still be taken.
        values = (f"127.0.0.1:{_free_port()}", str(self.processes))
        common |= {"JAX_PLATFORMS": "cpu"} | dict(zip(_OURS, values, strict=False))
        return [common | {_OURS[2]: str(index)} for index in range(self.processes)]


def run_local(job: LocalJob) -> int:
    """Train until the run ends by itself, is told to end, or has crashed once more than it may; the exit status.

    SIGTERM and SIGINT are passed on once, and a second SIGINT kills.

    Raises:
        UserError: a mistyped option, or a folder that is not this run's or is in use; nothing has been started
            or written.
    """
    from moe_jax.train.run_folder import changed_options

    stages = job.stages
    for cfg, folder in stages:
        changed_options(cfg, folder, job.new_data)
        if not is_remote(folder):  # of a lease only the trainer can tell whether its holder is dead
            _await_free(folder)
    record = job_record("local", dataclasses.asdict(job), job.config, job.overrides)
    write_record(job.root, record)
    return _Supervisor(job, stages).run()


def _await_free(folder: Any) -> None:
    """UserError where a run of this machine holds a folder on a disk, whose record is not to be overwritten.

    A trainer that was killed holds it until its memory is freed.
    """
    deadline = time.monotonic() + _FREED_SECONDS
    while (holding := holder(folder)).endswith(f" on {socket.gethostname()}"):
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is in use by {holding}; wait for it or stop it")
        time.sleep(0.5)


@dataclass
class _Outcome:
    """How an attempt ended: each process's status, the one to blame if any, and that one's own words."""

    statuses: list[int]
    blame: Ended | None
    error: str


class _Supervisor:
    def __init__(self, job: LocalJob, stages: list[tuple[RunConfig, Any]]) -> None:
        self._job, self._stages = job, stages
        self._events: SimpleQueue[Any] = SimpleQueue()  # an Ended, or the number of a signal that came
        self._told: list[int] = []
        self._logs = None if is_remote(job.run) else Path(job.root)

    def run(self) -> int:
        attempt, crashes, pause = 0, 0, 0.0
        with self._listening():
            while True:
                attempt, before = attempt + 1, self._reached()
                outcome = self._attempt(attempt)
                status = self._final_status(outcome)
                if status is not None:
                    return status
                if blame := outcome.blame:
                    crashes += 1
                    if crashes > self._job.max_restarts:
                        say(f"[launch] {blame.how}; no restarts are left, the same command goes on {self._place()}")
                        return blame.as_exit_status
                how = blame.how if blame else "the run was preempted"
                pause = 0.0 if self._reached() > before else min(max(2 * pause, 1.0), _LONGEST_PAUSE)
                wait = f" in {pause:.0f} s" if pause else ""
                left = self._job.max_restarts - crashes
                say(f"[launch] {how}; going on {self._place()}{wait}; restarts left: {left}")
                if self._wait(pause):
                    return PREEMPTED

    def _attempt(self, attempt: int) -> _Outcome:
        job = self._job
        group = Processes(job.command, job.new_environments(), attempt, self._events, self._logs, job.folder)
        alive, ended = set(range(job.processes)), list[Ended]()
        deadline: float | None = None
        while alive:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                event = self._events.get(timeout=left)
            except Empty:
                group.send(alive, signal.SIGKILL)  # a stopped process, too, obeys this one
                deadline = None
                continue
            if isinstance(event, Ended):
                alive.discard(event.process)
                ended.append(event)
                soonest = time.monotonic() + _patience(event.status)
                if len(ended) == 1 or event.status not in (0, PREEMPTED):
                    deadline = soonest if deadline is None else min(deadline, soonest)
            elif self._note(event):
                group.send(alive, signal.SIGTERM)
                deadline = time.monotonic() + _SAVE_SECONDS
            elif self._killed:
                group.send(alive, signal.SIGKILL)
        group.close()
        failed = [end for end in ended if end.status not in (0, PREEMPTED)]
        blame = failed[0] if failed else None
        if blame and blame.status > 0:  # what fails may take a peer along that dies sooner
            blame = next((end for end in failed if end.status == MISTAKEN), blame)
        return _Outcome([end.status for end in ended], blame, group.errors[blame.process] if blame else "")

    def _final_status(self, outcome: _Outcome) -> int | None:
        """The exit status of the whole; None where the run is to be started again."""
        blame = outcome.blame
        if blame is None:
            if not any(outcome.statuses):
                return 0
            return PREEMPTED if self._told else None
        if blame.status == MISTAKEN:
            with contextlib.suppress(OSError):  # nobody may be there to read it
                print(outcome.error or f"error: {blame.how}", file=sys.stderr, flush=True)
            return MISTAKEN
        if not self._told:
            return None
        if self._killed:
            return INTERRUPTED
        say(f"[launch] {blame.how} when it was told to end; the same command goes on {self._place()}")
        # One that was still starting knows of no checkpoint to write.
        return PREEMPTED if blame.status in (-signal.SIGTERM, -signal.SIGKILL) else blame.as_exit_status

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        old = {number: signal.signal(number, lambda n, _: self._events.put(n)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _note(self, number: int) -> bool:
        """Whether this is the first signal."""
        self._told.append(number)
        return len(self._told) == 1

    @property
    def _killed(self) -> bool:
        return signal.SIGINT in self._told[1:]

    def _wait(self, seconds: float) -> bool:
        """Whether a signal came in this time."""
        with contextlib.suppress(Empty):
            self._note(self._events.get(timeout=seconds))
        return bool(self._told)

    def _reached(self) -> tuple[int, ...]:
        """The newest complete checkpoint of each stage, -1 for none."""
        return tuple((complete_steps(folder) or [-1])[-1] for _, folder in self._stages)

    def _place(self) -> str:
        """From where the run goes on."""
        reached = self._reached()
        for (cfg, folder), step in zip(self._stages, reached, strict=True):
            if step < cfg.steps:
                of = f" of {folder.name}" if len(reached) > 1 else ""
                return f"from the checkpoint of step {step}{of}" if step >= 0 else f"from the start{of}"
        return "from its end"


def _patience(status: int) -> float:
    """Seconds that the peers of the first process to end have, by its status.

    A dead process makes a collective save impossible, so that its peers can lose nothing more.
    """
    if status in (0, PREEMPTED):
        return _TOGETHER_SECONDS
    return _LAST_WORDS_SECONDS if status > 0 and status != MISTAKEN else 0.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def add_local_command(commands: Any) -> None:
    """Add `local` to the subparsers of `python -m launch`."""
    sub = add_command(
        commands,
        "local",
        lambda arguments: run_local(job_of(arguments, arguments.config)),
        "train on this machine in one or more processes, restarted from the last checkpoint when one dies",
        "demo_pretrain --run runs/a",
        "demo_pretrain --run runs/a --processes 2 --devices-per-process 4 data.global_batch_size=8 mesh.fsdp=8",
        "demo_pretrain,demo_sft --run runs/all --max-restarts 10",
        config="what python -m moe_jax train takes",
    )
    sub.add_argument("--run", required=True, metavar="DIR", help="the run folder")
    sub.add_argument("--max-restarts", type=int, default=3, metavar="K", help="after crashes (default: 3)")
    add_local_options(sub)


def add_local_options(sub: Any) -> None:
    """Options of runs on this machine, for `job_of`."""
    sub.add_argument("--processes", type=int, default=1, metavar="N", help="that share the run (default: 1)")
    sub.add_argument(
        "--devices-per-process", "--devices", dest="devices", type=int, default=0, metavar="M",
        help="fake CPU devices of each (default: what is there)",
    )  # fmt: skip
    sub.add_argument("--new-data", action="store_true", help="go on although data.sources changed")


def job_of(arguments: Any, config: str, **fields: Any) -> LocalJob:
    """The job of a command line; `fields` replace its own."""
    names = ("overrides", "run", "processes", "devices", "max_restarts", "new_data")
    # A file is found again wherever the run is resumed from.
    found = (os.path.abspath(os.path.expanduser(n)) if n.endswith(".json") else n for n in config.split(","))
    return LocalJob(",".join(found), **({name: getattr(arguments, name) for name in names} | fields))


def resume_local(run: str, job: dict[str, Any], *_: bool) -> int:
    """Start the job recorded in the folder `run` again; here that costs nothing, and is not asked for twice.

    Raises:
        UserError: the folder where it was started is gone.
    """
    again, here = LocalJob(**job), str(location(run))
    if again.root != here:  # moved or copied; data and all else are still where it was started
        again = dataclasses.replace(again, run=here)
    if not os.path.isdir(again.folder):
        raise UserError(
            f"{again.folder}, where {run} was started and its relative paths begin, is gone; start the run by its "
            f"own command, with --run {run}"
        )
    say(f"[launch] {shlex.join(again.command)}  # in {again.folder}")
    return run_local(again)
