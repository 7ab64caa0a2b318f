"""What a run tells: one JSON line a step, TensorBoard, and a progress bar (plain lines where there is no terminal).

The JSON lines are the record. A line is written before the checkpoint of its step, and a resumed run cuts the lines
past its checkpoint, so that every step stands there exactly once whenever the run is killed. What is no step
(starts, saves, faults) is history, in a file of its own.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from moe_jax.config import RunConfig
from moe_jax.files import AnyPath, LineLog, cut_lines, location, read_lines
from moe_jax.flops import peak_flops, train_flops_per_token
from moe_jax.parallel.processes import is_first
from moe_jax.progress import time_left
from moe_jax.train.tensorboard import EventFile

_PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal


def load_statistics(counts_LE: np.ndarray) -> tuple[list[float], list[float]]:
    """Per layer, from routed tokens per expert: (max over mean, entropy over its maximum); 1 is perfect balance."""
    counts = np.asarray(counts_LE, np.float64)
    if counts.ndim != 2:
        return [], []
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1)
    experts = counts.shape[-1]
    return (share.max(-1) * experts).tolist(), (entropy / math.log(max(experts, 2))).tolist()


def read_metrics(run_dir: AnyPath) -> list[dict[str, Any]]:
    """The step lines of a run, in order of the steps."""
    return read_lines(location(run_dir) / "metrics.jsonl")


class StepClock:
    """Wall time, steps, tokens and where they were routed since the last line of the log."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._since, self._steps, self._real, self._trained = time.perf_counter(), 0, 0, 0.0
        self._routed: dict[str, np.ndarray] = {}

    def add(self, values: dict[str, Any]) -> None:
        """One more step, with its metrics on the host."""
        self._steps, self._real = self._steps + 1, self._real + int(values["real"])
        self._trained += float(values["tokens"])
        for name in ("counts_LE", "dropped_L"):
            self._routed[name] = self._routed.get(name, 0) + values[name]

    def lap(self) -> tuple[dict[str, np.ndarray], float, int, float]:
        """(routing of all steps, seconds and real tokens per step, trained tokens of all), and start anew."""
        seconds = (time.perf_counter() - self._since) / self._steps
        found = self._routed, seconds, self._real // self._steps, self._trained
        self._start()
        return found


class Metrics:
    """The log of one run folder, opened at `step` (the steps already done); closes as a context manager.

    Only the first process writes. `lost`: steps logged past `step`, whose lines are cut.
    """

    def __init__(self, run_dir: epath.Path, cfg: RunConfig, step: int, devices: list[jax.Device]) -> None:
        self._cfg, self.lost = cfg, 0
        self._writes = is_first()
        if not self._writes:
            return
        path = run_dir / "metrics.jsonl"
        if past := cut_lines(path, lambda line: line["step"] > step):
            self.lost = past[0]["step"] - step
        self._log = LineLog(path)
        self._board = EventFile(run_dir / "tensorboard", step + 1)
        # Fake CPU devices share one processor, whose peak must count once.
        count = 1 if devices[0].platform == "cpu" else len(devices)
        self._peak = peak_flops(devices[0]) * count
        self._flops = train_flops_per_token(cfg.model, cfg.data.seq_len)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=cfg.steps, initial=step, desc=cfg.stage, unit="step", disable=not terminal)
        self._plain, self._printed, self._rate = not terminal, -math.inf, 0.0

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            for part in (self._bar, self._board, self._log):
                part.close()

    def flush(self) -> None:
        """Bring what was logged to where it is kept: a checkpoint must not be ahead of the log."""
        if self._writes:
            self._log.flush()

    def log(self, step: int, values: dict[str, Any], seconds: float, real: int, trained: float) -> None:
        """One step line.

        Args:
            step: optimizer steps done.
            values: the step's metrics on the host; what was routed and dropped is of all steps since the last line.
            seconds: wall time per step since the last line.
            real: tokens per step since the last line, padding left out; they give tokens/s and MFU.
            trained: loss-bearing tokens of all steps since the last line.
        """
        if not self._writes:
            return
        speed = real / seconds
        mfu = speed * self._flops / self._peak
        load, entropy = load_statistics(values["counts_LE"])
        names = ("loss", "learning_rate", "grad_norm", "z_loss", "aux_loss")
        line = {"step": step, "stage": self._cfg.stage} | {k: float(values[k]) for k in names}
        line |= {"tokens": int(trained), "tokens_per_second": speed, "seconds": seconds}
        line |= {"mfu": mfu if math.isfinite(mfu) else None}
        line |= {"load_max_over_mean": load, "load_entropy": entropy}
        line |= {"dropped": np.asarray(values["dropped_L"]).tolist()}
        counts = {}
        if step % self._cfg.checkpoint.every_steps == 0 or step == self._cfg.steps:
            counts["expert_tokens"] = np.asarray(values["counts_LE"]).tolist()  # too long for every line
        self._log.write(line | counts)
        points = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for name, values_L in line.items():
            if isinstance(values_L, list):
                points |= {f"{name}/layer_{i:02d}": v for i, v in enumerate(values_L)}
        self._board.scalars(step, points)
        self._show(step, line)

    def heldout(self, step: int, loss: float) -> None:
        """A point of the loss on held-out text beside the curves of training; its record is in the history."""
        if self._writes:
            self._board.scalars(step, {"heldout_loss": loss})

    def _show(self, step: int, line: dict[str, Any]) -> None:
        seconds = line["seconds"]
        self._rate = 0.9 * self._rate + 0.1 * seconds if self._rate else seconds
        speed = f"{line['tokens_per_second'] * seconds / self._rate:,.0f}"  # of one step alone it jumps
        self._bar.set_postfix(loss=f"{line['loss']:.3f}", tok_s=speed, refresh=False)
        self._bar.update(step - self._bar.n)
        left = (self._cfg.steps - step) * self._rate
        if self._plain and (time.monotonic() - self._printed > _PLAIN_SECONDS or step == self._cfg.steps):
            self._printed = time.monotonic()
            print(
                f"{self._cfg.stage} {step}/{self._cfg.steps} loss {line['loss']:.4f} "
                f"{speed} tokens/s {time_left(left)}",
                file=sys.stderr,
                flush=True,
            )


class History:
    """What happened to a run, start by start (events.jsonl): appended to by the first process, never cut."""

    def __init__(self, run_dir: epath.Path) -> None:
        self._log = LineLog(run_dir / "events.jsonl") if is_first() else None

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            self._log.close()

    def event(self, name: str, step: int, **fields: Any) -> None:
        """One line, with the time; it is kept when this returns."""
        self.note(name, step, **fields)
        if self._log:
            self._log.flush()

    def note(self, name: str, step: int, **fields: Any) -> None:
        """A line that is kept when the next event is.

        An object of Cloud Storage takes one put a second: https://cloud.google.com/storage/quotas
        """
        if self._log:
            self._log.write({"event": name, "step": step, "time": round(time.time(), 3), **fields})
