"""Processes of a test's own, to hold, write and be killed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Holds the run folder of its first argument until it is killed; a second argument sets the seconds between beats.
HOLD = """
from moe_jax import run_lock
run_lock.BEAT_SECONDS = float(sys.argv[2]) if sys.argv[2:] else run_lock.BEAT_SECONDS
with run_lock.exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def child(script: str, *arguments: object) -> Iterator[subprocess.Popen]:
    """A Python process that has said its first line; it is killed at the end."""
    command = [sys.executable, "-c", f"import sys\n{script}", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()
