"""What each rung of the ladder takes for a fault, on engines and models whose every number is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from conversion import verify, weights
from moe_jax.data import chat
from tests.conversion.folders import TINY, random_parameters, tiny_tokenizer

TOKENIZER, IDS = tiny_tokenizer(), [6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("margins", "counted"),
    [([1, 1, 1e-6, 1, 1], 2), ([1, 1, 1, 1, 1], 5), ([1e-6, 1, 1, 1e-6, 1], 1), ([1, 1, 1, 1, 3e-6], 5)],
)
def test_jax_and_torch_are_compared_up_to_the_first_tie_of_experts(monkeypatch, margins, counted):
    want = np.zeros((5, 300), np.float32)
    got = want + 0.125 * np.arange(5, dtype=np.float32)[:, None]  # further off with every token
    monkeypatch.setattr("moe_jax.generate.Generator", lambda *_: SimpleNamespace(logits=lambda ids: want))
    monkeypatch.setattr(verify, "_torch_logits", lambda *_: (got, np.array(margins, float)))
    figures = verify.jax_torch({}, weights.random(TINY), IDS)
    assert figures["jax_torch_tokens"] == counted
    assert figures["jax_torch_max_abs"] == 0.125 * (counted - 1)
    assert figures["jax_torch_int8_max_abs"] == 0.5  # of all, for the record


def test_a_margin_is_the_lead_of_the_last_expert_chosen_in_the_layer_where_it_is_least(monkeypatch):
    leads, chosen = [], verify.Reference.top_k

    def spy(self, scores, k):
        *_, last, next_best = scores.topk(k + 1).values.unbind(-1)
        leads.append((last - next_best).numpy())
        return chosen(self, scores, k)

    monkeypatch.setattr(verify.Reference, "top_k", spy)
    _, margins = verify._torch_logits(weights.random(TINY), IDS, False)
    assert len(leads) == TINY.num_layers and np.array_equal(margins, np.min(leads, axis=0))


def test_one_token_that_the_engine_finds_much_less_likely_is_a_fault():
    even = -np.log(300)

    class Engine:
        off = 0.0

        def score(self, text):
            return np.array([even] * 4 + [even + self.off])

        def token_text(self, token):
            return TOKENIZER.decode([token])

        def next_token(self, prefix):
            return TOKENIZER.decode([0])

    generator, engine = SimpleNamespace(logits=lambda ids: np.zeros((len(ids), 300), np.float32)), Engine()

    def parity():
        return verify.engine_jax(cast(Any, engine), generator, TOKENIZER, [IDS, IDS], 2)

    assert parity()["engine_nll_diff_nats"] == pytest.approx(0) and verify.broken(parity()) == []
    engine.off = -1.0
    found = parity()
    assert found["engine_nll_diff_nats"] == pytest.approx(0.2) and found["engine_tokens"] == 10
    assert found["engine_nll_nats"] - found["jax_nll_nats"] == pytest.approx(0.2)
    assert found["engine_token_median_abs_nats"] == pytest.approx(0)
    assert found["engine_token_max_abs_nats"] == pytest.approx(1)
    assert ["engine_nll_diff_nats" in sentence for sentence in verify.broken(found)] == [True]


@pytest.mark.parametrize(
    ("cut", "more", "wrong"), [(0, [], 0), (1, [], 1), (3, [], 3), (0, [9, 9], 2), (1, [5], 1)]
)
def test_ids_that_the_engines_template_misses_or_adds_are_counted(cut, more, wrong):
    question = [{"role": "user", "content": verify._QUESTION}]
    _, *ids = chat.render_ids(question, TOKENIZER, generation_prompt=True)[0].tolist()
    assert ids[-1] != 5
    rendered = ids[: len(ids) - cut] + more
    engine = SimpleNamespace(prompt_tokens=lambda text: (rendered, len(rendered) + 1))
    found = verify.chat_template(cast(Any, engine), TOKENIZER)
    assert found == {"chat_start_tokens": 1, "chat_wrong_ids": wrong}


def test_a_weight_that_the_key_map_leaves_out_is_told_even_if_the_file_lacks_it_too(monkeypatch):
    parameters, listed = random_parameters(TINY), verify.keymap.to_torch

    def without_one(*args):
        return ((t, value) for t, value in listed(*args) if t.name != "model.layers.1.self_attn.o_proj")

    monkeypatch.setattr(verify.readback, "compare", lambda *_: verify.Findings())
    assert verify.codes_and_scales(memoryview(b""), TINY, parameters, 32).reports == []
    monkeypatch.setattr(verify.keymap, "to_torch", without_one)
    found = verify.codes_and_scales(memoryview(b""), TINY, parameters, 32)
    assert found.mismatches == 96 * 64 and "the key map lists" in found.reports[0]
