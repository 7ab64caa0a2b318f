"""Which experts the tokens of an answer used, as strips of characters.

The engine does not tell, so the conversation runs once more in the same runtime on the same file, whose record
names the graph of every expert that ran: the choice is exact, made by the arithmetic that answers. It costs another
copy of packed weights and cache and, because of the record, some 15 us for every branch of every token.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ai_edge_litert import schema_py_generated as schema

from conversion.bench_runtime import Runtime
from conversion.litert.container import entries, intact
from conversion.litert.engine import require_room
from conversion.readback import sections
from moe_jax.data import chat
from moe_jax.data.corpus import Message
from moe_jax.errors import UserError

_EXPERT = re.compile(r"model\.layers\.(\d+)\..+/(\d+)_x1")  # the graph of an expert for one token
_SHADES = " ░▒▓█"


class Used(NamedTuple):
    """A token of an answer and the experts that ran for it: sorted ids of each layer."""

    text: str
    experts: list[list[int]]


class Experts:
    """Follows a conversation; use as a context manager."""

    def __init__(self, bundle: str | Path, threads: int) -> None:
        """UserError where no graphs of single experts are in the file."""
        parts = sections(bundle)
        with intact(bundle):
            graphs = entries(schema.Model.GetRootAs(parts.tflite, 0), "Subgraphs")
            names = [(graph.Name() or b"").decode() for graph in graphs]
        matches = {i: found for i, name in enumerate(names) if (found := _EXPERT.fullmatch(name))}
        if not matches:
            raise UserError(
                f"{bundle} has no experts that can be seen to run (a dense model, or one op for all of them); "
                "leave out --show-experts"
            )
        self._graphs = {i: (int(found[1]), int(found[2])) for i, found in matches.items()}
        self.layers, self.count = (max(pair[at] for pair in self._graphs.values()) + 1 for at in (0, 1))
        self._tokenizer, self._room = parts.tokenizer, parts.metadata.max_num_tokens
        self._folder = tempfile.TemporaryDirectory()
        require_room(Path(self._folder.name), Path(bundle))
        with intact(bundle):
            self._runtime = Runtime(parts.tflite, threads, Path(self._folder.name, "weights"))
        self._taken: list[int] = []

    def __enter__(self) -> Experts:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def of_answer(self, messages: Sequence[Message]) -> list[Used]:
        """The tokens of the last message, an answer, as the tokenizer cuts it, as far as the context goes."""
        asked = chat.render_ids(messages[:-1], self._tokenizer, generation_prompt=True)[0].tolist()
        same = next((i for i, (a, b) in enumerate(zip(asked, self._taken, strict=False)) if a != b), None)
        same = min(len(asked), len(self._taken)) if same is None else same
        self._runtime.tokens = same  # later positions are written anew before anything looks at them
        self._taken = asked[:same]  # what an interrupt leaves of it
        self._runtime.prefill(asked[same:])
        self._taken = asked
        answer = self._tokenizer.encode(messages[-1]["content"])[: self._room - len(asked)]
        return [Used(self._tokenizer.decode([token]), self._decode(token)) for token in answer]

    def _decode(self, token: int) -> list[list[int]]:
        with self._runtime.profiled() as record:
            self._runtime.decode(token)
        self._taken.append(token)
        ran = {self._graphs[e.graph] for e in record if e.name == "Invoke" and e.graph in self._graphs}
        return [sorted(e for at, e in ran if at == layer) for layer in range(self.layers)]


def strips(used: Sequence[Used], count: int) -> str:
    """A line for each token and one for each layer, a column for each of `count` experts.

    A token's shades say in how many of the layers an expert ran for it, a layer's for how many of the tokens.
    """
    lines = [f"{'token':12} expert 0 to {count - 1}, darker: chosen in more layers"]
    for token in used:
        chosen = Counter(e for layer in token.experts for e in layer)
        lines.append(f"{token.text!r:12.12} {_strip(chosen, count)}")
    lines.append(f"{'layer':12} darker: chosen for more tokens")
    every = list(zip(*(token.experts for token in used), strict=True))
    for number, tokens in enumerate(every):
        lines.append(f"{number:<12} {_strip(Counter(e for ids in tokens for e in ids), count)}")
    hit = sum(len({e for ids in tokens for e in ids}) for tokens in every)
    kept = [len(set(one) & set(two)) / max(len(two), 1) for tokens in every for one, two in pairwise(tokens)]
    share = f"; a token keeps {sum(kept) / len(kept):.0%} of the experts of the one before" if kept else ""
    lines.append(f"{hit} of {len(every) * count} experts ran{share}")
    return "\n".join(lines)


def _strip(counts: Counter[int], count: int) -> str:
    most = max(counts.values(), default=1)
    return "".join(_SHADES[-(-counts[e] * (len(_SHADES) - 1) // most)] for e in range(count))
