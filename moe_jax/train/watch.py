"""What ends a process from outside the step: signals, which are obeyed after a save, and steps that never come."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from moe_jax.errors import HUNG

_TELL_SECONDS = 10.0  # that the last words may take: what hangs may be the place that they go to


class StopRequest:
    """SIGTERM (a preemption notice) and SIGINT, which the loop obeys after a save.

    A context manager; outside the main thread, where no signal arrives, it does nothing. A SIGINT
    after either interrupts. What came is still named after the block.
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
        if self.name:
            return
        self.name = signal.Signals(number).name
        print(f"{self.name}: saving a checkpoint, then stopping", file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process with a stack dump when nothing was reported for `minutes` (0: never).

    A collective that a peer never joins blocks for ever and cannot be interrupted; the process's end is the only
    way to tell a supervisor. What a process does by itself, a compilation say, may take longer. `tell` is called
    with the step and what was done for it before the end.
    """

    def __init__(self, minutes: float, dump: Path | None, tell: Callable[..., object]) -> None:
        self._seconds, self._dump, self._tell = 60 * minutes, dump, tell
        self.beat(0, "starting")
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def beat(self, step: int, doing: str = "", at_least: float = 0.0) -> None:
        """Progress; the next beat, after this step or what is done for it, may take `at_least` so many minutes."""
        self._now = (step, doing or f"step {step}", max(self._seconds, 60 * at_least), time.monotonic())

    def _watch(self) -> None:
        while True:
            step, doing, allowed, since = self._now
            left = since + allowed - time.monotonic()
            if left <= 0:
                break
            if self._done.wait(min(left, self._seconds, threading.TIMEOUT_MAX)):
                return
        sentence = (
            f"process {os.getpid()} hung for {allowed:.0f} s in {doing}; it ends itself for a restart "
            "from the last checkpoint: look at the stacks, or raise guard.hang_minutes"
        )
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        if self._dump:
            with contextlib.suppress(OSError), self._dump.open("w") as file:
                print(sentence, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        telling = threading.Thread(target=self._tell, args=(step,), kwargs={"doing": doing}, daemon=True)
        telling.start()
        telling.join(_TELL_SECONDS)
        os._exit(HUNG)
