"""One model in one engine in a process of its own, driven by lines of JSON: what `bench` compares.

A process for each keeps their memory apart, and lets them take turns: whoever is not asked stands still. Lines come
on standard input (`{"do": "prefill", ...}`), replies go to standard output; what the engines say goes to standard
error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol

from conversion.memory import memory
from moe_jax.errors import UserError


class Model(Protocol):
    """A loaded model with one running text."""

    def prefill(self, text: str, ids: Sequence[int]) -> dict[str, float]:
        """Start over and take in a text; `tokens` and `seconds` of that, `ttft`: seconds until the next token."""
        ...

    def start(self, decode: int) -> None:
        """Begin another text, of which `decode` tokens at a time will be written."""
        ...

    def read(self, text: str, ids: Sequence[int]) -> dict[str, float]:
        """Append a piece of text: `tokens` and `seconds`."""
        ...

    def write(self, ids: Sequence[int]) -> dict[str, float]:
        """Append tokens one at a time: how many `tokens`, and `seconds`."""
        ...


def main(kind: str, path: str, threads: str, last: str, flash: str = "") -> None:
    """Load and serve until the input ends; `last` is a cache folder, for llama.cpp the longest text."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(found: dict[str, Any]) -> None:
        print(json.dumps(found | memory()), file=replies, flush=True)

    try:
        if kind == "litert":
            from conversion.bench_litert import LiteRtLm

            begun = time.perf_counter()
            model: Model = LiteRtLm(path, int(threads), last)
        else:
            from conversion.bench_llama import LlamaCpp

            begun = time.perf_counter()
            model = LlamaCpp(path, int(threads), int(last), bool(flash))
    except UserError as error:
        reply({"error": str(error)})
        return
    except ValueError as error:  # llama.cpp's
        reply({"error": f"llama.cpp cannot load {path} ({error}); write it again"})
        return
    reply({"load_s": time.perf_counter() - begun})
    for line in sys.stdin:
        order = json.loads(line)
        try:
            reply(getattr(model, order.pop("do"))(**order) or {})
        except (RuntimeError, ValueError) as error:
            reply({"error": f"{path} gave up ({error}); its context may be too short"})


if __name__ == "__main__":
    main(*sys.argv[1:])
