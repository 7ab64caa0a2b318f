"""The terminal chat: commands, a stopped answer, and which experts ran."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import closing

import pytest
import torch

from conversion.__main__ import main
from conversion.chat import _Talk, chat
from conversion.chat_experts import Experts, Used, strips
from conversion.torch_model import MobileMoE, Reference
from moe_jax.data import chat as format_of
from moe_jax.errors import INTERRUPTED, UserError
from tests.conversion.conftest import CONTEXT

KINDS = pytest.mark.parametrize("exported", ["moe"], indirect=True)
QUICK = {"max_tokens": 4, "threads": 1}


@KINDS
def test_clear_forgets_and_quit_ends(exported, capsys):
    once = chat(exported.bundle, ["add"], **QUICK)
    replies = chat(exported.bundle, ["add", "more", "/clear", "/help", "add", "/quit", "add"], **QUICK)
    assert len(replies) == 3 and replies[0] == replies[2] == once[0]
    assert "/clear" in capsys.readouterr().err


@KINDS
def test_packed_weights_are_kept_where_a_cache_is_named(exported, tmp_path):
    first = chat(exported.bundle, ["add"], cache=tmp_path, **QUICK)
    (packed,) = tmp_path.iterdir()
    written = packed.stat().st_mtime_ns
    assert chat(exported.bundle, ["add"], cache=tmp_path, **QUICK) == first
    assert packed.stat().st_mtime_ns == written


class Interrupting(io.StringIO):
    """An output that raises SIGINT when the first piece of an answer arrives."""

    rung = False

    def write(self, text: str) -> int:
        if not self.rung:
            self.rung = True
            signal.raise_signal(signal.SIGINT)  # in this thread: an engine thread would be late when busy
        return super().write(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch, *lines: str) -> None:
    """Let these lines be typed at a terminal, then Ctrl-D."""
    waiting = iter(lines)

    def read(_: str) -> str:
        if (line := next(waiting, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)


@KINDS
def test_ctrl_c_stops_an_answer_and_the_next_is_given(exported, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        typed(patched, "add", "more")
        patched.setattr(sys, "stdout", Interrupting())
        stopped, after = chat(exported.bundle, max_tokens=40, threads=1)
    assert len(stopped) < len(chat(exported.bundle, ["add"], max_tokens=40, threads=1)[0]) and after
    assert "(stopped)" in capsys.readouterr().err


@KINDS
def test_ctrl_c_in_an_answer_to_no_terminal_ends_the_command(exported, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Interrupting())
    assert main(["chat", str(exported.bundle), "--prompt", "add", "--threads", "1"]) == INTERRUPTED


@KINDS
def test_ctrl_c_while_a_piped_line_is_awaited_ends_the_command(exported, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("builtins.input", lambda _: signal.raise_signal(signal.SIGINT))
    assert main(["chat", str(exported.bundle), "--threads", "1"]) == INTERRUPTED


@KINDS
def test_a_stopped_answer_is_kept_after_all_that_was_said_before(exported, monkeypatch):
    with closing(_Talk(exported.bundle, 1, max_tokens=4)) as talk:
        first = talk.answer("a", at_terminal=True)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", Interrupting())
            stopped = talk.answer("b", at_terminal=True)
        said = [("user", "a"), ("assistant", first), ("user", "b"), ("assistant", stopped)]
        assert [(turn["role"], turn["content"]) for turn in talk.history] == said
        assert talk.replies == [first, stopped]
        talk.clear()
        assert talk.history == []


class Watching(Reference):
    """Keeps the experts that the torch model chooses."""

    def experts(self, h, ids, weights, name):
        self.chosen = {**getattr(self, "chosen", {}), name: ids}
        return super().experts(h, ids, weights, name)


@KINDS
def test_the_experts_shown_are_those_that_the_torch_model_chooses(exported):
    answer = "def add(first, second):"
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": answer}]
    with Experts(exported.bundle, threads=1) as experts:
        assert (experts.layers, experts.count) == (2, 5)
        used = experts.of_answer(messages)
        again = experts.of_answer(messages)  # the same conversation, taken in from where it differs
    assert used == again and "".join(token.text for token in used) == answer
    watching = Watching(exported.weights)
    asked = format_of.render_ids(messages[:1], exported.tokenizer, generation_prompt=True)[0].tolist()
    ids = [*asked, *exported.tokenizer.encode(answer)]
    MobileMoE(exported.weights, watching, CONTEXT)(torch.tensor([ids], dtype=torch.int32))
    want = [
        [sorted(set(chosen[place].tolist())) for chosen in watching.chosen.values()]
        for place in range(len(asked), len(ids))
    ]
    same = [
        a == b for token, choice in zip(used, want, strict=True) for a, b in zip(token.experts, choice, strict=True)
    ]
    assert sum(same) >= 0.95 * len(same)  # a tie may fall the other way


@KINDS
def test_ctrl_c_while_experts_are_drawn_leaves_the_conversation_as_it_was(exported, monkeypatch, capsys):
    decode, seen = Experts._decode, []

    def interrupted(self, token):
        seen.append(token)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return decode(self, token)

    monkeypatch.setattr(Experts, "_decode", interrupted)
    with monkeypatch.context() as patched:
        typed(patched, "add", "add")
        replies = chat(exported.bundle, show_experts=True, **QUICK)
    said = capsys.readouterr()
    assert len(replies) == 2 and said.err.count("(stopped)") == 1 and said.err.count("expert 0 to 4") == 1
    assert "expert 0" not in said.out
    monkeypatch.setattr(Experts, "_decode", decode)
    turns = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "def add(first"}]
    with Experts(exported.bundle, threads=1) as experts, Experts(exported.bundle, threads=1) as other:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            seen.clear()
            patched.setattr(Experts, "_decode", interrupted)
            experts.of_answer(turns)
        assert experts.of_answer(turns) == other.of_answer(turns)


@pytest.mark.parametrize("bytes_io", ["strict", "surrogateescape"])
@KINDS
def test_a_line_that_is_no_text_is_told(exported, monkeypatch, bytes_io):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8", bytes_io))
    with pytest.raises(UserError, match="not UTF-8"):
        chat(exported.bundle, **QUICK)


def test_strips_show_tokens_across_and_layers_down():
    drawn = strips([Used("a", [[0, 1], [0, 2]]), Used("b", [[1, 2], [0, 2]])], 4).splitlines()
    assert drawn[1] == "'a'          █▒▒ " and drawn[2] == "'b'          ▒▒█ "
    assert drawn[4] == "0            ▒█▒ " and drawn[5] == "1            █ █ "
    assert drawn[6] == "5 of 8 experts ran; a token keeps 75% of the experts of the one before"


@pytest.mark.parametrize("exported", ["dense"], indirect=True)
def test_a_model_without_experts_has_none_to_show(exported):
    with pytest.raises(UserError, match="leave out --show-experts"):
        Experts(exported.bundle, threads=1)


def test_without_a_standard_input_prompts_are_asked_for(exported, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="no standard input to read prompts from; give them with --prompt"):
        chat(exported.bundle)
