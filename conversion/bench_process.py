"""Models that `bench` measures, each in a child process, and the texts that all of them are given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from types import TracebackType
from typing import Any

from conversion import heldout
from moe_jax.config import SourceConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError

_CHUNK = 512  # tokens of a piece on the way to a long context


class Candidate:
    """One file with one number of threads in a process of its own; see `bench_worker` for what it can be asked."""

    def __init__(self, kind: str, path: str | Path, threads: int, *last: str) -> None:
        """Start to load; `kind` is litert or llama, `last` as `bench_worker.main` takes it."""
        self.path, self.threads, self._kind = path, threads, kind
        words = [sys.executable, "-m", "conversion.bench_worker", kind, str(path), str(threads), *last]
        # The package is found however this process found it, and files from where this process stands.
        found = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env, pipe = os.environ | {"PYTHONPATH": os.pathsep.join(found)}, subprocess.PIPE
        self._process = subprocess.Popen(
            words, env=env, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        self.memory: dict[str, float] = {}
        try:
            self.load_s = self._reply()["load_s"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Candidate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def ask(self, do: str, **order: Any) -> dict[str, float]:
        """The reply of `bench_worker.Model`'s method `do`; UserError where it cannot, or has died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing reply tells
        return self._reply()

    def _reply(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            refused = status == -signal.SIGILL and self._kind == "llama"
            mend = "see requirements/gguf.txt" if refused else "free memory or disk, or try it in conversion chat"
            raise UserError(f"the process that ran {self.path} died with status {status}; {mend}")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(reply["error"])
        for name in ("peak_rss_gb", "anonymous_gb", "files_gb"):
            self.memory[name] = max(reply.pop(name), self.memory.get(name, 0))
        return reply


@dataclass
class Texts:
    """Real text, cut to exact numbers of tokens; every model gets the same."""

    source: str
    tokenizer: Tokenizer
    _cut: dict[int, list[list[int]]] = field(default_factory=dict)

    def pieces(self, tokens: int, count: int) -> list[dict[str, Any]]:
        """`count` pieces {text, ids} from as many documents as there are."""
        if len(self._cut.get(tokens, ())) < count:
            self._cut[tokens] = heldout.pieces((SourceConfig(self.source),), self.tokenizer, count, tokens)
        pieces = islice(cycle(self._cut[tokens]), count)
        return [{"text": self.tokenizer.decode(ids), "ids": ids} for ids in pieces]

    def prompts(self, tokens: int, count: int) -> list[dict[str, Any]]:
        """The same with the start token among the `tokens`, which a text leaves to the engine."""
        pieces = self.pieces(tokens - 1, count)
        return [piece | {"ids": [self.tokenizer.bos, *piece["ids"]]} for piece in pieces]

    def way(self, begun: int, tokens: int) -> list[dict[str, Any]]:
        """Pieces of together `tokens` tokens that go on after the first `begun`, starting with the start token."""
        whole, rest = divmod(tokens - (not begun), _CHUNK)
        skip = -(-begun // _CHUNK)
        way = self.pieces(_CHUNK, skip + whole)[skip:] if whole else []
        way += self.pieces(rest, skip + 1)[skip:] if rest else []
        if not begun and way:
            way[0] = way[0] | {"ids": [self.tokenizer.bos, *way[0]["ids"]]}
        return way
