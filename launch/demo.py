"""`python -m launch demo`: the whole line, from Python's own sources to an answer of the stock LiteRT-LM engine.

Every part is a command that a user could type, run as a child process and printed before it runs. Only two things
happen here: the fine-tuning is killed in the middle, and it is compared with a run that was left alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import configs
from launch import report
from launch.status import last_steps
from moe_jax.errors import UserError
from moe_jax.files import write_json
from moe_jax.overrides import to_dict
from moe_jax.progress import time_left
from moe_jax.train.catalogue import complete_steps

STAGES = ("pretrain", "midtrain", "sft", "qat")
_BEFORE = {"tokenizer.json", ".tokenizer.json.lock"}
PROMPT = "What does `os.path.join` do?"
_FORMAT = "moe_jax demo 1"
# For the time left alone: seconds of each part on two cores, those of training without its steps. What a machine
# really takes corrects them as it goes.
_PARTS = {
    "tokenizer": 5, "pretrain": 15, "midtrain": 15, "sft_alone": 15, "sft": 45, "compare": 5, "qat": 20,
    "evaluate": 35, "export": 20, "export_dense": 30, "verify": 30, "bench": 5, "layer": 20, "chat": 2,
}  # fmt: skip
_TOKENS_PER_SECOND = 2300


class PartFailed(Exception):
    """A part did not do what it must; the demo ends with `status`."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_demo(run_dir: str | Path, overrides: Sequence[str] = (), fresh: bool = False) -> int:
    """Run what is missing of the demo in `run_dir`; the exit status, that of the command that failed if one did.

    `overrides` apply to all four stages. Finished parts are skipped and a stage goes on from its last checkpoint,
    unless `fresh` removes the folder first.

    Raises:
        UserError: the folder exists and is no demo run, or one with other options.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no child may outlive a stopped demo
    demo = Demo(Path(run_dir), overrides, fresh)
    try:
        demo.run_all()
    except PartFailed as error:
        print(f"\nerror: the demo stopped: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


class Demo:
    """One demo folder and what of it is done (`demo.json`)."""

    def __init__(self, run: Path, overrides: Sequence[str], fresh: bool) -> None:
        self.run, self.overrides = run, list(overrides)
        self.configs = {stage: configs.load(f"demo_{stage}", self.overrides) for stage in STAGES}
        self._record = {
            "format": _FORMAT,
            "config": json.loads(json.dumps({k: to_dict(v) for k, v in self.configs.items()})),
            "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "parts": {},
        }
        kill_points(self.configs["sft"].steps, self.configs["sft"].checkpoint.every_steps)
        self._open(fresh)
        self._worked: dict[str, float] = {}  # parts of this call
        # One cache for all: the reference, and both resumed runs, find the step compiled.
        cache = str((run / ".compiled").absolute())
        self._env = {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"} | os.environ

    def _open(self, fresh: bool) -> None:
        # A tokenizer may be there: all configs of the demo have it in this place.
        if self.run.exists() and not (self.run.is_dir() and {p.name for p in self.run.iterdir()} <= _BEFORE):
            try:
                stored = json.loads((self.run / "demo.json").read_text())
            except (OSError, ValueError):
                stored = {}
            if stored.get("format") != _FORMAT:
                raise UserError(f"{self.run} exists and is no demo run; name another with --run")
            if fresh:
                shutil.rmtree(self.run)
            elif stored["config"] != self._record["config"]:
                raise UserError(
                    f"{self.run} holds a demo with other options; add --fresh (make demo FRESH=1) "
                    "to replace it, or name another with --run"
                )
            else:
                self._record = stored
        self._save()

    def _save(self) -> None:
        write_json(self.run / "demo.json", self._record)

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """What each finished part left for the report, `seconds` among it."""
        return self._record["parts"]

    def run_all(self) -> None:
        """Every part in order, then the report; raises PartFailed at the first that fails."""
        run, qat = self.run, str(self.run / "qat")
        bundle, dense = str(run / "model.litertlm"), str(run / "dense.litertlm")
        self._part(
            "tokenizer",
            "a byte-level BPE tokenizer of Python's own sources",
            partial(
                self._make,
                ["moe_jax", "tokenizer", "demo_pretrain", *self._options()],
                [str(run / "tokenizer.json")],
            ),
        )
        for name, stage, text in (
            ("pretrain", "pretrain", "stage 1 of 4"),
            ("midtrain", "midtrain", "stage 2 of 4, longer sequences"),
            ("sft_alone", "sft", "stage 3 of 4, left alone for comparison"),
        ):
            self._part(name, text, partial(self._call, *self._train(stage, name)))
        self._part("sft", "stage 3 of 4 again, killed twice and resumed", self._killed_sft)
        self._part("compare", "the two runs, bit for bit", self._compare)
        text = "stage 4 of 4, INT4 weights and INT8 activations"
        self._part("qat", text, partial(self._call, *self._train("qat", "qat")))
        for name, text, *words in (
            ("evaluate", "held-out files against gzip and xz", "moe_jax", "evaluate", qat),
            ("export", "INT4 codes and scales to a bundle", "conversion", "export", qat, bundle),
            ("export_dense", "the same with all experts computed, to compare speed",
             "conversion", "export", qat, dense, "--experts", "dense"),
            ("verify", "file, PyTorch and engine against JAX", "conversion", "verify", qat, bundle),
            ("bench", "speed of the stock engine", "conversion", "bench", bundle, "--dense", dense),
            ("layer", "one layer at MobileMoE-S's shape", "conversion", "bench-layer"),
        ):  # fmt: skip
            made = words[3:4] if "export" in words else []
            words += ["--json", str(run / f"{name}.json")]
            self._part(name, text, partial(self._make, words, made))
        self._part("chat", "the stock engine answers", partial(self._chat, bundle))
        result = report.collect(self.run, self._record, PROMPT)
        write_json(run / "report.json", result)
        report.write_html(run / "report.html", result, report.read_curves(run))
        print("\n" + report.table(result))
        print(f"\n{run / 'report.html'}\n{run / 'report.json'}", flush=True)
        if problems := report.broken_promises(result):
            raise PartFailed("; ".join(problems), 1)

    def _part(self, name: str, text: str, action: Callable[[], dict[str, Any] | None]) -> None:
        number, count = list(_PARTS).index(name) + 1, len(_PARTS)
        if name in self.parts:
            print(f"[{number}/{count}] {name}: done before", flush=True)
            return
        left = sum(self._expected(part) for part in _PARTS if part not in self.parts)
        # A slower machine shows in the parts behind it.
        expected = sum(self._expected(part) for part in self._worked)
        left *= (60 + sum(self._worked.values())) / (60 + expected)
        print(f"\n[{number}/{count}] {name}: {text} (about {time_left(left)})", flush=True)
        start = time.monotonic()
        found = action() or {}
        seconds = time.monotonic() - start
        self._worked[name] = seconds
        self.parts[name] = {"seconds": round(seconds, 1)} | found
        self._save()

    def _expected(self, part: str) -> float:
        cfg = self.configs.get("sft" if part == "sft_alone" else part)
        return _PARTS[part] + (cfg.steps * cfg.tokens_per_step / _TOKENS_PER_SECOND if cfg else 0)

    def _options(self) -> list[str]:
        tokenizer = str(self.run / "tokenizer.json")
        moved = self.configs["pretrain"].data.tokenizer != tokenizer
        return [*self.overrides, *([f"data.tokenizer={tokenizer}"] if moved else [])]

    def _train(self, stage: str, folder: str) -> list[str]:
        before = STAGES[: STAGES.index(stage)][-1:]
        options = [*self._options(), *(f"init_from={self.run / name}" for name in before)]
        return ["moe_jax", "train", f"demo_{stage}", "--run", str(self.run / folder), *options]

    def _make(self, words: Sequence[str], files: Sequence[str]) -> None:
        """A command that refuses to overwrite its `files`, which a stopped demo may have left."""
        for path in map(Path, files):
            path.unlink(missing_ok=True)
            path.with_suffix(".safetensors").unlink(missing_ok=True)  # an export's second file
        self._call(*words)

    def _call(self, *words: str) -> None:
        """Run a public command."""
        command = _shown(words)
        _require_success(command, finish(subprocess.Popen(command, env=self._env))[0])

    def _chat(self, bundle: str) -> dict[str, Any]:
        command = _shown(["conversion", "chat", bundle, "--prompt", PROMPT, "--max-tokens", "96"])
        status, said = finish(subprocess.Popen(command, env=self._env, stdout=subprocess.PIPE, text=True))
        print(said, end="", flush=True)
        _require_success(command, status)
        return {"reply": said.strip()}

    def _killed_sft(self) -> dict[str, Any]:
        cfg, words, folder = self.configs["sft"], self._train("sft", "sft"), self.run / "sft"
        if folder.exists():  # a stopped demo starts this part over: two kills, no more, no less
            shutil.rmtree(folder)
        kills = []
        for saved, step in kill_points(cfg.steps, cfg.checkpoint.every_steps):
            kills.append(run_and_kill(_shown(words), folder, saved, step, self._env))
            print(f"killed with SIGKILL at step {kills[-1]}; the same command again", flush=True)
        self._call(*words)
        return {"killed_at": kills, "resumed_from": report.starts(folder)[1:]}

    def _compare(self) -> dict[str, Any]:
        different = differences(self.run / "sft", self.run / "sft_alone")
        steps = self.configs["sft"].steps
        print(f"{steps} losses and all final parameters: {different or 'identical'}", flush=True)
        return {"different": different}


def kill_points(steps: int, every: int) -> list[tuple[int, int]]:
    """Twice (checkpoint that must exist, step to reach): a little past the first and the last before the end."""
    past = max(1, every // 4)
    saved = [step for step in range(every, steps, every) if step + past < steps]
    if len(saved) < 2 or every < 2:
        enough = max(steps, 6)
        mend = f"{f'steps to {enough} and ' if enough > steps else ''}checkpoint.every_steps to {enough * 2 // 5}"
        raise UserError(f"{steps} steps with a checkpoint every {every} leave no room for two kills; set {mend}")
    return [(saved[0], saved[0] + past), (saved[-1], saved[-1] + past)]


def finish(child: subprocess.Popen[Any]) -> tuple[int, Any]:
    """(status, output) of a child. One that is interrupted saves what it has first, unless interrupted again."""
    try:
        said, _ = child.communicate()
    except KeyboardInterrupt:
        child.terminate()  # a terminal has told it too, who stopped this process alone has not
        child.wait()
        raise
    finally:
        child.kill()
    return child.returncode, said


def run_and_kill(command: list[str], run: Path, saved: int, step: int, env: dict[str, str]) -> int:
    """Start the training `command` and SIGKILL it once `run` holds checkpoint `saved` and has logged `step`.

    Returns the last step logged. Raises PartFailed where the command ends before that by itself.
    """
    child = subprocess.Popen(command, env=env)
    try:
        while child.poll() is None:
            if _last_step(run) >= step and complete_steps(run)[-1:] >= [saved]:
                break
            time.sleep(0.02)
    finally:
        child.kill()
    if (status := child.wait()) != -signal.SIGKILL:
        _require_success(command, status)
        raise PartFailed(f"{_typed(command)} ended before it could be killed", 1)
    return _last_step(run)


def differences(run: Path, other: Path) -> list[str]:
    """Steps whose loss or gradient norm, and final parameters, that are not the same bits in both runs."""
    from moe_jax.train.checkpoint import load_parameters
    from moe_jax.train.metrics import read_metrics

    one, two = ({x["step"]: (x["loss"], x["grad_norm"]) for x in read_metrics(r)} for r in (run, other))
    found = [f"step {step}" for step in sorted(one.keys() | two.keys()) if one.get(step) != two.get(step)]
    mine, theirs = load_parameters(run)[1], load_parameters(other)[1]
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in mine or name not in theirs or mine[name].tobytes() != theirs[name].tobytes():
            found.append(name)
    return found


def _last_step(run: Path) -> int:
    """The last step whose line is whole, 0 before the first."""
    return max((line["step"] for line in last_steps(run)), default=0)


def _typed(command: Sequence[str]) -> str:
    return shlex.join(["python", *command[1:]])


def _shown(words: Sequence[str]) -> list[str]:
    """The command of a public entry point, printed as a user would type it."""
    command = [sys.executable, "-m", *words]
    print(f"$ {_typed(command)}", flush=True)
    return command


def _require_success(command: Sequence[str], status: int) -> None:
    if status:
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        raise PartFailed(f"{_typed(command)} {how}", status if status > 0 else 128 - status)
