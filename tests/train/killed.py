"""A training process that kills itself with SIGKILL: `killed.py CONFIG RUN (log|save|none) STEP`.

`log` strikes as soon as STEP is logged, `save` while the checkpoint of STEP is being written in the background.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

import configs
from moe_jax.train.checkpoint import complete_steps
from moe_jax.train.metrics import Metrics
from moe_jax.train.trainer import fit


def strike_after(function: Callable, is_time: Callable[..., bool]) -> Callable:
    def wrapped(*args, **kwargs):
        result = function(*args, **kwargs)
        if is_time(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return wrapped


config, run, where, step = sys.argv[1:]


def logged_and_saved(metrics: Metrics, at: int, *_: object) -> bool:
    while at == int(step) and not complete_steps(run):  # else it were chance where the next one starts
        time.sleep(0.01)
    return at == int(step)


if where == "log":
    Metrics.log = strike_after(Metrics.log, logged_and_saved)
if where == "save":
    ocp.save_checkpointables_async = strike_after(
        ocp.save_checkpointables_async, lambda path, _: Path(path).name == step
    )
fit(configs.load(config), run, jax.devices()[:1])
