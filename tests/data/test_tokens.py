"""Token ids on disk: of the right type, never another's, and written by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import threading
from collections import Counter
from collections.abc import Callable
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


class Race:
    """Threads A, B and C that want one source in one cache; A goes first, and fails while B waits for its lock."""

    def __init__(self, source, tokenizer, cache: Path, monkeypatch) -> None:
        self.found: dict[str, str] = {}  # by thread: a fingerprint or an error
        self.wrote: list[str] = []
        self.happened = {name: threading.Event() for name in ("B waits", "C waits", "C writes", "B goes on")}
        self._threads = {name: threading.Thread(target=self._run, name=name) for name in "ABC"}
        self._want = lambda: tokenize_source(source, tokenizer, cache_dir=str(cache)).fingerprint
        self._locks, self._take, self._write = Counter(), fcntl.flock, tokenized._write
        monkeypatch.setattr(fcntl, "flock", self._flock)
        monkeypatch.setattr(tokenized, "_write", self._written)

    def run(self) -> None:
        self.start("A")
        for thread in self._threads.values():
            thread.join(60)

    def start(self, name: str) -> None:
        self._threads[name].start()

    def wait(self, what: str) -> None:
        assert self.happened[what].wait(60), what

    def locking(self, name: str, count: int, take: Callable[[int], None]) -> None:
        """The thread asks for a lock, for the count-th time."""
        take(fcntl.LOCK_EX)

    def writing(self, name: str) -> None:
        """The thread holds the lock and is about to write."""

    def _run(self) -> None:
        name = threading.current_thread().name
        try:
            self.found[name] = self._want()
        except Exception as error:
            self.found[name] = str(error)

    def _flock(self, file, _: int) -> None:
        name = threading.current_thread().name
        self._locks[name] += 1
        if name == "B":
            self.happened["B waits" if self._locks[name] == 1 else "B goes on"].set()
        self.locking(name, self._locks[name], lambda how: self._take(file, how))

    def _written(self, *what) -> None:
        name = threading.current_thread().name
        self.wrote.append(name)
        if name == "A":
            self.start("B")
            self.wait("B waits")
            raise UserError("A fails")
        self.writing(name)
        self._write(*what)


def test_a_lock_taken_after_its_file_was_removed_keeps_a_third_writer_out(
    text_source, tokenizer, tmp_path, monkeypatch
):
    class Late(Race):
        free = False

        def locking(self, name, count, take):
            if (name, count) == ("C", 1):
                with contextlib.suppress(BlockingIOError):
                    take(fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.free = True
                self.happened["C waits"].set()
            take(fcntl.LOCK_EX)

        def writing(self, name):
            if name == "B":
                self.start("C")
                self.wait("C waits")

    whole = tokenize_source(text_source, tokenizer).fingerprint
    race = Late(text_source, tokenizer, tmp_path / "cache", monkeypatch)
    race.run()
    assert race.found == {"A": "A fails", "B": whole, "C": whole} and not race.free
    assert race.wrote == ["A", "B"] and len(list((tmp_path / "cache").iterdir())) == 1


def test_who_waited_for_a_removed_lock_waits_again_for_the_one_made_in_its_place(
    text_source, tokenizer, tmp_path, monkeypatch
):
    class Early(Race):
        def locking(self, name, count, take):
            take(fcntl.LOCK_EX)
            if (name, count) == ("B", 1):  # of the file that A removed
                self.start("C")
                self.wait("C writes")

        def writing(self, name):
            self.happened[f"{name} {'goes on' if name == 'B' else 'writes'}"].set()
            self.wait("B goes on")

    whole = tokenize_source(text_source, tokenizer).fingerprint
    race = Early(text_source, tokenizer, tmp_path / "cache", monkeypatch)
    race.run()
    assert race.found == {"A": "A fails", "B": whole, "C": whole}
    assert race.wrote == ["A", "C"] and len(list((tmp_path / "cache").iterdir())) == 1
