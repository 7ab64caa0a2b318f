"""Peak memory of restoring a state of half a billion parameters (6 GB) that is sharded over 8 fake devices.

One process makes and saves the trainer's own state, a fresh one restores it; the ratio is its highest resident
size over the bytes of the state. Exits 1 above 1.3. Making it takes twice the state in memory.

python -m tests.benchmarks.restore_memory [--layers N] [--folder DIR] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 1.3
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


def peak_bytes() -> int:
    """The highest resident size of this process so far."""
    found = _PEAK.search(Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def child(role: str, run: str, layers: int) -> None:
    """Save (`make`) or restore the state in this process and print the figures as one line of JSON."""
    import jax

    from moe_jax.config import MeshConfig, ModelConfig, RunConfig
    from moe_jax.parallel.mesh import make_mesh
    from moe_jax.train.checkpoint import Checkpoints
    from moe_jax.train.state import abstract_state, init_state

    cfg = RunConfig(model=ModelConfig(num_layers=layers), mesh=MeshConfig(fsdp=8))
    mesh, checkpoints, bare = make_mesh(cfg.mesh), Checkpoints(run), peak_bytes()
    abstract = abstract_state(cfg, mesh)
    begin = time.perf_counter()
    if role == "make":
        state = jax.block_until_ready(init_state(cfg, mesh))
        made = peak_bytes()
        checkpoints.save(1, state, {})
        checkpoints.wait()
    else:
        restored = checkpoints.restore_latest(abstract)
        assert restored is not None
        state, made = jax.block_until_ready(restored[0]), 0
    sizes = [
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.biases, state.opt_state))
    ]
    figures = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "state_bytes": sum(sizes),
        "largest_leaf_bytes": max(sizes),
        "peak_bytes": peak_bytes(),
        "before_bytes": bare,
        "made_bytes": made,
        "seconds": time.perf_counter() - begin,
    }
    print(json.dumps(figures))


def run_child(role: str, run: Path, layers: int) -> dict[str, float]:
    """The figures of a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.restore_memory", "--role", role, "--folder", str(run)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    result = subprocess.run(
        [*command, "--layers", str(layers)], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    figures = json.loads(result.stdout.splitlines()[-1])
    print(
        f"{role}: {figures['parameters'] / 1e9:.3f} B parameters, state {figures['state_bytes'] / 1e9:.2f} GB, "
        f"peak {figures['peak_bytes'] / 1e9:.2f} GB ({figures['peak_bytes'] / figures['state_bytes']:.2f}x), "
        f"{figures['seconds']:.0f} s",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=7, help="7 make half a billion parameters, 1 a seventh")
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint goes for a while, by default a temporary one"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=("make", "restore"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        child(args.role, str(args.folder), args.layers)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        needed, free = (args.layers + 1.4) * 0.85e9, shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(
                f"{folder} has {free / 1e9:.1f} GB free instead of {needed / 1e9:.1f}; name another with --folder"
            )
        made = run_child("make", Path(folder), args.layers)
        results = run_child("restore", Path(folder), args.layers)
    results |= {"ratio": results["peak_bytes"] / results["state_bytes"], "saving_peak_bytes": made["peak_bytes"]}
    print(f"restoring takes {results['ratio']:.2f}x the state (at most {LIMIT}x)")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))
    sys.exit(results["ratio"] > LIMIT)


if __name__ == "__main__":
    main()
