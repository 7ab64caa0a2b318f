"""How long something will still take and how large it is, in the same words everywhere."""

from __future__ import annotations


def time_left(seconds: float) -> str:
    """`3:05 left`, or `1:03:05 left`."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left"


def file_size(count: int) -> str:
    """`999 bytes`, `1.5 kB`, `3.0 GB`: three digits at most before the unit, which is a power of 1000."""
    if count < 1000:
        return f"{count} bytes"
    size = count / 1000
    for unit in ("kB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
