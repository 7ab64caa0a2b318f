"""Held-out data in nats per token, texts in bits of the same bytes as compressors."""

from __future__ import annotations

import json
import math

import jax
import pytest

from moe_jax.__main__ import main
from moe_jax.train import evaluate as evaluation
from tests.train.conftest import VOCAB


def test_evaluation_is_in_bits_of_the_same_bytes(finished, tmp_path, capsys):
    assert main(["evaluate", str(finished), "--json", str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert f"{result['nats_per_token']:.4f}" in capsys.readouterr().out
    assert result["step"] == 12 and result["bytes"] > result["tokens"] > 0
    bits = result["nats_per_token"] * result["tokens"] / math.log(2) / result["bytes"]
    assert math.isclose(result["bits_per_byte_model"], bits)
    assert 0 < result["bits_per_byte_xz9"] < 8 and 0 < result["bits_per_byte_gzip9"] < 8
    assert result["nats_per_token"] < 0.8 * math.log(VOCAB)


def test_conversations_are_evaluated_in_nats_and_leave_the_text_as_it_is(finished, tmp_path):
    lines = [{"messages": [{"role": r, "content": f"beta {n}"} for r in ("user", "assistant")]} for n in range(9)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talk = json.dumps({"path": f"{tmp_path}/talk.jsonl", "kind": "chat", "weight": 1.0})
    text = evaluation.evaluate(finished)
    both = evaluation.evaluate(finished, [f"data.heldout.1={talk}"])
    alone = evaluation.evaluate(finished, [f"data.heldout=[{talk}]"])
    assert set(alone) == {"step", "tokens", "nats_per_token"} and alone["tokens"] > 9
    assert both["bits_per_byte_model"] == text["bits_per_byte_model"]
    nats = [found["tokens"] * found["nats_per_token"] for found in (text, alone, both)]
    assert nats[0] + nats[1] == pytest.approx(nats[2])


def test_a_model_that_one_device_does_not_hold_is_evaluated_on_several(finished, monkeypatch):
    meshes, put = [], evaluation.put_batch
    monkeypatch.setattr(evaluation, "put_batch", lambda batch, mesh: meshes.append(mesh) or put(batch, mesh))
    alone, cut = evaluation.evaluate(finished), evaluation.evaluate(finished, devices=jax.devices()[:6])
    assert {mesh.size for mesh in meshes} == {1, 2}  # as many of the six as divide d_model
    assert cut == pytest.approx(alone, rel=1e-6)


def test_evaluation_takes_few_tokens_at_a_time_whatever_the_batch_of_training(finished, monkeypatch):
    sizes = []
    put = evaluation.put_batch
    monkeypatch.setattr(evaluation, "put_batch", lambda b, mesh: sizes.append(b["tokens"].size) or put(b, mesh))
    small, large = (evaluation.evaluate(finished, [f"data.global_batch_size={n}"]) for n in (1, 4096))
    assert small == large and max(sizes) <= 16_384
