"""What ends a process from outside the step: signals, which are granted after a save, and steps that never come."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from moe_jax.errors import HUNG


class StopRequest:
    """SIGTERM (a preemption notice) and SIGINT, as a wish that the loop grants after a save.

    A context manager; outside the main thread, where no signal arrives, it does nothing. A second SIGINT
    interrupts.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal that came

    def __enter__(self) -> StopRequest:
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        print(f"{self.name}: saving a checkpoint, then stopping", file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process with a stack dump when nothing was reported for `minutes` (0: never).

    A collective that a peer never joins blocks for ever and cannot be interrupted; the process's end is the only
    way to tell a supervisor.
    """

    def __init__(self, minutes: float, dump: Path | None) -> None:
        self._seconds, self._dump = 60 * minutes, dump
        self._doing, self._since = "starting", time.monotonic()
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, doing: str) -> None:
        """Something was finished, and this is what comes next."""
        self._doing, self._since = doing, time.monotonic()

    def _watch(self) -> None:
        while (left := self._since + self._seconds - time.monotonic()) > 0:
            if self._done.wait(left):
                return
        sentence = (
            f"process {os.getpid()} hung for {self._seconds:.0f} s in {self._doing}; it ends itself for a restart "
            "from the last checkpoint: look at the stacks, or raise guard.hang_minutes"
        )
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._dump:
            with contextlib.suppress(OSError), self._dump.open("w") as file:
                print(sentence, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        os._exit(HUNG)
