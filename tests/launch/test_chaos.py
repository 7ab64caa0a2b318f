"""The short form of `make chaos`: a few faults on a run in two processes, which ends as if nothing had been."""

from __future__ import annotations

from tests.chaos.faults import byte_flipped, killed_while_saving
from tests.chaos.run import run_chaos


def test_a_run_under_faults_equals_the_run_in_peace_bit_for_bit(tmp_path):
    found = run_chaos(tmp_path, 1, (killed_while_saving, byte_flipped), 30, print)
    assert found["losses_bit_equal"] and found["params_bit_equal"] and found["numbers_compared"] > 100_000
    assert (found["set_aside"], found["checkpoints_lost"]) == (1, 0)
    assert found["restarts"] >= 2  # a kill that missed the save is made again
    assert found["faults"]["killed_while_saving"] == found["faults"]["byte_flipped"] == 1
