"""Watches a run folder from outside: every loss that was ever logged, and every checkpoint that ever counted."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from moe_jax.train.catalogue import complete_steps, set_aside_names

_SECONDS = 0.02


class Witness:
    """Looks at the folder all the time, from a thread of its own; a context manager.

    `losses` is {step: loss} of all lines ever seen, also of those that a restart cut off; `differing` the steps
    that were logged with two losses; `step` the last line that stands; `lost` the checkpoints that vanished, although
    fewer than `keep` newer ones were complete, and the damaged ones that vanished.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.losses: dict[int, float] = {}
        self.differing: set[int] = set()
        self.lost: list[str] = []
        self.step = 0
        self._run, self._keep = run, keep
        self._file, self._offset = -1, 0
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

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        self._read_log()
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

    def _read_log(self) -> None:
        try:
            with (self._run / "metrics.jsonl").open("rb") as file:
                number = os.fstat(file.fileno()).st_ino
                if number != self._file:  # cut back by a restart, which writes it anew
                    self._file, self._offset, self.step = number, 0, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in map(json.loads, whole.splitlines()):
            self.step = line["step"]
            if self.losses.setdefault(line["step"], line["loss"]) != line["loss"]:
                self.differing.add(line["step"])
