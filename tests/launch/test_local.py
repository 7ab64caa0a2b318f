"""The supervisor: which ends of real processes it restarts, passes on or gives up on; no orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.local import LocalJob, _Supervisor
from launch.record import read_record
from moe_jax.config import RunConfig
from moe_jax.errors import HUNG, MISTAKEN, PREEMPTED
from moe_jax.files import location
from moe_jax.run_lock import exclusive
from tests.chaos.job import is_alive

ROOT = Path(__file__).parents[2]
# A trainer's manners without a trainer. RUN/script.json holds, per attempt and process, what to do.
CHILD = """
import json, os, pathlib, signal, sys, time
run, index = pathlib.Path(sys.argv[1]), int(os.environ.get("JAX_PROCESS_ID", "0"))
with (run / "started").open("a") as file:
    file.write(json.dumps([index, os.getpid(), os.environ.get("JAX_COORDINATOR_ADDRESS")]) + "\\n")
def save(*_):
    print("saving", flush=True)
    time.sleep(0.2)
    os._exit(75)
for word in json.loads((run / "script.json").read_text()).pop(int(os.environ["ATTEMPT"]) - 1)[index]:
    if word == "obey":
        signal.signal(signal.SIGTERM, save)
    elif word == "refuse":
        signal.signal(signal.SIGTERM, lambda *_: print("never", flush=True))
    elif word == "sleep":
        print("waiting", flush=True)
        time.sleep(60)
    elif word == "see a save":
        while not list(run.glob("checkpoints/*/checksums.json")):
            time.sleep(0.01)
    elif word == "save":
        newest = max([int(p.name) for p in (run / "checkpoints").glob("*")], default=0) + 4
        (run / "checkpoints" / str(newest)).mkdir(parents=True)
        (run / "checkpoints" / str(newest) / "checksums.json").write_text("{}")
    elif isinstance(word, list):
        os.kill(os.getpid(), word[0])
        time.sleep(60)
    elif isinstance(word, float):
        time.sleep(word)
    elif isinstance(word, int):
        sys.exit(word)
    else:
        print(word, flush=True)
"""
DRIVER = """
import sys
from moe_jax.command_line import guarded
from tests.launch.test_local import Scripted, supervise
sys.exit(guarded(supervise, Scripted("", [], sys.argv[1], processes=int(sys.argv[2]), folder=sys.argv[1])))
"""


@dataclass(frozen=True)
class Scripted(LocalJob):
    """A job whose processes follow a script instead of training."""

    @property
    def command(self):
        return [sys.executable, "-c", CHILD, self.run]

    def new_environments(self):
        with Path(self.run, "attempts").open("a") as file:
            file.write("x")
            attempt = {"ATTEMPT": str(file.tell())}
        return [environment | attempt for environment in super().new_environments()]


def supervise(job: LocalJob) -> int:
    return _Supervisor(job, [(RunConfig(steps=100), location(job.run))]).run()


def scripted(run: Path, *attempts: list, **fields) -> Scripted:
    run.mkdir(exist_ok=True)
    (run / "script.json").write_text(json.dumps(attempts))
    return Scripted("", [], str(run), processes=len(attempts[0]), folder=str(run), **fields)


def attempts(run: Path) -> int:
    return (run / "attempts").stat().st_size


def started(run: Path) -> list[list]:
    return [json.loads(line) for line in (run / "started").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr("launch.local._LONGEST_PAUSE", 0.01)


def test_a_killed_process_takes_its_peers_along_and_all_start_again_from_the_checkpoint(tmp_path, capfd):
    job = scripted(tmp_path, [["save", "sleep"], ["see a save", [signal.SIGKILL]]], [["half"], ["whole"]])
    assert supervise(job) == 0
    out = capfd.readouterr().out
    assert "process 1 was killed by SIGKILL; going on from the checkpoint of step 4; restarts left: 2" in out
    assert "[p0 try 2] half" in out and "[p1 try 2] whole" in out
    ports = [address for _, _, address in started(tmp_path)]
    assert len(ports) == 4 and ports[0] == ports[1] and ports[2] == ports[3]
    log = (tmp_path / "process-0.log").read_text()
    assert log.count("--- attempt") == 2 and log.endswith("half\n")


def test_a_stopped_peer_is_ended_too(tmp_path):
    assert supervise(scripted(tmp_path, [[[signal.SIGSTOP]], ["sleep"], [7]], max_restarts=0)) == 7
    assert not any(Path(f"/proc/{pid}").exists() for _, pid, _ in started(tmp_path))


@pytest.mark.parametrize(("status", "left"), [(1, 1), (HUNG, 1), (PREEMPTED, 2)])
def test_crashes_and_hangs_count_and_preemptions_do_not(tmp_path, capfd, status, left):
    assert supervise(scripted(tmp_path, [["save", status]], [[]], max_restarts=2)) == 0
    assert f"restarts left: {left}" in capfd.readouterr().out


def test_after_the_last_restart_the_status_is_the_processs_own(tmp_path, capfd):
    assert supervise(scripted(tmp_path, [[[signal.SIGKILL]]], [[HUNG]], max_restarts=1)) == HUNG
    out = capfd.readouterr().out
    assert "from the start" in out and "no restarts are left" in out and attempts(tmp_path) == 2


def test_what_the_user_must_mend_ends_it_and_is_said_last(tmp_path, capfd):
    job = scripted(tmp_path, [["error: mend it", MISTAKEN], ["sleep"]], max_restarts=5)
    assert supervise(job) == MISTAKEN
    assert capfd.readouterr().err == "error: mend it\n" and attempts(tmp_path) == 1


def test_the_cause_is_found_behind_a_peer_that_it_took_along(tmp_path, capfd):
    assert supervise(scripted(tmp_path, [[1], [0.2, "error: mend it", MISTAKEN]])) == MISTAKEN
    assert capfd.readouterr().err == "error: mend it\n"


def test_a_crash_after_an_orderly_end_ends_the_rest_which_may_have_waited_for_a_last_save(tmp_path, capfd):
    job = scripted(tmp_path, [["save"], ["see a save", 0.5, 1], ["sleep", "late"]], max_restarts=0)
    assert supervise(job) == 1
    out = capfd.readouterr().out
    assert "process 1 exited with status 1" in out and "late" not in out


def test_a_killed_process_without_restarts_gives_the_status_of_a_shell(tmp_path):
    assert supervise(scripted(tmp_path, [[[signal.SIGKILL]]], max_restarts=0)) == 128 + signal.SIGKILL


def test_crashes_without_a_new_checkpoint_are_spaced_out(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("launch.local._LONGEST_PAUSE", 1.5)
    assert supervise(scripted(tmp_path, [["save", 1]], [[1]], [[1]], [[]])) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "going on" in line]
    assert [" in " in line for line in lines] == [False, True, True], lines


def test_lines_of_many_processes_stay_whole(tmp_path, capfd):
    long = "x" * 3000
    assert supervise(scripted(tmp_path, [[long] * 50] * 3)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert sorted(set(lines)) == [f"[p{index} try 1] {long}" for index in range(3)] and len(lines) == 150


def test_a_local_run_is_recorded_and_resumed_exactly_from_anywhere(tiny, tmp_path, monkeypatch, capfd):
    jobs: list[LocalJob] = []
    monkeypatch.setattr(_Supervisor, "run", lambda self: jobs.append(self._job) or 0)
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    (tmp_path / "config.json").write_text((tiny.root / "config.json").read_text())
    monkeypatch.chdir(tmp_path)
    words = ["config.json", "--run", "run", "--processes", "2", "--devices-per-process", "3", "seed=7"]
    assert main(["local", *words, "--max-restarts", "9"]) == 0
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("JAX_ENABLE_X64")
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert f"train {tmp_path}/config.json seed=7 --run run" in capfd.readouterr().out
    first, again = jobs
    assert again == first and (again.processes, again.devices, again.max_restarts) == (2, 3, 9)
    assert again.folder == str(tmp_path) and again.new_environments()[1]["JAX_ENABLE_X64"] == "0"
    assert read_record(str(tmp_path / "run"))["git"].keys() == {"commit", "diff", "untracked"}


@pytest.fixture
def trained(tiny, tmp_path, monkeypatch) -> list[LocalJob]:
    """Jobs in their order; the first was started in `old`, its run is `run` there, with a checkpoint of step 4."""
    jobs: list[LocalJob] = []
    monkeypatch.setattr(_Supervisor, "run", lambda self: jobs.append(self._job) or 0)
    (tmp_path / "old").mkdir()
    monkeypatch.chdir(tmp_path / "old")
    assert main(["local", str(tiny.root / "config.json"), "--run", "run"]) == 0
    checkpoint = tmp_path / "old/run/checkpoints/4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checksums.json").write_text("{}")
    monkeypatch.chdir(ROOT)
    return jobs


def test_a_moved_or_copied_run_goes_on_in_the_folder_that_is_named(tiny, trained, tmp_path, capfd):
    old, new = tmp_path / "old/run", tmp_path / "new/run"
    shutil.copytree(old, new)
    (new / "config.json").write_text((tiny.root / "config.json").read_text())
    assert main(["resume", str(new)]) == 0
    shutil.rmtree(old)
    assert main(["resume", str(new)]) == 0 and not old.exists()
    _, copied, moved = trained
    # The working directory is still the old one, for relative paths of data.
    assert copied == moved and (moved.root, moved.folder) == (str(new), str(tmp_path / "old"))
    assert f"--run {new}  # in {tmp_path}/old" in capfd.readouterr().out
    assert _Supervisor(moved, moved.stages)._reached() == (4,)
    assert read_record(str(new))["job"]["run"] == str(new)


def test_a_run_whose_working_directory_is_gone_is_refused_with_what_to_do(trained, tmp_path, capfd):
    (tmp_path / "old").rename(tmp_path / "new")
    assert main(["resume", str(tmp_path / "new/run")]) == MISTAKEN
    error = capfd.readouterr().err
    assert f"{tmp_path}/old, where" in error and f"with --run {tmp_path}/new/run" in error
    assert error.count("\n") == 1 and len(trained) == 1


def test_a_local_run_in_a_bucket_is_recorded_and_resumed_there(tiny, tmp_path, monkeypatch, bucket):
    jobs: list[LocalJob] = []
    monkeypatch.setattr(_Supervisor, "run", lambda self: jobs.append(self._job) or 0)
    monkeypatch.chdir(tmp_path)
    assert main(["local", str(tiny.root / "config.json"), "--run", f"{bucket}/run"]) == 0
    assert main(["resume", f"{bucket}/run"]) == 0
    assert not list(tmp_path.iterdir()) and jobs[0] == jobs[1] and jobs[1].root == f"{bucket}/run"
    with exclusive(f"{bucket}/run"):  # a lease may be of the dead: the trainer finds out
        assert main(["resume", f"{bucket}/run"]) == 0


def test_a_folder_that_is_no_run_is_refused_and_nothing_is_written(tiny, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["local", str(tiny.root / "config.json"), "--run", str(tmp_path)]) == MISTAKEN
    assert "is no run folder" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_second_start_is_refused_and_the_record_of_the_first_stays(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(_Supervisor, "run", lambda self: 0)
    monkeypatch.setattr("launch.local._FREED_SECONDS", 0.6)
    words = ["local", str(tiny.root / "config.json"), "--run", str(tmp_path / "run")]
    assert main(words) == 0
    record = (tmp_path / "run/launch.json").read_bytes()
    with exclusive(tmp_path / "run"):
        assert main([*words, "steps=99", "--processes", "2"]) == MISTAKEN
    assert f"run is in use by process {os.getpid()} on " in capfd.readouterr().err
    assert (tmp_path / "run/launch.json").read_bytes() == record
    assert main([*words, "steps=99"]) == 0 and read_record(str(tmp_path / "run"))["overrides"] == ["steps=99"]


def test_restarts_go_on_when_nobody_reads_what_is_said(tmp_path):
    scripted(tmp_path, [[3]], [["half", 0]])
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", DRIVER, str(tmp_path), "1"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert (attempts(tmp_path), done.returncode, done.stderr) == (2, 0, b"")
    assert (tmp_path / "process-0.log").read_text().endswith("half\n")


def test_each_process_is_told_its_number_and_all_one_new_port():
    job = LocalJob("demo_pretrain", [], "r", processes=3, devices=2, environment={"JAX_PROCESS_ID": "9"})
    first, second = job.new_environments(), job.new_environments()
    assert [environment["JAX_PROCESS_ID"] for environment in first] == ["0", "1", "2"]
    assert {e["JAX_COORDINATOR_ADDRESS"] for e in first} != {e["JAX_COORDINATOR_ADDRESS"] for e in second}
    assert {(e["JAX_NUM_PROCESSES"], e["JAX_PLATFORMS"], e["JAX_NUM_CPU_DEVICES"]) for e in first} == {
        ("3", "cpu", "2")
    }
    (alone,) = LocalJob("demo_pretrain", [], "r", environment={}).new_environments()
    assert not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & alone.keys()


def drive(run: Path, *attempts: list) -> subprocess.Popen:
    """A supervisor of its own whose first processes have said that they wait."""
    scripted(run, *attempts)
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run), str(len(attempts[0]))],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    for _ in attempts[0]:
        while "waiting" not in (line := child.stdout.readline()):
            assert line, "it ended"
    return child


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_is_passed_on_and_waited_for(tmp_path, number):
    child = drive(tmp_path, [["obey", "sleep"], ["obey", "sleep"]])
    child.send_signal(number)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == PREEMPTED and out.count("saving") == 2, out


def test_a_notice_to_one_that_is_still_starting_is_a_preemption_all_the_same(tmp_path):
    child = drive(tmp_path, [["sleep"]])  # it has no handler yet
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == PREEMPTED and "process 0 was killed by SIGTERM when it was told to end" in out


def test_a_second_interrupt_kills(tmp_path):
    child = drive(tmp_path, [["refuse", "sleep"], ["obey", "sleep"]])
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    while "never" not in child.stdout.readline():
        pass
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT


def test_a_killed_supervisor_leaves_no_orphan(tmp_path):
    child = drive(tmp_path, [["obey", "sleep"], ["obey", "sleep"]])
    child.kill()
    child.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for _, pid, _ in started(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
