"""What happens to a run, and what must follow each time: the promises of `moe_jax.train`, one function each.

A fault leaves the run on its way again. It returns the sentence that its victim said, which must name the file or
the process.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_jax.errors import MISTAKEN, PREEMPTED
from moe_jax.train.catalogue import checkpoint_path, complete_steps, set_aside_names
from moe_jax.train.checksums import FILE, read_record
from moe_jax.train.metrics import read_metrics
from tests.chaos.job import EVERY, PROCESSES, Job
from tests.chaos.witness import Witness

_PATIENCE = 240.0  # seconds until a run that does not come back fails the test
_POLL = 0.002
_FILE_BYTES = 64 * 2**10  # less than any process's share of a checkpoint
_OTHER_MESHES = (  # (processes, devices of each, overrides)
    (1, 4, ("mesh.fsdp=4", "mesh.expert=1")),
    (1, 2, ("mesh.fsdp=1", "mesh.expert=2")),
    (2, 1, ("mesh.fsdp=2", "mesh.expert=1")),
    (1, 1, ("mesh.fsdp=1", "mesh.expert=1")),
)
_REASSOCIATION = 1e-4  # relative, of a loss after at most two intervals between saves


@dataclass
class Scene:
    """The run, what is seen of it, and the losses of the run in peace, which the other meshes are held against."""

    job: Job
    seen: Witness
    rng: random.Random
    peace: dict[int, float]

    def any_process(self) -> int:
        """One of them."""
        return self.rng.randrange(PROCESSES)

    def until(self, what: str, is_so: Callable[[], object], alive: bool = True) -> None:
        """Wait for it; AssertionError with the run's last words where it does not come."""
        deadline = time.monotonic() + _PATIENCE
        while not is_so():
            ended = alive and self.job.supervisor.poll() is not None
            assert not ended and time.monotonic() < deadline, f"no {what}:\n{self.words()[-3000:]}"
            time.sleep(_POLL)

    def words(self, since: int = 0) -> str:
        """What the supervisors have printed, from a byte on."""
        with self.job.output.open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def lives(self) -> int:
        """How often processes came so far that they trained; a step back past a bad batch is no new life."""
        return len(self.seen.named("compiled"))

    def comes_back(self, act: Callable[[], object]) -> int:
        """Do it, and wait until other processes train; the step from which they went on."""
        starts, lives = len(self.seen.named("start")), self.lives()
        act()
        self.until("new start", lambda: self.lives() > lives)
        return self.seen.named("start")[starts]["step"]

    def ends(self, status: int) -> None:
        """The supervisor ends by itself, with this status."""
        self.until("end", lambda: self.job.supervisor.poll() is not None, alive=False)
        assert self.job.supervisor.returncode == status, self.words()[-3000:]

    def refuses(self, *words: str) -> str:
        """A start with these words is refused by one sentence, which is returned."""
        since = self.job.output.stat().st_size
        self.job.start(*words)
        self.ends(MISTAKEN)
        return _last("^error: (.*)$", self.words(since))


def killed(scene: Scene) -> str:
    """SIGKILL of one process at any moment of a step."""
    process, since = scene.any_process(), scene.job.output.stat().st_size
    time.sleep(scene.rng.uniform(0, 0.1))
    scene.comes_back(lambda: scene.job.strike(process))
    return _last(r"^\[launch\] (process \d was killed by SIGKILL; going on .*)$", scene.words(since))


def killed_while_saving(scene: Scene) -> str:
    """SIGKILL of one process with a checkpoint half-written."""
    since, process = scene.job.output.stat().st_size, scene.any_process()
    for _ in range(10):
        victims = scene.job.pids()
        scene.until("save", lambda: _half_written(scene.job.run))
        pid = victims[process]
        lives = scene.lives()
        os.kill(pid, signal.SIGKILL)
        landed = _half_written(scene.job.run)
        scene.until("new start", lambda lives=lives: scene.lives() > lives)
        if landed:
            return _last(r"^\[launch\] (process \d was killed by SIGKILL; going on .*)$", scene.words(since))
    raise AssertionError("no kill fell into a save")


def supervisor_killed(scene: Scene) -> str:
    """SIGKILL of the supervisor, which takes its processes along; the same command goes on."""
    scene.job.kill()
    return f"started again by hand, from step {scene.comes_back(scene.job.start)}"


def preempted(scene: Scene) -> str:
    """SIGTERM: the step reached is saved, all processes agree on it, and the status says `start me again`."""
    since = scene.job.output.stat().st_size
    scene.job.supervisor.send_signal(signal.SIGTERM)
    scene.ends(PREEMPTED)
    said = re.findall(r"\[p(\d) try \d+\] preempted: .*step (\d+) is saved", scene.words(since))
    saved, logged = complete_steps(scene.job.run)[-1], read_metrics(scene.job.run)[-1]["step"]
    assert {int(step) for _, step in said} == {saved} == {logged}, (said, saved, logged)
    assert len(said) == PROCESSES, said
    assert scene.comes_back(scene.job.start) == saved
    return _last(r"\] (preempted: .*)$", scene.words(since))


def file_truncated(scene: Scene) -> str:
    """The newest checkpoint has a file cut short."""

    def cut(file: Path) -> None:
        os.truncate(file, scene.rng.randrange(file.stat().st_size))

    return _damaged(scene, cut)


def file_deleted(scene: Scene) -> str:
    """The newest checkpoint lacks a file."""
    return _damaged(scene, Path.unlink)


def byte_flipped(scene: Scene) -> str:
    """The newest checkpoint has one bit wrong."""

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[scene.rng.randrange(len(content))] ^= 1 << scene.rng.randrange(8)
        file.write_bytes(content)

    return _damaged(scene, flip)


def _damaged(scene: Scene, damage: Callable[[Path], None]) -> str:
    """Between two starts; it must be named and set aside, and the one before it be restored."""
    run = scene.job.run
    scene.until("second checkpoint", lambda: len(complete_steps(run)) > 1)
    scene.job.kill()
    *_, before, newest = complete_steps(run)
    path, aside = Path(checkpoint_path(run, newest)), set(set_aside_names(run))
    names = [name for name, (size, _) in read_record(checkpoint_path(run, newest)).files.items() if size]
    name = scene.rng.choice([*names, FILE] if damage is not Path.unlink else names)
    damage(path / name)
    since = scene.job.output.stat().st_size
    assert scene.comes_back(scene.job.start) == before
    moved = set(set_aside_names(run)) - aside
    assert [found.partition(".")[0] for found in moved] == [str(newest)]
    said = _last(r"\] (checkpoint .* is damaged .*)$", scene.words(since))
    assert str(path) in said and name in said and moved.pop() in said
    return said


def save_failed(scene: Scene) -> str:
    """One process cannot write: a limit on file size fails the same calls as a full disk."""
    process = PROCESSES - 1  # not the one that writes logs, which would fail sooner
    since, before = scene.job.output.stat().st_size, complete_steps(scene.job.run)
    resource.prlimit(scene.job.pids()[process], resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
    scene.ends(MISTAKEN)
    said = _last("^error: (.*)$", scene.words(since))
    assert f"process {process}" in said and "saving checkpoint" in said
    kept = complete_steps(scene.job.run)
    assert kept and kept[-1] >= before[-1] and f"step {kept[-1]}" in said
    scene.comes_back(scene.job.start)
    return said


def hung(scene: Scene) -> str:
    """One process stands still: its peer's watchdog ends the wait, and the supervisor the stopped one."""
    since, process = scene.job.output.stat().st_size, scene.any_process()
    scene.comes_back(lambda: os.kill(scene.job.pids()[process], signal.SIGSTOP))
    said = _last(r"\] error: (process \d+ hung .*)$", scene.words(since))
    assert "Thread 0x" in (scene.job.run / f"hang-{1 - process}.txt").read_text()
    return said


def second_run(scene: Scene) -> str:
    """Another supervisor on the same folder is refused; the first does not notice."""
    output, lives = scene.job.run.with_suffix(".second.log"), scene.lives()
    output.unlink(missing_ok=True)
    other = scene.job.another(output)
    try:
        assert other.wait(_PATIENCE) == MISTAKEN, output.read_text()
    finally:
        other.kill()
    assert scene.lives() == lives
    said = _last("^error: (.*)$", output.read_text())
    assert f"{scene.job.run} is in use by process {scene.job.pids()[0]} " in said
    return said


def data_changed(scene: Scene) -> str:
    """A file of the corpus is missing, shorter or another one: refused by its name until it is back."""
    scene.job.kill()
    file = scene.rng.choice(sorted(scene.job.texts.glob("[0-9].txt")))
    aside = file.with_suffix(".aside")
    text = file.read_text()
    file.rename(aside)
    changed = scene.rng.choice((None, text[: len(text) // 2], text.replace("alpha", "omega")))
    if changed is not None:
        file.write_text(changed)
    said = scene.refuses()
    assert str(file) in said
    aside.replace(file)
    scene.comes_back(scene.job.start)
    return said


def config_refused(scene: Scene) -> str:
    """An option that changes the arrays or the batches is refused by its name."""
    scene.job.kill()
    word = scene.rng.choice(("model.num_layers=3", "data.seq_len=16", "model.moe.num_experts_per_tok=1", "seed=1"))
    said = scene.refuses(word)
    assert word.partition("=")[0] in said
    scene.comes_back(scene.job.start)
    return said


def config_changed(scene: Scene) -> str:
    """An option that changes neither goes on, and the difference is listed."""
    scene.job.kill()
    since = scene.job.output.stat().st_size
    keep = scene.rng.randrange(10, 1000)
    scene.comes_back(lambda: scene.job.start(f"checkpoint.keep_every={EVERY * keep}"))
    return _last(r"\] (going on .* checkpoint\.keep_every was \d+, is \d+.*)$", scene.words(since))


def other_mesh(scene: Scene) -> str:
    """A copy of the run goes on with other devices, meshes and processes: the same losses but for reassociation."""
    scene.until("checkpoint", lambda: complete_steps(scene.job.run))
    scene.job.kill()
    start = complete_steps(scene.job.run)[-1]
    copy = scene.job.run.with_name(f"elsewhere-{start}")
    shutil.copytree(scene.job.run, copy)
    processes, devices, overrides = scene.rng.choice(_OTHER_MESHES)
    steps = min(start + EVERY, max(scene.peace))
    with Job(scene.job.config, copy) as job:
        job.start(*overrides, f"steps={steps}", processes=processes, devices=devices)
        assert job.supervisor.wait(_PATIENCE) == 0, job.output.read_text()[-3000:]
    losses = {line["step"]: line["loss"] for line in read_metrics(copy) if line["step"] > start}
    assert sorted(losses) == list(range(start + 1, steps + 1))
    assert losses == pytest.approx({step: scene.peace[step] for step in losses}, rel=_REASSOCIATION)
    shutil.rmtree(copy)
    scene.comes_back(scene.job.start)
    return f"{processes} x {devices} devices, {' '.join(overrides)}: losses {start + 1} to {steps} agree"


FAULTS = (
    killed, killed_while_saving, supervisor_killed, preempted, file_truncated, file_deleted, byte_flipped,
    save_failed, hung, second_run, data_changed, config_refused, config_changed, other_mesh,
)  # fmt: skip


def _half_written(run: Path) -> list[Path]:
    return [path for path in (run / "checkpoints").glob("*") if not _is_over(path)]


def _is_over(path: Path) -> bool:
    return ".damaged-" in path.name or (path.name.isdecimal() and (path / FILE).exists())


def _last(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    assert found, f"nothing like {pattern!r} in:\n{text[-3000:]}"
    return found[-1]
