"""The demo kills in the middle, compares bit for bit, types public commands and touches nothing foreign."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conversion.__main__ import _parser as conversion_parser
from launch import demo
from launch.__main__ import main
from launch.demo import Demo, PartFailed, differences, kill_points, run_and_kill, run_demo
from moe_jax.__main__ import _parser as training_parser
from moe_jax.errors import UserError

# A trainer's traces without a trainer: a line a step, a committed checkpoint every 10, ended by itself at LAST.
CHILD = """
import json, pathlib, sys, time
run, last = pathlib.Path(sys.argv[1]), int(sys.argv[2])
for step in range(1, last + 1):
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": step, "loss": 1.0}) + "\\n")
    if step % 10 == 0:
        folder = run / "checkpoints" / str(step)
        folder.mkdir(parents=True)
        (folder / "checksums.json").touch()
    time.sleep(0.01)
"""


@given(st.integers(1, 500), st.integers(1, 100))
def test_kills_come_after_a_checkpoint_on_none_and_before_the_end(steps, every):
    try:
        points = kill_points(steps, every)
    except UserError as error:
        assert every < 2 or steps <= 2 * every + max(1, every // 4), error
        *more, every = map(int, re.findall(r" to (\d+)", str(error)))
        assert kill_points(more[0] if more else steps, every)
        return
    assert len(points) == 2 and points[0] < points[1]
    for saved, step in points:
        assert saved % every == 0 and saved < step < saved + every and step < steps


def test_the_demos_fine_tuning_has_room_for_two_kills(tmp_path):
    cfg = Demo(tmp_path / "run", [], False).configs["sft"]
    assert len(kill_points(cfg.steps, cfg.checkpoint.every_steps)) == 2


def test_too_few_steps_are_told_before_the_first_part(tmp_path):
    with pytest.raises(UserError, match=r"3 steps.*set steps to 6 and checkpoint.every_steps to 2"):
        Demo(tmp_path / "run", ["steps=3"], False)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_there_is_no_other_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").touch()
    assert Demo(run, [], False).parts == {}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    with pytest.raises(UserError, match="is no demo run"):
        Demo(tmp_path / "other", [], False)


SAVING = """
import signal, sys, time
def save(*_):
    time.sleep(0.6)
    open(sys.argv[1], "w").close()
    sys.exit(75)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print("ready", flush=True)
time.sleep(60)
"""
INTERRUPTED = """
import subprocess, sys
from launch.demo import finish
try:
    finish(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("everybody", [True, False], ids=["a terminal", "one process"])
def test_a_command_that_is_interrupted_saves_before_the_demo_ends(tmp_path, everybody):
    saved = tmp_path / "saved"
    command = [sys.executable, "-c", INTERRUPTED, SAVING, str(saved)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None and demo.stdout.readline() == "ready\n"
        (os.killpg if everybody else os.kill)(demo.pid, signal.SIGINT)
        assert demo.wait(60) == 130 and saved.exists()


def test_kill_waits_for_step_and_checkpoint(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", CHILD, str(run), "5000"]
    killed = run_and_kill(command, run, 20, 24, dict(os.environ))
    assert killed >= 24
    assert (run / "checkpoints/20/checksums.json").is_file()
    assert killed == len((run / "metrics.jsonl").read_text().splitlines())


def test_training_that_ends_before_the_kill_stops_the_demo(tmp_path):
    command = [sys.executable, "-c", CHILD, str(tmp_path / "run"), "3"]
    with pytest.raises(PartFailed, match="ended before it could be killed"):
        run_and_kill(command, tmp_path / "run", 20, 24, dict(os.environ))


def test_comparison_sees_one_bit_of_a_loss(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    assert differences(run, finished) == []
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    changed = next(line for line in lines if line["step"] == 7)
    changed["loss"] *= 1 + 2**-50
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differences(run, finished) == ["step 7"]


def test_comparison_names_other_parameters_and_missing_steps(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")  # its last checkpoint is now that of step 8
    log = run / "metrics.jsonl"
    log.write_text("".join(x for x in log.read_text().splitlines(True) if '"step": 11' not in x))
    assert {"step 11", "embed/embedding", "layers/ffn/router/bias"} <= set(differences(run, finished))


def typed(monkeypatch, folder: Path, *overrides: str) -> list[list[str]]:
    """The commands of a demo in which every command does nothing."""
    words: list[list[str]] = []

    def call(self, *command):
        words.append(list(command))

    monkeypatch.setattr(Demo, "_call", call)
    monkeypatch.setattr(Demo, "_killed_sft", lambda self: call(self, *self._train("sft", "sft")))
    monkeypatch.setattr(Demo, "_compare", lambda self: None)
    chat = ["conversion", "chat", "model.litertlm", "--prompt", demo.PROMPT]
    monkeypatch.setattr(Demo, "_chat", lambda self, bundle: call(self, *chat))
    monkeypatch.setattr(demo.report, "collect", lambda *_: sys.exit(0))
    with pytest.raises(SystemExit):
        run_demo(folder, overrides)
    return words


def test_every_part_is_a_command_that_its_program_knows(monkeypatch, tmp_path):
    commands = typed(monkeypatch, tmp_path / "demo", "steps=40", "checkpoint.every_steps=15")
    assert len(commands) == len(demo._PARTS) - 1  # all but the comparison
    for program, *words in commands:
        if program.startswith("tests."):
            assert find_spec(program)
            continue
        parser = {"moe_jax": training_parser, "conversion": conversion_parser}[program]()
        _, rest = parser.parse_known_args(words)
        assert all("=" in word for word in rest), words
    folders = [words[words.index("--run") + 1] for words in commands if "train" in words]
    stages = ["pretrain", "midtrain", "sft_alone", "sft", "qat"]
    assert folders == [str(tmp_path / "demo" / stage) for stage in stages]
    for words in commands[2:6]:
        start = next(word for word in words if word.startswith("init_from="))
        assert not start.endswith("sft_alone")


def test_finished_parts_are_skipped_until_fresh(monkeypatch, tmp_path):
    first = typed(monkeypatch, tmp_path / "demo")
    assert typed(monkeypatch, tmp_path / "demo") == []
    (tmp_path / "demo/left").touch()
    Demo(tmp_path / "demo", [], fresh=True)
    assert not (tmp_path / "demo/left").exists()
    assert typed(monkeypatch, tmp_path / "demo") == first


def test_a_failing_command_stops_the_demo_with_its_status(monkeypatch, tmp_path, capfd):
    fails = [sys.executable, "-c", "raise SystemExit(7)"]
    popen = subprocess.Popen
    monkeypatch.setattr(demo.subprocess, "Popen", lambda command, **options: popen(fails, **options))
    assert run_demo(tmp_path / "demo") == 7
    error = capfd.readouterr().err
    assert "python -m moe_jax tokenizer demo_pretrain" in error and "exited with status 7" in error
    assert json.loads((tmp_path / "demo/demo.json").read_text())["parts"] == {}


@pytest.mark.parametrize("name", ["notes.txt", "demo.json"])
@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_folder_that_is_no_demo_is_refused_and_left_alone(tmp_path, capsys, name, fresh):
    (tmp_path / name).write_text("{}")
    assert main(["demo", "--run", str(tmp_path), *fresh]) == 2
    assert "is no demo run; name another" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "{}")]


def test_a_demo_with_other_options_is_refused(tmp_path, capsys):
    Demo(tmp_path / "demo", ["steps=50"], fresh=False)
    assert main(["demo", "--run", str(tmp_path / "demo"), "steps=60"]) == 2
    assert "other options; add --fresh" in capsys.readouterr().err
    assert main(["demo", "--run", str(tmp_path / "demo"), "stepz=60"]) == 2
    assert "steps" in capsys.readouterr().err
