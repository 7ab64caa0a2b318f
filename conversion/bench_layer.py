"""One layer's routed experts in LiteRT against one dense feed-forward of the active size (K*F).

All forms run in the same process on the same inputs, whose expert ids are random and differ from call to call. They
take turns in blocks: a pool of threads that was just used keeps spinning for a while and would slow the next one.
Times are from (x, ids, weights) to y, each form at its better number of threads.

    dense     one feed-forward of width K*F; its weights stay in the processor's cache
    streamed  the same, but E/K of them in turn, so that weights come from where sparse ones come from
    sparse    the routed experts: `routed.expand`, or with `experts="kernel"` the custom op for them (in a file's
              decode they are in one op with norm, router and shared expert, which take time of their own)
    all       every expert on every token (`DenseExperts`); left out for long inputs, where it takes too long
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.environment import Environment
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.options import Options

from conversion.bench_runtime import quiet, quiet_at_exit
from conversion.int4 import Int4
from conversion.litert import bank as banks
from conversion.litert import kernel_op
from conversion.litert.dense import DenseExperts
from conversion.litert.experts import Experts, feed_forward
from conversion.litert.flatbuffer import Model
from conversion.litert.prefill import tiling
from conversion.litert.routed import expand
from moe_jax.errors import UserError

TOKENS = (1, 128, 1024)
_ROUNDS, _PAUSE = 6, 0.05  # blocks of each form; seconds before one, until the last pool of threads sleeps
_FEW = 128  # tokens up to which `all` is measured
Feed = dict[str, np.ndarray]
Bank = tuple[Int4, Int4]


def random_int4(rng: np.random.Generator, *shape: int) -> Int4:
    """Random codes and power-of-two scales."""
    scales = 2.0 ** rng.integers(-9, -6, (*shape[:-1], shape[-1] // 32))
    return Int4(rng.integers(-8, 8, shape, np.int8), scales.astype(np.float16))


class Runner:
    """A file's signatures, with low-overhead calls."""

    def __init__(self, model: Model, path: Path, threads: int, environment: Environment | None = None) -> None:
        model.write(path)
        cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=f"{path}.cache")
        options = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=cpu)
        with quiet():
            self.model = CompiledModel.from_file(str(path), options=options, environment=environment)
        self.names = [s["inputs"] for s in self.model.get_signature_list().values()]
        every = range(len(self.names))
        self.inputs = [self.model.create_input_buffers(i) for i in every]
        self.outputs = [self.model.create_output_buffers(i) for i in every]

    def seconds(self, feed: Feed, signature: int = 0) -> float:
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


def layer(bank: Bank, tokens: int, choices: int, form: str) -> Model:
    """A file with one layer of experts, `form` being sparse, kernel or all."""
    model = Model()
    g = model.graph("layer")
    x = g.input((tokens, bank[0].codes.shape[2]), "float32", "x")
    ids = g.input((tokens, choices), "int32", "ids")
    weights = g.input((tokens, choices), "float32", "weights")
    if form == "sparse":
        y = expand(g, Experts(model, *bank, "silu"), x, ids, weights)
    elif form == "kernel":
        experts, double, width = bank[0].codes.shape
        packed = model.buffer(banks.pack_experts(*bank))
        y = kernel_op.KernelExperts(packed, (experts, width, double // 2), "silu").expand(g, x, ids, weights)
    else:
        y = g.tensor(g.shape(x), "float32")
        DenseExperts(model, *bank, "silu").expand(g, x, ids, weights, y)
    g.outputs = [y]
    model.signature("layer", g, {"x": x, "ids": ids, "weights": weights}, {"y": y})
    return model


def bench_layer(
    tokens: Sequence[int] = TOKENS,
    *,
    experts: str = "sparse",
    threads: int = 2,
    shape: tuple[int, int, int, int] = (768, 384, 60, 4),
    seconds: float = 0.5,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """{"tokens_<n>": {form: median_us, least_us, their ratios to `dense`, threads}}, and the ratios by name.

    `decode_over_dense` is the sparse form's median time over the dense one's at 1 token, `prefill<n>_over_dense` at
    n. `shape` is D, F, E, K; a form runs for about `seconds` with each number of threads from 1 to `threads`.
    UserError for a shape that no layer has.
    """
    d, f, e, k = shape
    if k > e or d % 32 or f % 32:
        raise UserError(
            f"{k} of {e} experts, {d} and {f} wide, make no layer; choose no more than there are, and widths that "
            "are multiples of 32"
        )
    environment = None
    if experts == "kernel":
        from conversion.kernel import register

        with quiet():
            environment = register.environment()
    quiet_at_exit()
    result: dict[str, Any] = {"experts": experts, "shape": dict(zip("DFEK", shape, strict=True))}
    for count in tokens:
        say(f"{count} tokens")
        with tempfile.TemporaryDirectory() as folder:
            found = _measure(count, experts, threads, shape, seconds, environment, Path(folder))
        result[f"tokens_{count}"] = found
        name = "decode" if count == 1 else f"prefill{count}"
        result[f"{name}_over_dense"] = found["sparse"]["median_ratio"]
    with quiet():
        del environment
    return result


def _measure(
    tokens: int,
    form: str,
    threads: int,
    shape: tuple[int, int, int, int],
    seconds: float,
    environment: Environment | None,
    folder: Path,
) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng(tokens)
    d, f, e, k = shape
    bank = random_int4(rng, e, 2 * f, d), random_int4(rng, e, d, f)
    models = {
        "dense": feed_forwards(rng, tokens, d, k * f, 1),
        "streamed": feed_forwards(rng, tokens, d, k * f, e // k),
        "sparse": layer(bank, tokens, k, form),
    }
    models |= {"all": layer(bank, tokens, k, "all")} if tokens <= _FEW else {}
    runners = {
        (name, n): Runner(model, folder / f"{name}{n}.tflite", n, environment if name == "sparse" else None)
        for name, model in models.items()
        for n in range(1, threads + 1)
    }

    def feed() -> Feed:
        ids = np.argsort(rng.random((tokens, e)), axis=1)[:, :k].astype(np.int32)
        weights = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
        return {"x": rng.standard_normal((tokens, d), np.float32), "ids": ids, "weights": weights}

    with quiet():  # a process's first use of a buffer makes an environment, with all that it tells
        for runner in runners.values():
            runner.seconds(feed())
    times: dict[tuple[str, int], list[float]] = {key: [] for key in runners}
    for _ in range(_ROUNDS):
        for (name, n), runner in runners.items():
            turns = e // k if name == "streamed" else 1
            time.sleep(_PAUSE)
            first = runner.seconds(feed())
            calls = max(2, round(seconds / _ROUNDS / first))
            series = [runner.seconds(feed(), i % turns) for i in range(calls + calls // 4)]
            times[name, n] += series[calls // 4 :]  # without those that warm up
    with quiet():
        del runner
        runners.clear()  # and so does the end of one
    results = {}
    for name in models:
        best = min(range(1, threads + 1), key=lambda n: np.median(times[name, n]))
        series = np.array(times[name, best]) * 1e6
        results[name] = {"median_us": float(np.median(series)), "least_us": float(series.min()), "threads": best}
    for found in results.values():
        for key in ("median", "least"):
            found[f"{key}_ratio"] = found[f"{key}_us"] / results["dense"][f"{key}_us"]
    return results


def table(result: dict[str, Any]) -> str:
    """Every form's times at each number of tokens."""
    lines = []
    for key, found in result.items():
        if not key.startswith("tokens_"):
            continue
        tokens = int(key.removeprefix("tokens_"))
        tiles = tiling(tokens, result["shape"]["K"], result["shape"]["E"])
        lines.append(f"{tokens} tokens; rows of an expert's tiles on stock ops: {', '.join(map(str, tiles))}")
        lines += [
            f"  {name:9}median {r['median_us']:9,.0f} us = {r['median_ratio']:5.2f}x dense, least "
            f"{r['least_us']:9,.0f} us = {r['least_ratio']:5.2f}x, {r['threads']} thread(s)"
            for name, r in found.items()
        ]
    return "\n".join(lines)
