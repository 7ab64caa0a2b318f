"""Which errors pass by themselves: a bucket that does not answer is nobody's mistake, and a restart may find it.

gcsfs, its HTTP client and tensorstore raise errors of many kinds for that. They are told by their names, because
those packages are imported only where there is a bucket.
"""

from __future__ import annotations

import re
from traceback import walk_tb

from moe_jax.errors import UserError

_CODES = {"401", "408", "429", *map(str, range(500, 505))}  # as gcsfs tries again; 401 is a token that ran out
_KINDS = {
    "aiohttp": {"ClientError"},
    "requests": {"ConnectionError", "Timeout", "ChunkedEncodingError", "ContentDecodingError"},
    "google": {"TransportError", "RefreshError", "ServerError", "TooManyRequests", "RetryError"},
}
_TENSORSTORE = re.compile("(UNAVAILABLE|DEADLINE_EXCEEDED)\\b")
_FORBIDDEN = "Forbidden: "  # how gcsfs begins an OSError without a number where access is denied


def passes(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, may be gone when the same is tried later.

    A UserError says in its own words what it was raised beside.
    """
    while error is not None:
        if _passes(error):
            return True
        error = error.__cause__ or (error.__context__ if isinstance(error, UserError) else None)
    return False


def is_denied(error: BaseException) -> bool:
    """Whether a bucket denied the access."""
    return isinstance(error, OSError) and error.errno is None and str(error).startswith(_FORBIDDEN)


def _passes(error: BaseException) -> bool:
    if getattr(error, "passes", False):  # noted by another process
        return True
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if code is not None and any(package in ("gcsfs", "aiohttp") for package, _ in kinds):
        return str(code) in _CODES
    if any(name in _KINDS.get(package, ()) for package, name in kinds):
        return True
    if isinstance(error, TimeoutError):  # asyncio's, which gcsfs lets through
        return any(
            frame.f_globals.get("__name__", "").startswith("gcsfs.") for frame, _ in walk_tb(error.__traceback__)
        )
    return isinstance(error, ValueError) and bool(_TENSORSTORE.match(str(error)))
