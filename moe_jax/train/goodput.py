"""Goodput: the share of a run's wall time that went into steps, and what the rest went into."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

KINDS = ("step", "save", "restore", "compile", "data", "other")


class Goodput:
    """Wall time by what it went to; the kinds exclude each other: an inner one pauses the outer."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._kinds, self._since = ["other"], time.perf_counter()

    @contextlib.contextmanager
    def spent(self, kind: str | Callable[[], str]) -> Iterator[None]:
        """What runs inside counts as `kind`, which may be asked for when it has run."""
        self._settle()
        self._kinds.append(kind if isinstance(kind, str) else "other")
        try:
            yield
        finally:
            self._kinds[-1] = kind if isinstance(kind, str) else kind()
            self._settle()
            self._kinds.pop()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds since the start by kind, rounded to milliseconds."""
        self._settle()
        return {kind: round(seconds, 3) for kind, seconds in self._seconds.items()}

    def _settle(self) -> None:
        now = time.perf_counter()
        self._seconds[self._kinds[-1]] += now - self._since
        self._since = now
