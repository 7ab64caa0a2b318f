"""What git says of this code, where it is in a repository and not merely installed below one."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def git(*words: str) -> str:
    """The output of a git command in the code's folder; nothing without git, or where it tracks no file of it."""
    return _output(*words) if _output("ls-files", "--error-unmatch", "--", ".") else ""


def _output(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.decode(errors="replace")
