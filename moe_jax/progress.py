"""How long something will still take, in the same words everywhere."""

from __future__ import annotations


def time_left(seconds: float) -> str:
    """`3:05 left`, or `1:03:05 left`."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"
