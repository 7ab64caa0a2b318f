"""The stock LiteRT-LM engine on CPU, behind the few calls that chat, verification and measuring need.

Two habits of the engine (litert-lm-api 0.18.1) are dealt with here. A session puts the start token in front of
its first text by itself. And text scoring feeds the last token of the context again one position too early, over
the token before it; so texts are scored after a context of just the start token, written out, where the token
that is lost is the second of two equal ones and every position is right.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import litert_lm
import numpy as np
from litert_lm import interfaces

from conversion.kernel import register
from conversion.litert import container
from moe_jax.data.corpus import Message
from moe_jax.errors import UserError

GREEDY = interfaces.SamplerConfig(top_k=1, temperature=0.0)


class Engine:
    """A loaded bundle; use as a context manager. The weight cache keeps one packed copy for all signatures.

    `stop_tokens` end an answer; `start_text` is the text of the start token.
    """

    def __init__(
        self, path: str | Path, threads: int = 2, cache_dir: str | Path | None = None, measured: bool = False
    ):
        """Load the .litertlm at `path`; `cache_dir` is made when missing, and is temporary by default.

        `measured` makes the engine count tokens and seconds, as `prompt_tokens` needs.
        """
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
        self._scratch = None
        with container.intact(path):
            needed = register.needed(container.tflite(path))
        if needed:
            register.in_engine()
        if cache_dir is None:
            self._scratch = tempfile.TemporaryDirectory()
            cache_dir = self._scratch.name
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        if not needed:
            require_room(Path(cache_dir), Path(path))
        try:
            self._engine = litert_lm.Engine(
                str(path),
                backend=interfaces.CPU(thread_count=threads),
                cache_dir=str(cache_dir),
                enable_benchmark=measured,
            )
        except RuntimeError as error:
            raise UserError(f"LiteRT-LM cannot load {path} ({error}); export it again") from None
        self.stop_tokens = frozenset(ids[0] for ids in self._engine.eos_token_ids)
        start = self._engine.bos_token_id
        if start is None:
            raise UserError(f"{path} names no start token; export it again")
        self.start_text = self._engine.detokenize([start])

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the engine and a temporary cache."""
        self._engine.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without the start token; names of special tokens become those tokens."""
        return self._engine.tokenize(text)

    def token_text(self, token: int) -> str:
        """What the engine answers for a token: its text, or nothing for one that ends the answer."""
        return "" if token in self.stop_tokens else self._engine.detokenize([token])

    def conversation(
        self,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        history: Sequence[Message] = (),
    ) -> Any:
        """A conversation through the bundle's chat template, a context manager; `reply` talks in it.

        It goes on after `history`. Temperature 0 is greedy; `max_tokens` bounds each reply. An engine has room for
        one at a time.
        """
        chosen = interfaces.SamplerConfig(top_k=64, top_p=top_p, temperature=temperature, seed=seed)
        return self._engine.create_conversation(
            messages=list(history),
            sampler_config=chosen if temperature > 0 else GREEDY,
            max_output_tokens=max_tokens,
        )

    def prompt_tokens(self, prompt: str) -> tuple[list[int], int]:
        """What one user message becomes: ids of the rendered template, and how many tokens are really taken in.

        They differ by the start token, which the engine puts in front by itself.
        """
        with self.conversation(1) as conversation:
            rendered = conversation.render_message_to_string(prompt)
            list(reply(conversation, prompt))
            info = conversation.get_benchmark_info()
            return self.tokenize(rendered), info.last_prefill_token_count

    def next_token(self, prefix: str) -> str:
        """The likeliest token after the start token and `prefix` (not empty), as `token_text` writes it.

        Tokens that are no whole UTF-8 characters all read as U+FFFD and cannot be told apart.
        """
        with self._session(1) as session:
            _fits(session.run_prefill, [prefix])
            return session.run_decode().texts[0]

    def score(self, text: str) -> np.ndarray:
        """Log-likelihood in nats of each token of `text` (see `tokenize`) after the start token: float64 [S].

        The text must fit the bundle's context.
        """
        with self._session(1) as session:
            _fits(session.run_prefill, [self.start_text])
            return np.array(_fits(session.run_text_scoring, [text]).token_scores[0])

    def _session(self, max_tokens: int) -> interfaces.AbstractSession:
        return self._engine.create_session(
            apply_prompt_template=False, sampler_config=GREEDY, max_output_tokens=max_tokens
        )


def require_room(folder: Path, bundle: Path) -> None:
    """UserError where a bundle's packed weights, about as large as it, have no room: the engine would abort."""
    free, size = shutil.disk_usage(folder).free, bundle.stat().st_size
    if free < size and not any(folder.glob(f"{glob.escape(bundle.name)}_*")):
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, and the packed weights of {bundle} take {size / 1e9:.1f}; "
            "make room, or name another place (--cache, or TMPDIR in the environment)"
        )


def reply(conversation: Any, message: str) -> Iterator[str]:
    """Pieces of the reply to a user message, as they come; UserError where it does not fit the context."""
    try:
        for piece in conversation.send_message_async(message):
            yield "".join(part.text for part in piece.contents if hasattr(part, "text"))
    except RuntimeError as error:
        raise UserError(
            f"the engine stopped ({error}); the conversation may be longer than the bundle's context, so start "
            "another or export with a larger --context"
        ) from None


def _fits(call: Callable[[list[str]], Any], texts: list[str]) -> Any:
    try:
        return call(texts)
    except RuntimeError as error:
        raise UserError(
            f"the engine refused {texts[0][:20]!r}... ({error}); it must be shorter than the bundle's context"
        ) from None
