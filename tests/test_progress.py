"""Times left and sizes read alike in every command."""

import time

import pytest

from moe_jax.progress import Progress, file_size, time_left


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (59.9, "0:59"), (185, "3:05"), (3785.2, "1:03:05"), (-2, "0:00")]
)
def test_a_time_left_is_minutes_and_seconds_and_hours_where_there_are_some(seconds, words):
    assert time_left(seconds) == f"{words} left"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (999_949, "999.9 kB"), (999_960, "1.0 MB"),
        (3_027_000_000, "3.0 GB"), (2 * 10**15, "2,000.0 TB"),
    ],
)  # fmt: skip
def test_a_size_has_three_digits_at_most_before_its_unit(count, words):
    assert file_size(count) == words


def test_progress_is_told_every_few_seconds_with_the_time_that_is_left(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress("reading", every=3.0)
    for now in (101.0, 102.9, 103.0, 105.9, 110.0):
        progress(1e6 * (now - 100.0), 40e6)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 8% of 40.0 MB, 0:37 left",
        "reading: 25% of 40.0 MB, 0:30 left",
    ]
