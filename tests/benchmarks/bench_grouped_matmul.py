"""Grouped matmul on CPU against `lax.ragged_dot`: forward and backward, one run, ratios.

python -m tests.benchmarks.bench_grouped_matmul [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops.grouped_matmul import grouped_matmul


def seconds(function, *arguments, repeats: int) -> float:
    """Median seconds of a call, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    groups, rows, inner, columns = 32, 8192, 512, 256
    rng = np.random.default_rng(0)
    lhs = jnp.asarray(rng.standard_normal((rows, inner), np.float32))
    rhs = jnp.asarray(rng.standard_normal((groups, inner, columns), np.float32))
    sizes = jnp.asarray(rng.multinomial(rows, rng.dirichlet(np.full(groups, 8.0))), jnp.int32)
    flops = 2 * rows * inner * columns

    forms = {
        "lax.ragged_dot": lambda x, w: jax.lax.ragged_dot(x, w, sizes),
        "tile loop": lambda x, w: grouped_matmul(x, w, sizes, implementation="tiles"),
        "one dense product": lambda x, w: x @ w[0],
    }
    results: dict[str, Any] = {}
    for name, form in forms.items():
        repeats = args.repeats if name == "lax.ragged_dot" else 5 * args.repeats
        forward = seconds(jax.jit(form), lhs, rhs, repeats=repeats)
        gradient = jax.jit(jax.value_and_grad(lambda x, w, f=form: (f(x, w) ** 2).sum(), (0, 1)))
        both = seconds(gradient, lhs, rhs, repeats=repeats)
        results[name] = {"forward_gflops": flops / forward / 1e9, "both_gflops": 3 * flops / both / 1e9}
        print(f"{name:18s} forward {flops / forward / 1e9:7.1f} GFLOP/s, "
              f"forward + backward {3 * flops / both / 1e9:7.1f} GFLOP/s")  # fmt: skip
    for what in ("forward", "both"):
        ratio = results["tile loop"][f"{what}_gflops"] / results["lax.ragged_dot"][f"{what}_gflops"]
        results[f"{what}_ratio"] = ratio
        print(f"tile loop over lax.ragged_dot, {what}: {ratio:.1f}x")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
