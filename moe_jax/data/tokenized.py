"""Token ids of a whole source, on disk or in a bucket: made once, memory-mapped ever after.

The folder's name is a hash of what it follows from (files, kind, size limit, tokenizer, the code that reads), so it
is never stale; its `fingerprint` is a hash of the ids themselves, by which a resumed run knows its data again, and
its `files` say which file changed where it does not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from etils import epath

from moe_jax.config import SourceConfig
from moe_jax.data import token_store
from moe_jax.data.chat import render_ids
from moe_jax.data.sources import Document, Manifest, contents, document_text, iter_documents, source_files
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import is_remote, location
from moe_jax.progress import Progress

T = TypeVar("T")

_PART = 1 << 18  # characters; longer texts are encoded in parts cut at a line's end
_CHUNK = 4 * max(16, os.cpu_count() or 1)  # parts encoded at one time, enough for all cores,
_CHUNK_SIZE = 1 << 24  # or as many characters: their ids take some 10 bytes for each as Python's numbers


@dataclass(frozen=True)
class TokenizedSource:
    """Documents as ids. `tokens` [T] uint16 or uint32, `trained` bool [T] (chats: what the loss counts; None: all),
    `offsets` int64 [documents + 1], `num_bytes` of UTF-8 text, `fingerprint` of all of it, `files` behind it."""

    tokens: np.ndarray
    trained: np.ndarray | None
    offsets: np.ndarray
    num_bytes: int
    fingerprint: str
    files: Manifest = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenize_source(
    source: SourceConfig, tokenizer: Tokenizer, max_bytes: int = 0, cache_dir: str = ""
) -> TokenizedSource:
    """Ids of a source, from the cache where it has them. Text documents are BOS, text, end-of-text.

    To a cache in a bucket nothing is added, as every host of a run would do the same hours of work: UserError where
    it has no tokens of the source; `put_tokens` puts them there.
    """
    if cache_dir and not is_remote(cache_dir):
        folder = Path(location(cache_dir)) / _key(source, tokenizer, max_bytes)
        if not folder.exists():
            try:
                _write_alone(folder, source, tokenizer, max_bytes)
            except OSError as error:
                raise UserError(
                    f"cannot write tokens to {folder}: {error.strerror}; set data.cache_dir to a folder with room"
                ) from None
        return _read(folder)
    with _scratch() as folder:
        if not cache_dir:
            _write(folder, source, tokenizer, max_bytes)
        else:
            require_tokens(source, tokenizer, max_bytes, cache_dir)
            token_store.fetch(_store(source, tokenizer, max_bytes, cache_dir), folder)
        return _read(folder)


def require_tokens(source: SourceConfig, tokenizer: Tokenizer, max_bytes: int, cache_dir: str) -> None:
    """UserError where a cache in a bucket lacks the ids of a source; nothing is copied."""
    if is_remote(cache_dir) and not token_store.is_complete(_store(source, tokenizer, max_bytes, cache_dir)):
        raise UserError(
            f"{cache_dir} has no tokens of {source.path} as it is now by this tokenizer and code; put them "
            "there with 'python -m moe_jax tokenize CONFIG' and the same options"
        )


def _store(source: SourceConfig, tokenizer: Tokenizer, max_bytes: int, cache_dir: str) -> epath.Path:
    return location(cache_dir) / _key(source, tokenizer, max_bytes, shared=True)


def put_tokens(
    source: SourceConfig, tokenizer: Tokenizer, max_bytes: int, cache_dir: str
) -> TokenizedSource | None:
    """See to it that `cache_dir`, which may be in a bucket, has a source's ids; None where a bucket had them."""
    if not is_remote(cache_dir):
        return tokenize_source(source, tokenizer, max_bytes, cache_dir)
    store = _store(source, tokenizer, max_bytes, cache_dir)
    if token_store.is_complete(store):
        return None
    with _scratch() as folder:
        _write(folder, source, tokenizer, max_bytes)
        token_store.send(folder, store)
        return _read(folder)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for as long as the block runs; what was mapped into memory outlives its name."""
    with tempfile.TemporaryDirectory() as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"{name} has no room for tokens; set TMPDIR to a folder that has") from None


def _write_alone(folder: Path, *what: Any) -> None:
    """Write the folder aside, then rename it; other processes that want the same one wait for the first."""
    aside, lock = Path(f"{folder}.part"), Path(f"{folder}.lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock):
        try:
            if not folder.exists():
                shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
                aside.mkdir()
                _write(aside, *what)
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold a lock file that its holders remove: who waited for one that is gone by now waits for its successor."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _is_at(file, lock):
                yield
                return


def _is_at(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def document_ids(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids int32 [S] of one document and, for a conversation, what is trained bool [S]."""
    if isinstance(document, str):
        return next(_encoded_texts([document], tokenizer)), None
    return render_ids(document, tokenizer)


def _encoded(
    kind: str, documents: Iterator[Document], tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """`document_ids` of each document, all of one kind; texts are encoded many at a time."""
    if kind == "chat":
        return (document_ids(document, tokenizer) for document in documents)
    texts = (document for document in documents if isinstance(document, str))
    return ((ids, None) for ids in _encoded_texts(texts, tokenizer))


def _encoded_texts(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    parts = ((number, part) for number, text in enumerate(texts) for part in _parts(text))

    def encoded() -> Iterator[tuple[int, np.ndarray]]:
        # All cores encode a chunk while this one reads and writes its neighbours.
        with ThreadPoolExecutor(1) as pool:

            def started(chunk: list[tuple[int, str]]) -> tuple[list[tuple[int, str]], Future]:
                return chunk, pool.submit(tokenizer.encode_batch, [part for _, part in chunk])

            for chunk, batch in _one_ahead(map(started, _chunks(parts))):
                for (number, _), ids in zip(chunk, batch.result(), strict=True):
                    yield number, np.array(ids, np.int32)

    for _, group in groupby(encoded(), key=itemgetter(0)):
        ids = [part for _, part in group]
        yield np.concatenate([[tokenizer.bos], *ids, [tokenizer.end]]).astype(np.int32)


def _chunks(parts: Iterator[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    chunk, size = [], 0
    for number, part in parts:
        chunk.append((number, part))
        size += len(part)
        if len(chunk) == _CHUNK or size >= _CHUNK_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each given once the next one was taken."""
    held = deque(islice(items, 1))
    for item in items:
        held.append(item)
        yield held.popleft()
    yield from held


def _parts(text: str) -> Iterator[str]:
    at = 0
    while len(text) - at > 2 * _PART:
        cut = text.find("\n", at + _PART, at + 2 * _PART) + 1 or at + _PART
        yield text[at:cut]
        at = cut
    yield text[at:]


def _write(folder: Path, source: SourceConfig, tokenizer: Tokenizer, max_bytes: int) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    offsets, num_bytes, digest, files = array("q", [0]), 0, hashlib.sha256(), {}
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "trained.bin").open("wb") as masks:

        def counted() -> Iterator[Document]:
            nonlocal num_bytes
            for document in iter_documents(source, max_bytes, files, Progress(f"tokenising {source.path}", 10.0)):
                num_bytes += len(document_text(document).encode())
                yield document

        for ids, trained in _encoded(source.kind, counted(), tokenizer):
            offsets.append(offsets[-1] + len(ids))
            pieces = [(tokens, ids.astype(dtype).tobytes())]
            if trained is not None:
                pieces.append((masks, trained.tobytes()))
            for file, piece in pieces:
                file.write(piece)
                digest.update(piece)
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))
    digest.update(np.array(offsets, np.int64).tobytes())
    meta = {"dtype": dtype.name, "num_bytes": num_bytes, "fingerprint": digest.hexdigest(), "files": files}
    (folder / "meta.json").write_text(json.dumps(meta))


def _read(folder: Path) -> TokenizedSource:
    meta = json.loads((folder / "meta.json").read_text())
    masked = (folder / "trained.bin").stat().st_size > 0
    return TokenizedSource(
        tokens=np.memmap(folder / "tokens.bin", meta["dtype"], "r"),
        trained=np.memmap(folder / "trained.bin", bool, "r") if masked else None,
        offsets=np.load(folder / "offsets.npy"),
        num_bytes=meta["num_bytes"],
        fingerprint=meta["fingerprint"],
        files=meta["files"],
    )


def _key(source: SourceConfig, tokenizer: Tokenizer, max_bytes: int, shared: bool = False) -> str:
    """A name for the tokens of a source; a cache that machines share must not ask when a file was written."""
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    parts = {
        "source": asdict(source) | {"weight": None},
        "files": contents(source.path) if shared else [astuple(file) for file in source_files(source.path)],
        "max_bytes": max_bytes,
        "tokenizer": tokenizer.fingerprint,
        "code": hashlib.sha256(b"".join(code)).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
