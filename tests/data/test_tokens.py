"""Token ids on disk: of the right type, never another's, and written by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from moe_jax.config import SourceConfig
from moe_jax.data import tokenized
from moe_jax.data.tokenized import tokenize_source
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from tests.data.helpers import sentence, write


def test_ids_past_65535_are_kept_whole(text_source, tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_tokens([f"w{number:05}" for number in range(70_000)])
    large = Tokenizer(backend)
    text = "w69999 w65536 w00000 quick"
    stored = tokenize_source(SourceConfig(write(tmp_path, "txt", "text", [text])), large)
    assert stored.tokens.tolist() == [large.bos, *large.encode(text), large.end] and stored.tokens.max() > 70_000
    assert tokenize_source(text_source, tokenizer).tokens.dtype == np.uint16


def test_a_cache_holds_apart_what_was_made_by_another_tokenizer_size_limit_or_code(
    text_source, tokenizer, tmp_path, monkeypatch
):
    cache = tmp_path / "cache"

    def tokens(tokenizer: Tokenizer, max_bytes: int = 0) -> list[int]:
        stored = tokenize_source(text_source, tokenizer, max_bytes, str(cache))
        assert stored.tokens.tolist() == tokenize_source(text_source, tokenizer, max_bytes).tokens.tolist()
        return stored.tokens.tolist()

    other = Tokenizer.train([sentence(i, 40) for i in range(20)], 290)
    assert tokens(other) != tokens(tokenizer) != tokens(tokenizer, 900)
    assert len(list(cache.iterdir())) == 3
    copy = shutil.copytree(Path(tokenized.__file__).parent, tmp_path / "code")
    monkeypatch.setattr(tokenized, "__file__", str(copy / "tokenized.py"))
    tokens(tokenizer)
    assert len(list(cache.iterdir())) == 3  # wherever the code stands
    with (copy / "chat.py").open("a") as file:
        file.write("# another template\n")
    tokens(tokenizer)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_fingerprint_is_of_ids_training_and_bounds_so_that_an_old_checkpoint_knows_its_data(
    text_source, chat_source, tokenizer, kind
):
    stored = tokenize_source(text_source if kind == "text" else chat_source, tokenizer)
    digest = hashlib.sha256()
    for begin, end in zip(stored.offsets[:-1], stored.offsets[1:], strict=True):
        digest.update(stored.tokens[begin:end].tobytes())
        digest.update(b"" if stored.trained is None else stored.trained[begin:end].tobytes())
    digest.update(stored.offsets.tobytes())
    assert stored.fingerprint == digest.hexdigest() and stored.offsets.dtype == np.int64


def test_one_writes_at_a_time_where_the_first_of_three_fails(text_source, tokenizer, tmp_path, monkeypatch):
    """The second waits for a lock file that the first removes; the third makes a new one, and yet must wait."""
    whole = tokenize_source(text_source, tokenizer)
    cache, write, take = tmp_path / "cache", tokenized._write, fcntl.flock
    came = {name: threading.Event() for name in "ABC"}
    wrote, found = [], {}

    def flock(file, how: int) -> None:
        name = threading.current_thread().name
        if name == "C" and not came["C"].is_set():
            try:
                take(file, how | fcntl.LOCK_NB)
                found["C's lock"] = "free"
            except BlockingIOError:
                found["C's lock"] = "held"
        came[name].set()
        take(file, how)

    def written(*what) -> None:
        name = threading.current_thread().name
        wrote.append(name)
        if name == "A":
            threads["B"].start()
            assert came["B"].wait(60)
            raise UserError("A fails")
        if name == "B":
            threads["C"].start()
            assert came["C"].wait(60)
        write(*what)

    def run() -> None:
        name = threading.current_thread().name
        try:
            found[name] = tokenize_source(text_source, tokenizer, cache_dir=str(cache)).fingerprint
        except Exception as error:
            found[name] = str(error)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(tokenized, "_write", written)
    threads = {name: threading.Thread(target=run, name=name) for name in "ABC"}
    threads["A"].start()
    for thread in threads.values():
        thread.join(60)
    assert found == {"A": "A fails", "C's lock": "held", "B": whole.fingerprint, "C": whole.fingerprint}
    assert wrote == ["A", "B"] and len(list(cache.iterdir())) == 1
