"""One chaos run from a seed: the run in peace, the run under faults, and whether they are the same bit for bit."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from moe_jax.progress import time_left
from moe_jax.train.catalogue import checkpoint_path
from moe_jax.train.metrics import read_metrics
from moe_jax.train.stored import describe
from tests.chaos.faults import Scene
from tests.chaos.job import KEEP, Job, write_job
from tests.chaos.witness import Witness

_LATEST = 3  # steps after a start until the next fault, at most, for a run that is late

Fault = Callable[[Scene], str]


def run_chaos(root: Path, seed: int, faults: Sequence[Fault], steps: int, tell: Callable[[str], None]) -> dict:
    """Train `steps` in peace, then again under `faults`, spread over the run; what was seen.

    `said` holds [step, fault, the sentence about it]. A fault after which the run does not do as promised fails
    with AssertionError.
    """
    begin, rng = time.monotonic(), random.Random(seed)
    tell(f"{steps} steps in peace first")
    config = write_job(root, steps, seed)
    with Job(config, root / "peace") as job, Witness(job.run, KEEP) as seen:
        job.start()
        assert job.supervisor.wait() == 0, job.output.read_text()[-3000:]
    peace, spikes = dict(seen.losses), seen.named("rolled_back")
    tell(f"{steps} steps in peace, {len(spikes)} bad batches skipped: {time.monotonic() - begin:.0f} s")

    said: list[list[Any]] = []
    with Job(config, root / "chaos") as job, Witness(job.run, KEEP) as seen:
        scene, begin_chaos = Scene(job, seen, rng, peace), time.monotonic()
        scene.comes_back(job.start)
        for number, fault in enumerate(faults, 1):
            reached = seen.named("start")[-1]["step"]
            target = max(steps * number // (len(faults) + 1), reached + rng.randint(1, _LATEST))
            scene.until(f"step {target}", lambda target=target: seen.step >= target)
            step, since = seen.step, time.monotonic()
            said.append([step, fault.__name__, fault(scene)])
            seconds, left = time.monotonic() - since, len(faults) - number
            left *= (time.monotonic() - begin_chaos) / number
            tell(
                f"{number:2}/{len(faults)} step {step:4} {fault.__name__:20} {seconds:3.0f} s, "
                f"{time_left(left)}: {said[-1][2]}"
            )
        scene.ends(0)
    starts, skipped = seen.named("start"), seen.named("rolled_back")
    counts = Counter(fault.__name__ for fault in faults)
    final = [_arrays(checkpoint_path(root / name, steps)) for name in ("peace", "chaos")]
    return {
        "seed": seed,
        "steps": steps,
        "faults": dict(counts) | {"bad_batch": len({entry["step"] for entry in skipped})},
        "restarts": scene.lives() - 1,
        "steps_replayed": sum(entry["lost"] for entry in starts),
        "losses_bit_equal": _losses(root / "chaos") == peace and seen.losses == peace and not seen.differing,
        "params_bit_equal": _same(*final),
        "numbers_compared": sum(math.prod(array.shape) for array in final[0].values()),
        "checkpoints_lost": len(seen.lost),
        "set_aside": len(seen.named("damaged")),
        "seconds": round(time.monotonic() - begin, 1),
        "said": said,
    }


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run)}


def _arrays(path: epath.Path) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: parameters, biases, both moments, step and key."""
    shapes = describe(path)[1]
    wanted = {tree: {k: np.empty(v.shape, v.dtype) for k, v in leaves.items()} for tree, leaves in shapes.items()}
    loaded = ocp.load_checkpointables(str(path), wanted)
    return {f"{tree}/{k}": np.asarray(v) for tree, leaves in loaded.items() for k, v in leaves.items()}


def _same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    bits = [{name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()} for arrays in (ours, theirs)]
    return bits[0] == bits[1]
