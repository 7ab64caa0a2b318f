"""Training as a child process on this machine: its output prefixed, itself restarted when something kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import configs

_USER_ERROR = 2  # a restart would meet the same error


def run_local(
    config: str, overrides: Sequence[str], run_dir: str | Path, *, devices: int = 0, max_restarts: int = 3
) -> int:
    """Train `config` in `run_dir` until it ends by itself or has died `max_restarts` + 1 times; the exit status.

    A dead trainer's successor goes on from the last checkpoint. `devices` fakes that many CPU devices. SIGTERM and
    SIGINT are passed on and end the job without a restart.
    """
    for name in config.split(","):
        configs.load(name, list(overrides))  # a mistyped option should not cost a process
    command = [sys.executable, "-m", "moe_jax", "train", config, *overrides, "--run", str(run_dir)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if devices:
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    stopping: list[int] = []
    for attempt in range(max_restarts + 1):
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

        def pass_on(number: int, _: object, child: subprocess.Popen = child) -> None:
            stopping.append(number)
            child.send_signal(number)

        old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            assert child.stdout is not None
            for line in child.stdout:
                print(f"[train {attempt}] {line}", end="", flush=True)
            status = child.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
        if status in (0, _USER_ERROR) or stopping:
            return status if status >= 0 else 128 - status
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        last = attempt == max_restarts
        print(f"[launch] training {how}; {'giving up' if last else 'restarting'}", flush=True)
    return 1
