"""Watches a run folder from outside: every loss that was ever logged, and every checkpoint that ever counted."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from moe_jax.train.catalogue import complete_steps, set_aside_names

_SECONDS = 0.02


class Witness:
    """Looks at the folder all the time, from a thread of its own; a context manager.

    `losses` is {step: loss} of all lines ever seen, also of those that a restart cut off; `differing` the steps
    that were logged with two losses; `step` the last line that stands; `events` all of events.jsonl; `lost` the
    checkpoints that vanished although fewer than `keep` newer ones were complete, and damaged ones that vanished.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.losses: dict[int, float] = {}
        self.differing: set[int] = set()
        self.lost: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.step = 0
        self._run, self._keep = run, keep
        self._metrics, self._history = _Tail(run / "metrics.jsonl"), _Tail(run / "events.jsonl")
        self._complete: set[int] = set()
        self._aside: set[str] = set()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Witness:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def named(self, event: str) -> list[dict[str, Any]]:
        """The events of one name."""
        return [entry for entry in list(self.events) if entry["event"] == event]

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        lines = self._metrics.read()
        if self._metrics.is_new:  # cut back by a restart, which writes the file anew
            self.step = 0
        for line in lines:
            self.step = line["step"]
            if self.losses.setdefault(line["step"], line["loss"]) != line["loss"]:
                self.differing.add(line["step"])
        self.events += self._history.read()
        complete, aside = set(complete_steps(self._run)), set(set_aside_names(self._run))
        if self._complete - complete or self._aside - aside:
            # Listed again: a listing may miss what is renamed while it is made.
            complete |= set(complete_steps(self._run))
            aside |= set(set_aside_names(self._run))
        for step in self._complete - complete:
            moved = any(name.startswith(f"{step}.") for name in aside)
            if not moved and sum(newer > step for newer in complete) < self._keep:
                self.lost.append(str(step))
        self.lost += self._aside - aside
        self._complete, self._aside = complete, aside


class _Tail:
    """New whole lines of a JSON lines file; `is_new` says that the last `read` found another file in its place."""

    def __init__(self, path: Path) -> None:
        self.is_new = False
        self._path, self._file, self._offset = path, -1, 0

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                self.is_new = number != self._file
                if self.is_new:
                    self._file, self._offset = number, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
