"""A bad step is told from a good one by the losses alone, and alike after every restart."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.config import GuardConfig
from moe_jax.errors import HUNG
from moe_jax.files import read_lines
from moe_jax.train.goodput import Goodput
from moe_jax.train.guard import LossGuard
from moe_jax.train.watch import StopRequest, Watchdog

losses = st.lists(st.floats(0.1, 10), min_size=1, max_size=80)


@given(losses, st.integers(0, 79))
def test_a_guard_reset_to_a_checkpoint_judges_as_the_one_that_went_on(values, cut):
    whole, first, second = (LossGuard(GuardConfig(spike_factor=1.5)) for _ in range(3))
    verdicts = [whole.check(i, loss, 1.0, i) for i, loss in enumerate(values)]
    for i, loss in enumerate(values[:cut]):
        first.check(i, loss, 1.0, i)
    second.reset(first.recent)
    again = [second.check(i, loss, 1.0, i) for i, loss in enumerate(values) if i >= cut]
    assert again == verdicts[cut:]


@pytest.mark.parametrize(("loss", "norm", "name"), [(math.nan, 1, "loss"), (1, math.inf, "grad_norm")])
def test_what_is_not_finite_is_bad_from_the_first_step_on(loss, norm, name):
    bad = LossGuard(GuardConfig()).check(1, loss, norm, 7)
    assert bad is not None and (bad.quantity, bad.batch) == (name, 7)


def test_a_spike_is_bad_once_there_is_something_to_compare_with_and_is_not_remembered():
    guard = LossGuard(GuardConfig(spike_factor=2.0))
    assert [guard.check(i, 9.0, 1, i) for i in range(3)] == [None] * 3  # too few to judge
    assert [guard.check(i, 3.0, 1, i) for i in range(8)] == [None] * 8
    assert guard.check(12, 6.1, 1, 12) and guard.check(13, 6.1, 1, 13)
    assert guard.check(14, 5.9, 1, 14) is None
    assert LossGuard(GuardConfig()).check(1, 1e9, 1, 1) is None  # off by default


def test_eight_losses_are_enough_to_judge_by_and_seven_are_not():
    for count in (7, 8):
        guard = LossGuard(GuardConfig(spike_factor=2.0))
        assert [guard.check(i, 1.0, 1, i) for i in range(count)] == [None] * count
        assert (guard.check(count, 9.0, 1, count) is None) == (count < 8)


def test_a_spike_is_measured_against_the_last_thirty_two_losses():
    guard, values = LossGuard(GuardConfig(spike_factor=2.0)), [10.0] * 60 + [1.0] * 20
    assert [guard.check(i, loss, 1, i) for i, loss in enumerate(values)] == [None] * 80
    assert guard.recent == [10.0] * 12 + [1.0] * 20
    assert guard.check(81, 2.1, 1, 81) and guard.check(82, 1.9, 1, 82) is None
    guard.reset(values)
    assert guard.recent == values[-32:]


def test_goodput_kinds_exclude_each_other_and_add_up():
    goodput, start = Goodput(), time.perf_counter()
    with goodput.spent("step"):
        time.sleep(0.02)
        with goodput.spent("save"):
            time.sleep(0.05)
        time.sleep(0.02)
    seconds, wall = goodput.seconds, time.perf_counter() - start
    assert seconds["save"] >= 0.05 and seconds["step"] >= 0.04
    assert sum(seconds.values()) == pytest.approx(wall, abs=0.01)


def test_a_signal_is_noted_and_the_second_interrupt_ends():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_no_handler_is_touched():
    before, names = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopRequest() as stop:
            names.append(stop.name)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [""] and signal.getsignal(signal.SIGTERM) is before


HANG = """
import sys, threading
from pathlib import Path
from moe_jax.train import watch
from moe_jax.train.watch import Watchdog
watch._TELL_SECONDS = 0.2
def waits_for_a_peer():
    threading.Event().wait()
def tell(step, doing):
    print(f"told {step} {doing}", flush=True)
    waits_for_a_peer()  # as a log in a bucket that cannot be reached
with Watchdog(float(sys.argv[1]) / 60, Path(sys.argv[2]), tell) as dog:
    for step in range(20):
        dog.beat(step)
        threading.Event().wait(0.05)
    if sys.argv[3:] == ["hang"]:
        waits_for_a_peer()
    if sys.argv[3:] == ["compile"]:
        dog.beat(20, "compiling", at_least=1)
        threading.Event().wait(1.5)
        dog.beat(21)
"""
STUCK = """
import sys, threading
from moe_jax.__main__ import main
from moe_jax.data.pipeline import TrainIterator
take = TrainIterator.__next__
def stuck(self):
    if self.batch_number == 5:
        threading.Event().wait()
    return take(self)
TrainIterator.__next__ = stuck
main(sys.argv[1:])
"""


@pytest.mark.parametrize(("hangs", "status"), [(["hang"], HUNG), (["compile"], 0), ([], 0)])
def test_the_watchdog_ends_a_process_that_hangs_and_only_that(tmp_path, hangs, status):
    dump = tmp_path / "hang-0.txt"
    command = [sys.executable, "-c", HANG, "0.6", str(dump), *hangs]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    if status == HUNG:
        assert "hung for 1 s in step 19" in done.stderr and "guard.hang_minutes" in done.stderr
        assert "waits_for_a_peer" in dump.read_text() and "waits_for_a_peer" in done.stderr
        assert done.stdout == "told 19 step 19\n"
    else:
        assert not dump.exists()


def test_a_watchdog_that_is_to_wait_for_ages_still_watches(tmp_path):
    """A thread cannot wait for as long as a number may say."""
    before = set(threading.enumerate())
    with Watchdog(1e9, tmp_path / "hang.txt", lambda step, doing: None) as dog:
        dog.beat(1)
        (thread,) = set(threading.enumerate()) - before
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(5)
    assert not thread.is_alive()


def test_a_hang_is_in_the_history_of_the_run(tiny, tmp_path):
    words = ["train", str(tiny.root / "config.json"), "--run", str(tmp_path / "run"), "guard.hang_minutes=0.2"]
    command = [sys.executable, "-c", STUCK, *words]
    env = tiny.env | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == HUNG, done.stderr
    last = read_lines(tmp_path / "run/events.jsonl")[-1]
    assert (last["event"], last["step"], last["doing"]) == ("hung", 5, "step 5")


def test_time_may_be_named_after_it_was_spent():
    goodput = Goodput()
    for kind in ("step", "data"):
        with goodput.spent(lambda kind=kind: kind):
            time.sleep(0.02)
    seconds = goodput.seconds
    assert seconds["step"] >= 0.02 and seconds["data"] >= 0.02
