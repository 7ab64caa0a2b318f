"""What asynchronous saving costs the step loop: windows of 50 steps of the demo with a save against without one.

Windows alternate in one run; each begins on an idle machine, and a window with a save ends when the checkpoint is
complete or its steps are done, whichever is later. Exits 1 where saving costs more than 5 %.

python -m tests.benchmarks.bench_checkpoint [--windows N] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from configs.demo import demo_pretrain
from moe_jax.config import CheckpointConfig
from moe_jax.overrides import to_dict
from moe_jax.parallel.batches import put_batch
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.state import init_state
from moe_jax.train.step import make_train_step

LIMIT = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=7, help="of each kind")
    parser.add_argument("--steps", type=int, default=50, help="of a window")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cfg, mesh = demo_pretrain(), single_device_mesh()
    rng = np.random.default_rng(0)
    shape = (cfg.data.global_batch_size, cfg.data.seq_len)
    tokens = rng.integers(0, cfg.model.vocab_size, shape, np.int32)
    batch = put_batch(
        {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, 1),
            "segment_ids": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
            "loss_mask": np.ones(shape, np.float32),
        },
        mesh,
    )
    state = init_state(cfg, mesh)
    train_step: Any = make_train_step(cfg, mesh)
    step = train_step.lower(state, batch).compile()
    results: dict[str, Any] = {"steps": args.steps, "blocked_s": [], "complete_s": []}
    results |= {f"{kind}_{what}": [] for kind in ("plain", "saving") for what in ("s", "processor_s")}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
        for window in range(2 * (args.windows + 1)):
            begin, processor, blocked = time.perf_counter(), time.process_time(), 0.0
            for index in range(args.steps):
                state, metrics = step(state, batch)
                loss = jax.device_get(metrics)["loss"]  # as the trainer looks at each step
                if index == 0 and window % 2:
                    before = time.perf_counter()
                    checkpoints.save(window, state, {"config": to_dict(cfg)})
                    blocked = time.perf_counter() - before
                checkpoints.check()
            checkpoints.wait()
            seconds, processor = time.perf_counter() - begin, time.process_time() - processor
            if window < 2:
                continue  # warms caches and threads up
            kind = "saving" if window % 2 else "plain"
            results[f"{kind}_s"].append(seconds)
            results[f"{kind}_processor_s"].append(processor)
            if window % 2:
                results["blocked_s"].append(blocked)
                results["complete_s"].append(checkpoints.completed[-1]["seconds"])
            print(f"{kind:7s} {seconds:7.3f} s, processor {processor:7.3f} s, loss {loss:.3f}", flush=True)
        results["bytes"] = checkpoints.completed[-1]["bytes"]
    medians = {name: statistics.median(series) for name, series in results.items() if isinstance(series, list)}
    results |= {f"median_{name}": value for name, value in medians.items()}
    results["ratio"] = medians["saving_s"] / medians["plain_s"]
    print(
        f"{args.steps} steps {medians['plain_s']:.3f} s, with one save of {results['bytes'] / 1e6:.0f} MB "
        f"{medians['saving_s']:.3f} s: {results['ratio'] - 1:+.1%} (at most +5 %); the loop stood still for "
        f"{medians['blocked_s']:.3f} s, the checkpoint was complete after {medians['complete_s']:.2f} s, and the "
        f"processors worked {medians['saving_processor_s'] - medians['plain_processor_s']:+.2f} s longer"
    )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    sys.exit(results["ratio"] > LIMIT)


if __name__ == "__main__":
    main()
