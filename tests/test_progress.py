"""Times left and sizes read alike in every command."""

import pytest

from moe_jax.progress import file_size, time_left


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
