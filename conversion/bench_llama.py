"""A .gguf in llama.cpp as `bench` measures it, through its Python package where that is installed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from llama_cpp import Llama


class LlamaCpp:
    """A `bench_worker.Model`. It writes the text's own tokens, so sampling costs it nothing."""

    def __init__(self, path: str, threads: int, context: int, flash: bool) -> None:
        options: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads, "flash_attn": flash}
        self._llama = Llama(path, n_ctx=context, verbose=False, **options)

    def prefill(self, text: str, ids: Sequence[int]) -> dict[str, float]:
        """See `Model.prefill`."""
        self.start(1)
        found = self.read(text, ids)
        return found | {"ttft": found["seconds"]}  # reading ends with the next token's logits

    def start(self, decode: int) -> None:
        """See `Model.start`."""
        self._llama.reset()

    def read(self, text: str, ids: Sequence[int]) -> dict[str, float]:
        """See `Model.read`."""
        return self._eval([ids])

    def write(self, ids: Sequence[int]) -> dict[str, float]:
        """See `Model.write`."""
        return self._eval([[token] for token in ids])

    def _eval(self, calls: Sequence[Sequence[int]]) -> dict[str, float]:
        begun = time.perf_counter()
        for ids in calls:
            self._llama.eval(ids)
        return {"tokens": sum(map(len, calls)), "seconds": time.perf_counter() - begun}
