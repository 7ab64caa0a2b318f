"""How fast a bundle reads and writes in the stock engine and what memory it holds, against the alternatives.

All models run in one run and take turns, round by round, because a machine's speed drifts; figures are medians.
Text is real and each piece another: which experts work, and so which weights are read, depends on it.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from conversion.bench_process import Candidate, Texts
from conversion.readback import Sections, sections
from moe_jax.errors import UserError
from moe_jax.progress import time_left

PREFILL, CONTEXTS = (128, 512, 1024), (256, 1024, 4096, 8192)
# As llama-bench does. Each answer first costs LiteRT-LM 0.18.1 some 30 ms (Tasks::Decode lists a vocabulary of
# 128,256 to learn its size), which in answers of 32 tokens was 10 to 15 % of a token of size S.
DECODE = 128
_TOUCH = 4  # tokens read between two measurements of writing; an engine writes only after it has read
_WRITTEN = 6  # about what a token that is written costs over one that is read
_SILENCE = 3.0  # seconds between two words on the progress
Figures = dict[str, Any]
Series = defaultdict[str, defaultdict[int, list[float]]]


def bench(
    bundle: str | Path,
    against: str | Path | None = None,
    llama_cpp: str | Path | None = None,
    *,
    threads: int = 2,
    prefill: Sequence[int] = (),
    contexts: Sequence[int] = (),
    text: str = "stdlib:heldout",
    texts: int = 3,
    decode: int = 0,
    cache: str | Path | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Figures:
    """Measure a bundle, another one and a .gguf, each figure at the best number of threads from 1 to `threads`.

    `decode_tok_s` {context: tokens/s}, the last of the tokens written being the context's last; `prefill_tok_s` and
    `ttft_by_prompt_s` {prompt tokens: ...} on an empty context; `ttft_s` at the longest prompt; `load_s` with and
    `first_load_s` without packed weights in the `cache` folder (a temporary one by default); `peak_rss_gb`, and
    how much was at most the process's own or pages of files. `by_threads` has what each number of threads gave,
    `against` and `llama_cpp` the same for the others with `ratio`, ours over theirs.

    Each median is over `texts` pieces of the text (a path, a glob or a part of the embedded corpus), of `decode`
    tokens where they are written, by default DECODE or half of the shortest context. Prompts and contexts default
    to what of PREFILL and CONTEXTS fits the bundles.
    Raises UserError for unreadable files or text, other tokenizers, or too long prompts.
    """
    parts = [sections(path) for path in (bundle, against) if path is not None]
    limit = min(part.metadata.max_num_tokens for part in parts)
    prefill = sorted(prefill) or [n for n in PREFILL if n < limit] or [limit // 2]
    contexts = sorted(contexts) or [n for n in CONTEXTS if n <= limit] or [limit]
    if prefill[0] < 2 or max(prefill) >= limit or max(contexts) > limit:
        raise UserError(f"prompts {prefill} or contexts {contexts} go below 2 or beyond the context of {limit}")
    decode = decode or min(DECODE, contexts[0] // 2)
    if not 0 < decode < contexts[0] - _TOUCH - 1:
        raise UserError(f"a context of {contexts[0]} does not hold answers of {decode} tokens; lower --decode")
    if llama_cpp is not None:
        _require_llama(llama_cpp)
    cut = Texts(text, parts[0].tokenizer)
    prompts = cut.prompts(prefill[-1], texts)  # what is wrong with the text is told before anything is loaded
    # Vocabularies may differ in size: what counts is that both read the same tokens.
    if any(len({_ids(part, prompt["text"]) for part in parts}) > 1 for prompt in prompts):
        raise UserError(f"the tokenizers of {against} and {bundle} cut text differently; compare others")
    work = _Work(cut, prefill, contexts, texts, decode, say)
    with ExitStack() as stack:
        folder = Path(cache) if cache else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        every: dict[str, list[Candidate]] = {}
        first = {}
        for name, path in (("own", bundle), ("against", against)):
            if path is not None:
                say(f"loading {path}")
                with Candidate("litert", path, threads, str(folder)) as packing:
                    first[name] = {"first_load_s": packing.load_s}
                start = (Candidate("litert", path, n, str(folder)) for n in range(1, threads + 1))
                every[name] = [stack.enter_context(candidate) for candidate in start]
        if llama_cpp is not None:
            say(f"loading {llama_cpp}")
            kinds = [(n, flash) for n in range(1, threads + 1) for flash in ("", "flash")]
            longest = str(max(*contexts, *prefill))
            start = (Candidate("llama", llama_cpp, n, longest, flash) for n, flash in kinds)
            every["llama_cpp"] = [stack.enter_context(candidate) for candidate in start]
        found = work.run([candidate for group in every.values() for candidate in group])
        result = {name: _best([found[c] for c in group]) | first.get(name, {}) for name, group in every.items()}
    own = result.pop("own")
    for other in result.values():
        other["ratio"] = _ratio(own, other)
    settings = {"texts": texts, "decode_tokens": decode, "text": text, "threads": threads}
    return own | result | {"settings": settings, "speed": _summary(own, result.get("against"))}


def _ids(part: Sections, text: str) -> tuple[int, ...]:
    return part.tokenizer.bos, *part.tokenizer.encode(text)


def _require_llama(path: str | Path) -> None:
    if find_spec("llama_cpp") is None:
        raise UserError("llama.cpp's package is not installed; pip install -r requirements/gguf.txt")
    if not Path(path).is_file():
        raise UserError(f"there is no {path}; make it with 'python -m conversion gguf'")


class _Work:
    """What every candidate does, and how much of it is left."""

    def __init__(self, texts: Texts, prefill: Any, contexts: Any, rounds: int, decode: int, say: Any) -> None:
        self._texts, self._prefill, self._contexts = texts, prefill, contexts
        self._rounds, self._decode, self._say = rounds + 1, decode, say  # the first round only warms up

    def run(self, candidates: Sequence[Candidate]) -> dict[Candidate, Figures]:
        """Measure all; {candidate: its medians}."""
        written = self._rounds * self._decode * _WRITTEN
        steps = ((end - begun + written) * _effort(end) for begun, end in pairwise([0, *self._contexts]))
        self._all = len(candidates) * (self._rounds * sum(self._prefill) + sum(steps))
        self._done, self._begun = 0.0, time.monotonic()
        self._said = self._begun
        found: dict[Candidate, Series] = {c: defaultdict(lambda: defaultdict(list)) for c in candidates}
        for length in self._prefill:
            for number, prompt in enumerate(self._texts.prompts(length, self._rounds)):
                for candidate in candidates:
                    reply = candidate.ask("prefill", **prompt)
                    if number:
                        found[candidate]["prefill_tok_s"][length].append(reply["tokens"] / reply["seconds"])
                        found[candidate]["ttft_by_prompt_s"][length].append(reply["ttft"])
                    self._tell(length, f"prompts of {length}")
        self._ask(candidates, 0, "start", decode=self._decode)
        turn = self._decode + _TOUCH
        for begun, context in pairwise([0, *self._contexts]):
            # One text for all rounds, because the way is long, or where they do not fit one for each.
            goal = context - self._rounds * turn
            prompts = self._texts.prompts(context - turn, self._rounds) if goal <= begun else []
            for piece in [] if prompts else self._texts.way(begun, goal - begun):
                self._ask(candidates, context, "read", **piece)
            for number, piece in enumerate(self._texts.pieces(_TOUCH, self._rounds)):
                if prompts:
                    self._ask(candidates, context, "start", decode=self._decode)
                    self._ask(candidates, context, "read", **prompts[number])
                ids = self._texts.pieces(self._decode, self._rounds)[number]["ids"]
                for candidate in candidates:
                    candidate.ask("read", **piece)
                    reply = candidate.ask("write", ids=ids)
                    if number and reply["seconds"]:
                        found[candidate]["decode_tok_s"][context].append(reply["tokens"] / reply["seconds"])
                    self._tell(self._decode * _WRITTEN * _effort(context), f"writing at context {context}")
            if silent := [c.path for c, figures in found.items() if not figures["decode_tok_s"][context]]:
                raise UserError(f"{silent[0]} wrote nothing at context {context}; ask for more --texts")
        return {candidate: _medians(candidate, figures) for candidate, figures in found.items()}

    def _ask(self, candidates: Sequence[Candidate], context: int, do: str, **order: Any) -> None:
        for candidate in candidates:
            candidate.ask(do, **order)
            self._tell(len(order.get("ids", ())) * _effort(context), f"on the way to context {context}")

    def _tell(self, tokens: float, what: str) -> None:
        self._done += tokens
        now = time.monotonic()
        if now - self._said > _SILENCE:
            self._said = now
            left = (now - self._begun) * max(self._all / self._done - 1, 0)
            self._say(f"{what} ({time_left(left)})")


def _effort(context: int) -> float:
    """About what a token at a context costs over one at the start."""
    return 1 + context / 4096


def _medians(candidate: Candidate, found: Series) -> Figures:
    figures: Figures = {name: {n: median(v) for n, v in series.items()} for name, series in found.items()}
    return figures | {"threads": candidate.threads, "load_s": candidate.load_s, **candidate.memory}


def _best(candidates: Sequence[Figures]) -> Figures:
    """Each speed at the best number of threads; memory and load time of whoever writes fastest at the end."""
    speeds = {"decode_tok_s": max, "prefill_tok_s": max, "ttft_by_prompt_s": min}
    best: Figures = {"threads": {}}
    for name, choose in speeds.items():
        lengths = candidates[0].get(name, {})
        best[name] = {n: choose(c[name][n] for c in candidates) for n in lengths}
        best["threads"][name] = {
            n: next(c["threads"] for c in candidates if c[name][n] == best[name][n]) for n in lengths
        }
    best["ttft_s"] = best["ttft_by_prompt_s"][max(best["ttft_by_prompt_s"])]
    rest = max(candidates, key=lambda c: c["decode_tok_s"][max(c["decode_tok_s"])])
    return best | {n: v for n, v in rest.items() if n not in best} | {"by_threads": list(candidates)}


def _ratio(own: Figures, other: Figures) -> Figures:
    """Ours over theirs."""
    tables = {n: {k: own[n][k] / other[n][k] for k in own[n]} for n in ("decode_tok_s", "prefill_tok_s")}
    return tables | {n: own[n] / other[n] for n in ("ttft_s", "peak_rss_gb", "load_s")}


def _summary(own: Figures, other: Figures | None) -> Figures:
    """One figure of each kind, at the shortest context and prompt, under flat names."""
    speed: Figures = {}
    for kind in ("decode", "prefill"):
        values = own[f"{kind}_tok_s"]
        speed[f"{kind}_tok_s"] = values[min(values)]
        if other:
            speed[f"dense_{kind}_tok_s"] = other[f"{kind}_tok_s"][min(values)]
            speed[f"{kind}_speedup"] = other["ratio"][f"{kind}_tok_s"][min(values)]
    return speed


def table(result: Figures) -> str:
    """The figures side by side, a line each; behind a speed the number of threads that gave it."""
    names = {"against": "against", "llama_cpp": "llama.cpp"}
    others = [name for name in names if name in result]
    heads = ["file", *(head for name in others for head in (names[name], "ratio"))]
    lines = [f"{'':26}" + "".join(f"{head:>14}" for head in heads)]
    rows = [(f"prefill {n}, tokens/s", "prefill_tok_s", n) for n in result["prefill_tok_s"]]
    rows += [(f"decode at {n}, tokens/s", "decode_tok_s", n) for n in result["decode_tok_s"]]
    rows += [(f"first token of {n}, s", "ttft_by_prompt_s", n) for n in result["ttft_by_prompt_s"]]
    labels = {"load_s": "load, s", "peak_rss_gb": "peak memory, GB", "anonymous_gb": "  its own, GB"}
    labels |= {"files_gb": "  pages of files, GB"}
    rows += [(label, name, 0) for name, label in labels.items()]
    for label, name, n in rows:
        cells = []
        for figures in (result, *(result[other] for other in others)):
            value = figures[name][n] if n else figures[name]
            threads = figures["threads"].get(name, {}).get(n)
            shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            cells.append(shown + (f" ({threads})" if threads else ""))
            if figures is not result:
                own = result[name][n] if n else result[name]
                cells.append(f"{own / value:.2f}x" if value else "")
        lines.append(f"{label:26}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
