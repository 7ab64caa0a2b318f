"""The tokenizer gives back every text, never mistakes text for control, and is the same each time."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import SourceConfig
from moe_jax.data.commands import build_tokenizer
from moe_jax.data.tokenizer import BOS, EOT, SPECIAL_TOKENS, Tokenizer
from moe_jax.errors import UserError
from tests.data.helpers import sentence

any_text = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=200)
@given(text=any_text | any_text.map(lambda t: t + EOT + t))
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.encode_batch([text]) == [ids]


def test_training_twice_gives_one_tokenizer(tokenizer):
    again = Tokenizer.train([sentence(i, 40) for i in range(20)], 300)
    assert again.fingerprint == tokenizer.fingerprint and tokenizer.vocab_size == 300


def test_a_saved_file_loads_the_same_here_and_elsewhere(tokenizer, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    tokenizer.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    elsewhere = tokenizers.Tokenizer.from_file(str(path))
    text = sentence(1, 9)
    assert elsewhere.encode(text).ids == [tokenizer.bos, *tokenizer.encode(text)]
    assert elsewhere.encode(EOT, add_special_tokens=False).ids == [tokenizer.eot]
    compact = tmp_path / "compact.json"
    compact.write_text(json.dumps(json.loads(path.read_text())))
    assert Tokenizer.load(compact).fingerprint == tokenizer.fingerprint


def test_a_file_that_cuts_and_fills_texts_does_neither_here(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(8)
    saved.enable_padding(length=64)
    saved.save(str(tmp_path / "cuts.json"))
    texts = [sentence(1, 40), "a"]
    assert Tokenizer.load(tmp_path / "cuts.json").encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_special_tokens_have_the_low_ids(tokenizer):
    assert [tokenizer.token(i) for i in range(6)] == list(SPECIAL_TOKENS)
    assert tokenizer.decode([tokenizer.bos]) == BOS and tokenizer.token(10**6) == ""


def test_a_missing_damaged_or_foreign_file_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer at .*train one"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="no sound tokenizer"):
        Tokenizer.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="no sound tokenizer"):
        Tokenizer.load(path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(UserError, match=r"lacks <\|begin_of_text\|>"):
        Tokenizer.load(path)
    path.write_text(whole.replace('"ByteLevel"', '"Fuse"', 1).replace('"decoder"', '"decoder"'))
    with pytest.raises(UserError):
        Tokenizer.load(path)


def test_a_tokenizer_that_does_not_match_is_refused(tokenizer):
    tokenizer.require(300, tokenizer.fingerprint)
    with pytest.raises(UserError, match=r"300 entries but model\.vocab_size is 299"):
        tokenizer.require(299)
    with pytest.raises(UserError, match="not the one the checkpoint was trained with"):
        tokenizer.require(300, "0" * 64)


def test_too_little_text_or_vocabulary_is_refused_with_the_number():
    with pytest.raises(UserError, match=r"gives only 26\d of 400"):
        Tokenizer.train(["abab"], 400)
    with pytest.raises(UserError, match="alone need 262"):
        Tokenizer.train(["abab"], 100)


def test_building_over_an_existing_tokenizer_is_refused(text_source, tmp_path):
    path = tmp_path / "t.json"
    path.write_text("precious")
    with pytest.raises(UserError, match="exists"):
        build_tokenizer([text_source], 280, path)
    assert path.read_text() == "precious"
    build_tokenizer([text_source], 280, path, overwrite=True)
    assert Tokenizer.load(path).vocab_size == 280


def test_tokenizer_can_be_trained_on_chats(chat_source, tmp_path):
    sources = [chat_source, SourceConfig("stdlib:text")]
    built = build_tokenizer(sources, 400, tmp_path / "t.json", max_bytes=20_000)
    assert built.vocab_size == 400


def test_a_file_that_changes_capitals_or_fails_on_a_text_is_refused(tokenizer, tmp_path):
    def changed(change) -> None:
        described = json.loads(tokenizer._backend.to_str())
        change(described)
        (tmp_path / "t.json").write_text(json.dumps(described))
        with pytest.raises(UserError, match="does not give back the text it encodes; use a byte-level BPE"):
            Tokenizer.load(tmp_path / "t.json")

    changed(lambda described: described.update(normalizer={"type": "Lowercase"}))
    words = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    changed(
        lambda described: described.update(
            model=words | {"max_input_chars_per_word": 100, "vocab": described["model"]["vocab"]}
        )
    )


def test_ids_with_gaps_need_room_up_to_the_last(tokenizer, tmp_path):
    described = json.loads(tokenizer._backend.to_str())
    vocab = described["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    vocab[last] += 500
    (tmp_path / "t.json").write_text(json.dumps(described))
    assert Tokenizer.load(tmp_path / "t.json").vocab_size == tokenizer.vocab_size + 500
