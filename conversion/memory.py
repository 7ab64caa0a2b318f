"""How much memory a process holds."""

from __future__ import annotations

import re
from pathlib import Path


def memory(pid: int | str = "self") -> dict[str, float]:
    """Resident memory of a process in GB (1e9 bytes): the `peak` so far, and now what is its own and what of files.

    Pages of a mapped file can be dropped and read again whenever memory is short; a process's own cannot. (The peak
    that getrusage tells would count what the process was forked from as well.)
    """
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    names = {"peak_rss_gb": "VmHWM", "anonymous_gb": "RssAnon", "files_gb": "RssFile"}
    return {name: int(found[key]) * 1024 / 1e9 for name, key in names.items()}
