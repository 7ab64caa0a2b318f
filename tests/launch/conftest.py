"""A demo's figures as report.json holds them, the logs behind them, and the trainer's tiny run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.object_store import bucket  # noqa: F401  (a fixture)
from tests.train.conftest import finished, tiny  # noqa: F401  (fixtures)


@pytest.fixture
def curves() -> dict[str, list[dict[str, Any]]]:
    stages = ("pretrain", "midtrain", "sft", "qat")
    lines: dict[str, list[dict[str, Any]]] = {
        stage: [{"step": n, "loss": 8.0 / n, "grad_norm": 1.0, "tokens": 100} for n in range(1, 11)]
        for stage in stages
    }
    lines["pretrain"][4]["expert_tokens"] = [[30, 10, 0], [10, 10, 10]]
    lines["qat"][9]["expert_tokens"] = [[10, 10, 20], [13, 13, 14]]
    return lines


@pytest.fixture
def result() -> dict[str, Any]:
    stages = ("pretrain", "midtrain", "sft", "qat")
    stage = {"loss_first": 5.0, "loss_last": 1.0, "steps": 10, "tokens": 1000, "seconds": 7.0}
    parts = ("tokenizer", *stages, "compare", "evaluate", "export", "verify", "bench", "layer", "chat")
    form = {"median_us": 50.0, "median_ratio": 2.5}
    return {
        "stages": {name: dict(stage) for name in stages},
        "heldout_bits_per_byte": {"model_qat": 1.91, "gzip9": 2.05, "xz9": 1.82, "bytes": 5000},
        "resume": {"kills": 2, "bit_exact": True, "killed_at": [3, 7], "resumed_from": [2, 6], "different": []},
        "export": {"codes_checked": 123456, "scales_checked": 3858, "mismatches": 0, "bytes": 99},
        "parity": {
            "jax_torch_max_abs": 2e-5,
            "torch_tflite_median_abs": 1e-4,
            "engine_nll_diff_nats": 0.003,
            "engine_top1_agreement": 0.991,
        },
        "speed": {
            "decode_tok_s": 400.0,
            "prefill_tok_s": 2000.0,
            "dense_decode_tok_s": 100.0,
            "dense_prefill_tok_s": 500.0,
            "decode_speedup": 4.0,
            "prefill_speedup": 4.0,
        },
        "layer": {f"tokens_{n}": dict.fromkeys(("dense", "sparse", "all"), form) for n in (1, 128)},
        "reply": "Joins <b>paths</b> & more.",
        "prompt": "What?",
        "losses_averaged_over_steps": 5,
        "parts_seconds": dict.fromkeys(parts, 7.0),
        "seconds": 77.0,
        "started": "2026-01-01 00:00 UTC",
        "machine": {"cores": 2, "cpu": "a CPU", "system": "Linux"},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
    }
