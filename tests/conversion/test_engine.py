"""Bundles in the stock LiteRT-LM engine."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from litert_lm.interfaces import SamplerConfig

from conversion.litert import bundle
from conversion.litert.engine import Engine, reply
from conversion.torch_model import MobileMoE, Reference
from moe_jax.data import chat
from moe_jax.data.corpus import Message
from moe_jax.errors import UserError
from tests.conversion import ties
from tests.conversion.conftest import CONTEXT, answer

CLOSE = 1e-5  # nats
TEXT = "def add(first):\n    return first + 1  # and on"


@pytest.fixture(scope="module")
def engine(exported):
    with Engine(exported.bundle, threads=1) as loaded:
        yield loaded


def logits(exported, ids: list[int]) -> np.ndarray:
    """[S, V] of the torch model."""
    model = MobileMoE(exported.weights, Reference(exported.weights), CONTEXT)
    return model(torch.tensor([ids], dtype=torch.int32))[0].numpy()


def greedy(exported, ids: list[int], count: int) -> list[int]:
    start, stops = len(ids), {exported.tokenizer.eot, exported.tokenizer.end}
    while len(ids) < start + count and (len(ids) == start or ids[-1] not in stops):
        ids = [*ids, int(logits(exported, ids)[-1].argmax())]
    return [token for token in ids[start:] if token not in stops]


def test_the_engine_reads_the_tokenizer_as_training_does(engine, exported):
    assert engine.tokenize(TEXT) == exported.tokenizer.encode(TEXT)
    assert engine.tokenize("<|eot|>") == [exported.tokenizer.eot]
    assert engine.stop_tokens == {exported.tokenizer.eot, exported.tokenizer.end}


def test_scores_are_the_log_likelihoods_of_the_torch_model(engine, exported):
    ids, got = [exported.tokenizer.bos, *exported.tokenizer.encode(TEXT)], engine.score(TEXT)
    want, _ = ties.nearest(exported.weights, ids, got, CLOSE)
    assert got.shape == want.shape
    assert np.abs(got - want).max() < CLOSE


def test_next_tokens_after_prefills_of_any_length_are_those_of_the_torch_model(engine, exported):
    ids = exported.tokenizer.encode(TEXT)
    rows = logits(exported, [exported.tokenizer.bos, *ids])
    for length in (1, 2, 7, 8, 9, 10, 16, 17, 18, 25):  # prefill_8 takes all but the last token
        prefix = exported.tokenizer.decode(ids[:length])
        if exported.tokenizer.encode(prefix) == ids[:length]:
            assert engine.next_token(prefix) == engine.token_text(int(rows[length].argmax()))


def test_a_prefill_that_ends_at_the_end_of_the_context_spoils_no_cache(engine, exported):
    ids = (exported.tokenizer.encode(TEXT) * 4)[: CONTEXT - 3]
    prefix = exported.tokenizer.decode(ids)
    ids = exported.tokenizer.encode(prefix)
    best = int(logits(exported, [exported.tokenizer.bos, *ids])[-1].argmax())
    assert CONTEXT - 8 < len(ids) < CONTEXT and len(ids) % 8
    assert engine.next_token(prefix) == engine.token_text(best)


def test_a_chat_reply_is_the_greedy_answer_to_the_templates_tokens(engine, exported):
    prompt = [{"role": "user", "content": "add one"}]
    ids, _ = chat.render_ids(prompt, exported.tokenizer, generation_prompt=True)
    want = exported.tokenizer.decode(greedy(exported, ids.tolist(), 6))
    assert answer(engine, "add one", 6).rstrip("\ufffd") == want.rstrip("\ufffd")


@pytest.mark.parametrize("exported", ["moe"], indirect=True)
def test_a_conversation_goes_on_after_its_history(engine, exported):
    said: list[Message] = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def"}]
    with engine.conversation(6, history=said) as conversation:
        got = "".join(reply(conversation, "one"))
    turns: list[Message] = [*said, {"role": "user", "content": "one"}]
    ids, _ = chat.render_ids(turns, exported.tokenizer, generation_prompt=True)
    want = exported.tokenizer.decode(greedy(exported, ids.tolist(), 6))
    assert got.rstrip("\ufffd") == want.rstrip("\ufffd") != answer(engine, "one", 6).rstrip("\ufffd")


def test_temperature_top_p_and_seed_reach_the_sampler_and_temperature_0_is_greedy(engine, monkeypatch):
    asked, create = [], engine._engine.create_conversation
    monkeypatch.setattr(engine._engine, "create_conversation", lambda **o: asked.append(o) or create(**o))
    for temperature in (0.0, 0.7):
        with engine.conversation(9, temperature, top_p=0.9, seed=5):
            pass
    sampled = SamplerConfig(top_k=64, top_p=0.9, temperature=0.7, seed=5)
    assert [given["sampler_config"] for given in asked] == [SamplerConfig(top_k=1, temperature=0.0), sampled]
    assert [given["max_output_tokens"] for given in asked] == [9, 9]


def test_a_text_beyond_the_context_is_refused(engine):
    with pytest.raises(UserError, match="context"):
        engine.score(TEXT * 10)
    with pytest.raises(UserError, match="context"):
        engine.next_token(TEXT * 10)
    with pytest.raises(UserError, match="context"):
        engine.prompt_tokens(TEXT * 10)


def test_the_same_files_give_the_same_bundle(exported, tmp_path):
    tokenizer = exported.bundle.with_name("tokenizer.json")
    bundle.write_bundle(exported.tflite, tokenizer, tmp_path / "again.litertlm", CONTEXT)
    assert (tmp_path / "again.litertlm").read_bytes() == exported.bundle.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.litertlm"]


@pytest.mark.parametrize("exported", ["dense"], indirect=True)
def test_a_tokenizer_file_that_cuts_texts_cuts_none_in_the_engine(exported, tmp_path):
    cutting = tokenizers.Tokenizer.from_file(str(exported.bundle.with_name("tokenizer.json")))
    cutting.enable_truncation(8)
    cutting.save(str(tmp_path / "tokenizer.json"))
    bundle.write_bundle(exported.tflite, tmp_path / "tokenizer.json", tmp_path / "m.litertlm", CONTEXT)
    with Engine(tmp_path / "m.litertlm", threads=1) as engine:
        assert engine.tokenize(TEXT) == exported.tokenizer.encode(TEXT)


def test_a_full_disk_is_told_before_the_engine_aborts_on_it(exported, tmp_path, monkeypatch):
    with Engine(exported.bundle, threads=1, cache_dir=tmp_path / "kept"):
        pass
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=exported.bundle.stat().st_size - 1))
    with pytest.raises(UserError, match="make room"):
        Engine(exported.bundle, threads=1, cache_dir=tmp_path / "new")
    with Engine(exported.bundle, threads=1, cache_dir=tmp_path / "kept"):  # what is packed already needs none
        pass


def test_what_is_no_bundle_is_refused_in_words(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        Engine(tmp_path / "none.litertlm")
    (tmp_path / "x.litertlm").write_text("something else")
    with pytest.raises(UserError, match=r"no \.litertlm bundle"):
        Engine(tmp_path / "x.litertlm")
