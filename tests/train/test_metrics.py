"""The record of a run: one line a step, honest load statistics, readable event files."""

from __future__ import annotations

import json
import math
import struct
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.files import location
from moe_jax.flops import train_flops_per_token
from moe_jax.train.metrics import Metrics, load_statistics, read_metrics


@given(st.lists(st.lists(st.integers(0, 1000), min_size=4, max_size=4), min_size=1, max_size=3))
def test_load_statistics_lie_between_balance_and_collapse(counts):
    load, entropy = load_statistics(np.array(counts))
    for layer, row in enumerate(counts):
        if sum(row) == 0:
            assert load[layer] == entropy[layer] == 0
            continue
        assert math.isclose(load[layer], max(row) / (sum(row) / 4))
        assert -1e-9 <= entropy[layer] <= 1 + 1e-9
        assert (entropy[layer] > 1 - 1e-9) == (max(row) - min(row) == 0) or max(row) - min(row) < 3


def test_load_statistics_of_a_dense_model_are_empty():
    assert load_statistics(np.zeros(0)) == ([], [])


def test_finished_run_has_a_line_for_every_step(tiny, finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    for line in lines:
        assert line["stage"] == "pretrain" and line["dropped"] == [0]
        assert 0 < line["tokens"] <= tiny.cfg.tokens_per_step
        assert len(line["load_max_over_mean"]) == len(line["load_entropy"]) == 1
        assert 1 <= line["load_max_over_mean"][0] <= 4


VALUES = dict.fromkeys(("loss", "learning_rate", "grad_norm", "z_loss", "aux_loss"), 1.0) | {
    "counts_LE": np.array([[1, 2, 3, 2]]),
    "dropped_L": np.array([7]),
}


def test_mfu_is_model_flops_over_the_peak(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("moe_jax.train.metrics.peak_flops", lambda _: 1e9)
    with Metrics(tmp_path, tiny.cfg, 0, [jax.devices()[0]] * 8) as metrics:
        metrics.log(1, VALUES, seconds=0.5, real=100, trained=90.0)
    (line,) = read_metrics(tmp_path)
    assert line["tokens_per_second"] == 200 and line["tokens"] == 90 and line["dropped"] == [7]
    # Eight fake devices are one processor.
    assert math.isclose(line["mfu"], 200 * train_flops_per_token(tiny.cfg.model, 32) / 1e9)
    assert line["load_max_over_mean"] == [1.5]


def test_the_speed_that_is_shown_is_no_single_steps(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moe_jax.train.metrics._PLAIN_SECONDS", 0.0)
    with Metrics(tmp_path, tiny.cfg, 0, [jax.devices()[0]] * 8) as metrics:
        for step in range(1, 12):
            metrics.log(step, VALUES, seconds=1e-3 if step == 11 else 1.0, real=100, trained=90.0)
    said = capsys.readouterr().err.splitlines()
    assert " 100 tokens/s " in said[9] and " 111 tokens/s " in said[10]
    assert [round(line["tokens_per_second"]) for line in read_metrics(tmp_path)][9:] == [100, 100_000]


def test_mfu_is_of_all_devices_of_an_accelerator(tiny, tmp_path):
    devices: Any = [SimpleNamespace(platform="tpu", device_kind="TPU v4")] * 8
    with Metrics(location(tmp_path), tiny.cfg, 0, devices) as metrics:
        metrics.log(1, VALUES, seconds=1e-6, real=100, trained=90.0)
    (line,) = read_metrics(tmp_path)
    assert math.isclose(line["mfu"], 1e8 * train_flops_per_token(tiny.cfg.model, 32) / (8 * 275e12))


def test_reopening_cuts_later_and_torn_lines(tiny, tmp_path):
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    with Metrics(location(tmp_path), tiny.cfg, 1, jax.devices()[:1]) as metrics:
        assert metrics.lost == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == rows[:1]


def test_reopening_where_nothing_is_past_writes_nothing(tiny, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":2}\n')
    file = path.stat().st_ino  # another one is renamed to where lines are cut
    with Metrics(location(tmp_path), tiny.cfg, 2, jax.devices()[:1]) as metrics:
        assert metrics.lost == 0
    assert path.stat().st_ino == file and path.read_text() == '{"step":1}\n{"step":2}\n'


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def whole_records(data: bytes) -> list[bytes]:
    """The payloads of an event file, whose checksums are sound."""
    records = []
    while data:
        length = struct.unpack("<Q", data[:8])[0]
        record, crc = (data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])[0])
        unmasked = (crc - 0xA282EAD8) & 0xFFFFFFFF
        assert (unmasked >> 17 | unmasked << 15) & 0xFFFFFFFF == crc32c(record)
        records.append(record)
        data = data[16 + length :]
    return records


def test_event_file_has_whole_records_with_sound_checksums(finished):
    assert crc32c(b"123456789") == 0xE3069283
    (path,) = (finished / "tensorboard").iterdir()
    records = whole_records(path.read_bytes())
    assert len(records) == 2 + 12
    for name in (b"loss", b"mfu", b"grad_norm", b"load_entropy/layer_00", b"dropped/layer_00"):
        assert all(name in record for record in records[2:])
