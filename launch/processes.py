"""One attempt at a run: its processes on this machine, what they say, and how each of them ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

from moe_jax.command_line import drop_output

# In the child before its program: SIGKILL when the parent dies (PR_SET_PDEATHSIG), and now if it has died already.
# A program of its own, as code between fork and exec may deadlock where threads run.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
_CHATTER = "[Gloo] "  # how many peers it has, for each of its many groups; kept in the log alone
_PRINTING = threading.Lock()


class Ended(NamedTuple):
    """A process has ended; `status` is negative where a signal ended it."""

    process: int
    status: int

    @property
    def how(self) -> str:
        """As in `process 1 was killed by SIGKILL`."""
        if self.status < 0:
            return f"process {self.process} was killed by {signal.Signals(-self.status).name}"
        return f"process {self.process} exited with status {self.status}"

    @property
    def as_exit_status(self) -> int:
        """The status that a shell would give."""
        return self.status if self.status >= 0 else 128 - self.status


class Processes:
    """`command` once for each environment; the end of each is put into `events` as an `Ended`.

    Their lines are printed whole behind process and attempt, and kept in `logs/process-<i>.log` where that is
    given. They die with this process, however it dies; the terminal's signals reach this process alone.
    """

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[dict[str, str]],
        attempt: int,
        events: SimpleQueue[Any],
        logs: Path | None,
        folder: str,
    ) -> None:
        self.errors = [""] * len(environments)  # the last sentence of each that says what to mend
        self._children: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        guard = [*python("-I", "-S", "-c", _DIE_WITH_PARENT), str(os.getpid())]
        for index, environment in enumerate(environments):
            # In the main thread: the kernel's notice of a parent's death means the thread that forked.
            child = subprocess.Popen(
                [*guard, *command], env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip
            assert child.stdout is not None
            self._children.append(child)
            log = _open_log(logs, index, attempt)
            copy = (index, child.stdout, f"[p{index} try {attempt}] ", log)
            self._readers.append(threading.Thread(target=self._copy, args=copy, daemon=True))
            self._readers[-1].start()
            threading.Thread(target=_await, args=(child, index, events), daemon=True).start()

    def send(self, processes: Collection[int], number: int) -> None:
        """Send these processes a signal; one that has ended gets none."""
        for index in processes:
            self._children[index].send_signal(number)

    def close(self) -> None:
        """After all have ended: wait for the last of what they said."""
        for reader in self._readers:
            reader.join(5.0)  # a helper that outlives its trainer may hold the pipe

    def _copy(self, index: int, source: IO[bytes], prefix: str, log: IO[bytes] | None) -> None:
        with source, log or contextlib.nullcontext():
            for line in source:
                text = line.decode(errors="replace").rstrip("\n")
                if text.startswith("error: "):
                    self.errors[index] = text
                if not text.startswith(_CHATTER):
                    say(prefix + text)
                if log is not None:
                    with contextlib.suppress(OSError):
                        log.write(text.encode() + b"\n")


def say(text: str) -> None:
    """Print a line that no other thread's line runs into.

    A full disk, or a reader that has gone, must not end the training, its restarts, or the reading of its pipe.
    """
    with _PRINTING, contextlib.suppress(OSError, ValueError):
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                drop_output()


def _open_log(folder: Path | None, index: int, attempt: int) -> IO[bytes] | None:
    if folder is None:
        return None
    log = (folder / f"process-{index}.log").open("ab", buffering=0)
    log.write(f"--- attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}\n".encode())
    return log


def _await(child: subprocess.Popen[bytes], index: int, events: SimpleQueue[Any]) -> None:
    events.put(Ended(index, child.wait()))


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]
