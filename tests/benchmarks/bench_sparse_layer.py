"""One layer of sparse INT4 experts on the stock runtime against one dense feed-forward of the active size.

    python -m tests.benchmarks.bench_sparse_layer [--tokens 1 128] [--threads 2] [--json PATH]

Each form is a file of its own, run by CompiledModel on the CPU with the XNNPACK weight cache; runs are
interleaved, expert ids are random and differ from run to run. Sparse times are from (x, ids, weights) to y.

    dense     one feed-forward of width K*F; its weights stay in the processor's cache
    streamed  the same, but E/K of them in turn, so that weights come from where sparse ones come from
    sparse    `expand`
    all       every expert on every token (`DenseExperts`)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options

from conversion.int4 import Int4
from conversion.litert.dense import DenseExperts
from conversion.litert.experts import Experts, expand, feed_forward, tiling
from conversion.litert.flatbuffer import Model


def random_int4(rng: np.random.Generator, *shape: int) -> Int4:
    """Random codes and power-of-two scales."""
    scales = 2.0 ** rng.integers(-9, -6, (*shape[:-1], shape[-1] // 32))
    return Int4(rng.integers(-8, 8, shape, np.int8), scales.astype(np.float16))


class Runner:
    """A file's signatures, with low-overhead calls."""

    def __init__(self, model: Model, path: Path, threads: int) -> None:
        model.write(path)
        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=f"{path}.cache")
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
        self.model = CompiledModel.from_file(str(path), options=options)
        self.names = [s["inputs"] for s in self.model.get_signature_list().values()]
        every = range(len(self.names))
        self.inputs = [self.model.create_input_buffers(i) for i in every]
        self.outputs = [self.model.create_output_buffers(i) for i in every]

    def seconds(self, feed: dict[str, np.ndarray], signature: int = 0) -> float:
        """Fill the inputs, then time the call alone."""
        for name, buffer in zip(self.names[signature], self.inputs[signature], strict=True):
            buffer.write(feed[name])
        start = time.perf_counter()
        self.model.run_by_index(signature, self.inputs[signature], self.outputs[signature])
        return time.perf_counter() - start


def feed_forwards(rng: np.random.Generator, tokens: int, width: int, inner: int, count: int) -> Model:
    """A file with `count` dense feed-forwards, one signature each."""
    model = Model()
    for i in range(count):
        g = model.graph(f"dense{i}")
        x = g.input((tokens, width), "float32", "x")
        gate_up = model.store(random_int4(rng, 2 * inner, width))
        down = model.store(random_int4(rng, width, inner))
        g.outputs = [feed_forward(g, x, (gate_up, down), "silu")]
        model.signature(f"dense{i}", g, {"x": x}, {"y": g.outputs[0]})
    return model


def layer(bank: tuple[Int4, Int4], tokens: int, choices: int, sparse: bool) -> Model:
    """A file with one layer of experts."""
    model = Model()
    g = model.graph("layer")
    x = g.input((tokens, bank[0].codes.shape[2]), "float32", "x")
    ids = g.input((tokens, choices), "int32", "ids")
    weights = g.input((tokens, choices), "float32", "weights")
    if sparse:
        y = expand(g, Experts(model, *bank, "silu"), x, ids, weights)
    else:
        y = g.tensor(g.shape(x), "float32")
        DenseExperts(model, *bank, "silu").expand(g, x, ids, weights, y)
    g.outputs = [y]
    model.signature("layer", g, {"x": x, "ids": ids, "weights": weights}, {"y": y})
    return model


def measure(args: argparse.Namespace, tokens: int, folder: Path) -> dict[str, dict[str, float]]:
    """Microseconds (median, least) of each form and its ratio to `dense`."""
    rng = np.random.default_rng(tokens)
    d, f, e, k = args.width, args.expert_width, args.experts, args.choices
    bank = random_int4(rng, e, 2 * f, d), random_int4(rng, e, d, f)
    copies = e // k
    models = {
        "dense": feed_forwards(rng, tokens, d, k * f, 1),
        "streamed": feed_forwards(rng, tokens, d, k * f, copies),
        "sparse": layer(bank, tokens, k, sparse=True),
        "all": layer(bank, tokens, k, sparse=False),
    }
    runners = {n: Runner(m, folder / f"{n}{tokens}.tflite", args.threads) for n, m in models.items()}
    repeats = args.repeats or (1000 if tokens == 1 else 60)

    def feed(i: int) -> dict[str, np.ndarray]:
        ids = np.argsort(rng.random((tokens, e)), axis=1)[:, :k].astype(np.int32)
        weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
        return {"x": rng.standard_normal((tokens, d), np.float32), "ids": ids, "weights": weights}

    turns: dict[str, Callable[[int], int]] = {"streamed": lambda i: i % copies}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for i in range(repeats + repeats // 10):
        batch = feed(i)
        for name, runner in runners.items():
            if name == "all" and i % 8:  # slow, and of interest only roughly
                continue
            times[name].append(runner.seconds(batch, turns.get(name, lambda i: 0)(i)))
    results = {}
    for name, series in times.items():
        kept = np.array(series[len(series) // 11 :]) * 1e6  # without the first, which warm up
        results[name] = {"median_us": float(np.median(kept)), "least_us": float(kept.min())}
    for result in results.values():
        for key in ("median", "least"):
            result[f"{key}_ratio"] = result[f"{key}_us"] / results["dense"][f"{key}_us"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--expert-width", type=int, default=384)
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--repeats", type=int, help="runs of each form (1000 for a token, else 60)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {key: value for key, value in vars(args).items() if key != "json"}
    with tempfile.TemporaryDirectory() as folder:
        for tokens in args.tokens:
            results = report[f"tokens_{tokens}"] = measure(args, tokens, Path(folder))
            shape = tiling(tokens, args.choices, args.experts) if tokens > 1 else (1, 1)
            print(f"{tokens} tokens, {args.threads} threads; rows, tiles of an expert: {shape}")
            for name, r in results.items():
                print(
                    f"  {name:9s} median {r['median_us']:9.0f} us = {r['median_ratio']:5.2f}x dense,"
                    f" least {r['least_us']:9.0f} us = {r['least_ratio']:5.2f}x"
                )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
