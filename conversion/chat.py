"""Talking to a bundle in the stock LiteRT-LM engine: one question, or a conversation in the terminal.

What the model says goes to standard output, piece by piece; all else (speeds, help, mistakes) to standard error, so
that answers can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conversion.command_options import say
from conversion.litert.engine import Engine, reply
from moe_jax.data.corpus import Message
from moe_jax.errors import UserError

_HELP = """\
/clear   forget the conversation
/help    this
/quit    leave, as Ctrl-D does
Ctrl-C stops an answer; any other line is a message."""


def chat(
    bundle: str | Path,
    prompts: Iterable[str] | None = None,
    *,
    threads: int = 2,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    show_experts: bool = False,
    cache: str | Path | None = None,
) -> list[str]:
    """Answer the prompts, which are turns of one conversation, as they come: prints and returns the replies.

    Without `prompts` they are read from the standard input: with a prompt sign, speeds and patience for mistakes if
    that is a terminal. `show_experts` draws the experts of each answer's tokens; `cache`, a temporary folder by
    default, keeps packed weights. Raises UserError for what is no bundle or, outside a terminal, too long for it.
    """
    if prompts is None and sys.stdin is None:
        raise UserError("there is no standard input to read prompts from; give them with --prompt")
    at_terminal = prompts is None and sys.stdin.isatty()
    with ExitStack() as stack:
        if at_terminal:
            say(f"loading {bundle}")
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        talk = _Talk(bundle, threads, cache, max_tokens=max_tokens, **sampling)
        stack.enter_context(talk)
        experts: Any = None
        if show_experts:
            from conversion.chat_experts import Experts

            experts = stack.enter_context(Experts(bundle, threads))
        if at_terminal:
            say(f"{threads} thread(s); /help lists the commands")
        for line in _lines(at_terminal) if prompts is None else prompts:
            if line == "/quit":
                break
            if line == "/clear":
                talk.clear()
            elif line.startswith("/") and " " not in line:
                say(_HELP)
            else:
                try:
                    answer = talk.answer(line, at_terminal)
                except UserError as error:
                    if not at_terminal:
                        raise
                    say(f"{error}; /clear starts another")
                    continue
                if experts and answer:
                    _show(experts, talk.history, at_terminal)
        return talk.replies


class _Talk(Engine):
    """A conversation that can be interrupted and cleared."""

    def __init__(self, bundle: str | Path, threads: int, cache: str | Path | None = None, **options: Any) -> None:
        """Load the bundle; `options` as `Engine.conversation`."""
        super().__init__(bundle, threads, cache, measured=True)
        self._options = options
        self.replies: list[str] = []
        self._open = ExitStack()
        self._begin([])

    def close(self) -> None:
        """End the conversation and free the engine."""
        self._open.close()
        super().close()

    def clear(self) -> None:
        """Forget what was said."""
        self._begin([])

    def _begin(self, history: list[Message]) -> None:
        self._open.close()  # the engine has room for one
        self.history = history
        self._talk = self._open.enter_context(self.conversation(history=history, **self._options))

    def answer(self, message: str, at_terminal: bool) -> str:
        """Print the reply as it comes; Ctrl-C ends it, and in a terminal, where its speed follows, nothing else."""
        begun, first, answer, stopped = time.perf_counter(), 0.0, "", False
        try:
            for piece in reply(self._talk, message):
                first = first or time.perf_counter() - begun
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self._talk.cancel_process()
            if not at_terminal:
                print(flush=True)
                raise
            stopped = True
        print(flush=True)
        self.replies.append(answer)
        turn: list[Message] = [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
        if stopped:
            say("(stopped)")
            self._begin(self.history + turn)  # a cancelled conversation answers no more
            return answer
        self.history += turn
        if at_terminal:
            info, seconds = self._talk.get_benchmark_info(), time.perf_counter() - begun
            speed = f"{info.last_decode_tokens_per_second:.1f} tokens/s, first after {first:.2f} s"
            say(f"({info.last_decode_token_count} tokens in {seconds:.1f} s: {speed})")
        return answer


def _show(experts: Any, history: list[Message], at_terminal: bool) -> None:
    from conversion.chat_experts import strips

    begun = time.perf_counter()
    try:
        used = experts.of_answer(history)
    except KeyboardInterrupt:
        if not at_terminal:
            raise
        say("(stopped)")
        return
    if used:
        say(strips(used, experts.count))
    say(f"({len(used)} tokens run again in {time.perf_counter() - begun:.1f} s to see their experts)")


def _lines(at_terminal: bool) -> Iterator[str]:
    """Lines that say something; in a terminal with editing and a history of its own."""
    if at_terminal:
        import readline  # noqa: F401 (input() uses it once it is there)
    while True:
        try:
            line = input("> " if at_terminal else "").strip()
            line.encode()
        except EOFError:
            return
        except UnicodeError:  # in some locales it is read as halves of surrogate pairs
            raise UserError("a line of the standard input is not UTF-8; convert it") from None
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            say("\n/quit or Ctrl-D leaves")
            continue
        if line:
            yield line
