"""Talking to a bundle in the stock LiteRT-LM engine: one question, or a conversation until the input ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from conversion.litert.engine import Engine


def chat(
    bundle: str | Path,
    prompts: Iterable[str],
    *,
    threads: int = 2,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Answer the prompts, which are turns of one conversation, as they come; prints and returns the replies.

    Raises UserError for what is no bundle.
    """
    replies = []
    sampling = max_tokens, temperature, top_p, seed
    with Engine(bundle, threads) as engine, engine.conversation(*sampling) as say:
        for prompt in prompts:
            reply = ""
            for piece in say(prompt):
                reply += piece
                print(piece, end="", flush=True)
            print()
            replies.append(reply)
    return replies
