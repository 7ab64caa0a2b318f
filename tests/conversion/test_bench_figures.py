"""What is made of measured times, on scripted ones: medians, the best number of threads, ratios and units."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from conversion import bench, bench_layer, bench_profile
from conversion.bench_litert import _timed
from conversion.bench_process import Candidate
from conversion.bench_runtime import Event
from conversion.memory import memory

# File, threads and length: what three rounds gave, in tokens/s and seconds.
DECODE = {
    ("own", 1): {40: (5, 7, 6), 64: (4, 3, 9)},
    ("own", 2): {40: (9, 20, 8), 64: (2, 3, 10)},
    ("other", 1): {40: (1, 3, 2), 64: (1, 1, 1)},
    ("other", 2): {40: (3, 6, 4), 64: (2, 5, 1)},
}
PREFILL = {
    ("own", 1): {8: (10, 40, 20), 16: (50, 60, 100)},
    ("own", 2): {8: (30, 25, 90), 16: (55, 45, 80)},
    ("other", 1): {8: (15, 10, 12), 16: (20, 25, 30)},
    ("other", 2): {8: (11, 9, 10), 16: (40, 50, 20)},
}
TTFT = {
    ("own", 1): {8: (0.4, 0.2, 0.9), 16: (0.5, 0.6, 0.1)},
    ("own", 2): {8: (0.3, 0.25, 0.8), 16: (0.7, 0.9, 0.8)},
    ("other", 1): {8: (1, 1, 1), 16: (2, 1, 3)},
    ("other", 2): {8: (0.9, 0.6, 0.1), 16: (4, 5, 3)},
}
LOAD = {("own", 1): 0.5, ("own", 2): 0.7, ("other", 1): 0.1, ("other", 2): 0.25}
MEMORY = {("own", 1): 2.0, ("own", 2): 3.0, ("other", 1): 1.0, ("other", 2): 4.0}
ABSURD = 1e9  # of a first round, which must not count


class Scripted(Candidate):
    """A model that answers as the tables say; of a file, the first to load takes nine seconds."""

    loaded: set[str]

    def __init__(self, kind, path, threads, *last):
        self.path, self.threads = path, threads
        self.key = Path(path).stem, threads
        self.load_s = LOAD[self.key] if self.key[0] in self.loaded else 9.0
        self.loaded.add(self.key[0])
        peak = MEMORY[self.key]
        self.memory = {"peak_rss_gb": peak, "anonymous_gb": peak / 4, "files_gb": peak / 2}
        self.read = {8: itertools.count(), 16: itertools.count()}
        self.written = itertools.count()

    def close(self):
        pass

    def ask(self, do, **order):
        if do == "prefill":
            length = len(order["ids"])
            number = next(self.read[length])
            speed, wait = (([ABSURD, *table[self.key][length]])[number] for table in (PREFILL, TTFT))
            return {"tokens": length, "seconds": length / speed, "ttft": wait}
        if do == "write":
            context, number = divmod(next(self.written), 4)
            speed = [ABSURD, *DECODE[self.key][(40, 64)[context]]][number]
            return {"tokens": 4, "seconds": 4 / speed}
        return {}


@pytest.mark.parametrize("exported", ["dense"], indirect=True)
def test_figures_are_medians_without_the_first_round_at_the_best_number_of_threads(
    exported, run_dir, tmp_path, monkeypatch
):
    files = [tmp_path / "own.litertlm", tmp_path / "other.litertlm"]
    for file in files:
        shutil.copy(exported.bundle, file)
    monkeypatch.setattr(bench, "Candidate", Scripted)
    monkeypatch.setattr(Scripted, "loaded", set(), raising=False)
    sizes = {"prefill": [8, 16], "contexts": [40, 64], "texts": 3, "decode": 4, "threads": 2}
    own = bench.bench(*files, text=str(run_dir / "heldout.txt"), **sizes)
    other = own["against"]

    assert own["decode_tok_s"] == pytest.approx({40: 9, 64: 4})
    assert own["prefill_tok_s"] == pytest.approx({8: 30, 16: 60})
    assert own["ttft_by_prompt_s"] == {8: 0.3, 16: 0.5} and own["ttft_s"] == 0.5
    assert own["threads"] == {
        "decode_tok_s": {40: 2, 64: 1},
        "prefill_tok_s": {8: 2, 16: 1},
        "ttft_by_prompt_s": {8: 2, 16: 1},
    }
    assert other["decode_tok_s"] == pytest.approx({40: 4, 64: 2})
    assert other["prefill_tok_s"] == pytest.approx({8: 12, 16: 40})
    assert other["ttft_by_prompt_s"] == {8: 0.6, 16: 2} and other["ttft_s"] == 2
    assert other["threads"]["prefill_tok_s"] == {8: 1, 16: 2}

    # Memory and load time are of one thread here and of two there, which write fastest at 64.
    rest = ("load_s", "first_load_s", "peak_rss_gb", "anonymous_gb", "files_gb")
    assert [own[name] for name in rest] == [0.5, 9, 2, 0.5, 1]
    assert [other[name] for name in rest] == [0.25, 9, 4, 1, 2]
    each = [(found["threads"], found["decode_tok_s"][64], found["load_s"]) for found in own["by_threads"]]
    assert each == [(1, pytest.approx(4), 0.5), (2, pytest.approx(3), 0.7)]

    ratio = other["ratio"]
    assert ratio.pop("decode_tok_s") == pytest.approx({40: 2.25, 64: 2})
    assert ratio.pop("prefill_tok_s") == pytest.approx({8: 2.5, 16: 1.5})
    assert ratio == {"ttft_s": 0.25, "peak_rss_gb": 0.5, "load_s": 2}
    assert own["speed"] == pytest.approx(
        {
            "decode_tok_s": 9,
            "dense_decode_tok_s": 4,
            "decode_speedup": 2.25,
            "prefill_tok_s": 30,
            "dense_prefill_tok_s": 12,
            "prefill_speedup": 2.5,
        }
    )
    rows = {line[:26].strip(): line[26:].split() for line in bench.table(own).splitlines()}
    assert rows["decode at 64, tokens/s"] == ["4", "(1)", "2", "(2)", "2.00x"]
    assert rows["first token of 16, s"] == ["0.5", "(1)", "2", "(1)", "0.25x"]
    assert rows["peak memory, GB"] == ["2", "4", "0.50x"]


def test_seconds_are_tokens_over_the_engines_tokens_a_second():
    assert _timed(12, 4.0) == {"tokens": 12, "seconds": 3.0}
    assert _timed(0, 0.0) == {"tokens": 0, "seconds": 0.0}


def test_a_candidates_memory_is_the_most_that_any_reply_told(tmp_path, monkeypatch):
    names = ("peak_rss_gb", "anonymous_gb", "files_gb")
    told = [dict(zip(names, figures, strict=True)) for figures in ((5, 1, 3), (6, 4, 2), (6, 2, 1))]
    replies = [
        json.dumps(part | reply) for part, reply in zip(({"load_s": 2}, {"tokens": 8}, {}), told, strict=True)
    ]
    lines = ["#!/bin/sh", *(f"echo '{reply}'; read order" for reply in replies)]
    (tmp_path / "worker").write_text("\n".join(lines))
    (tmp_path / "worker").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "worker"))
    with Candidate("litert", "m.litertlm", 1) as model:
        assert (model.load_s, model.ask("read"), model.ask("write")) == (2, {"tokens": 8}, {})
        assert model.memory == {"peak_rss_gb": 6, "anonymous_gb": 4, "files_gb": 3}


def test_memory_is_told_in_billions_of_bytes():
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())  # pages
    own = (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    assert memory()["anonymous_gb"] == pytest.approx(own / 1e9, rel=0.01)


LEAST = {"dense1": 4e-3, "dense2": 2e-3, "streamed1": 3e-3, "streamed2": 6e-3}  # seconds, by threads
LEAST |= {"sparse1": 5e-3, "sparse2": 8e-3, "all1": 9e-3, "all2": 7e-3}


class Clock:
    """A form of a layer: one call, then blocks of one that sets their length, two that warm up, ten that count."""

    def __init__(self, model, path, threads, environment=None):
        assert path.stem.endswith(str(threads))
        self.unit, self.calls = LEAST[path.stem], itertools.count(-1)

    def seconds(self, feed, signature=0):
        place = next(self.calls) % 13
        return (1e-3, 1e-9, 1e-9, *(self.unit * (n + 1) for n in range(10)))[place]


def test_a_layers_times_are_in_microseconds_at_its_better_number_of_threads(monkeypatch):
    monkeypatch.setattr(bench_layer, "Runner", Clock)
    monkeypatch.setattr(bench_layer, "_PAUSE", 0)
    result = bench_layer.bench_layer((1,), threads=2, shape=(64, 32, 4, 2), seconds=6 * 10 * 1e-3)
    want = {"dense": (2000, 1, 2), "streamed": (3000, 1.5, 1), "sparse": (5000, 2.5, 1), "all": (7000, 3.5, 2)}
    for name, (least, ratio, threads) in want.items():
        figures = {"median_us": 5.5 * least, "least_us": least, "median_ratio": ratio, "least_ratio": ratio}
        assert result["tokens_1"][name] == pytest.approx(figures | {"threads": threads})
    assert result["decode_over_dense"] == pytest.approx(2.5)


def test_a_profiles_milliseconds_are_medians_of_what_an_op_took_in_a_call():
    def walk(*ops: tuple[str, int]) -> bench_profile.Walk:
        return [((0, "attention"), Event(name, 2, microseconds, 0, 0)) for name, microseconds in ops]

    walks = [walk(("ADD", 1000), ("ADD", 2000)), walk(("ADD", 7000), ("MUL", 500)), walk(("ADD", 900_000))]
    found = bench_profile._typical(walks)
    assert {name: figures for (_, name), figures in found.items()} == {"ADD": (7, 4 / 3), "MUL": (0, 1 / 3)}
