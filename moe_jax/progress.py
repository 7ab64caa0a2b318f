"""How long something will still take and how large it is, in the same words everywhere."""

from __future__ import annotations

import sys
import time


def time_left(seconds: float) -> str:
    """`3:05 left`, or `1:03:05 left`."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"


def file_size(count: float) -> str:
    """`999 bytes`, `1.5 kB`, `3.0 GB`: three digits at most before the unit, which is a power of 1000."""
    if count < 1000:
        return f"{count:.0f} bytes"
    size = count / 1000
    for unit in ("kB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


class Progress:
    """A line on standard error every few seconds; none for what is done at once."""

    def __init__(self, what: str, every: float = 3.0) -> None:
        self._what, self._every, self._begin = what, every, time.monotonic()
        self._said = self._begin

    def __call__(self, done: float, total: float) -> None:
        """Say how much of `total` bytes is done, if the last line is old enough."""
        now = time.monotonic()
        if now - self._said < self._every:
            return
        self._said, left = now, (now - self._begin) * (total - done) / max(done, 1)
        text = f"{self._what}: {done / total:.0%} of {file_size(total)}, {time_left(left)}"
        print(text, file=sys.stderr, flush=True)
