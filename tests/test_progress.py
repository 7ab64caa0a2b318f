"""Times left read alike in every command."""

import pytest

from moe_jax.progress import time_left


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (59.9, "0:59"), (185, "3:05"), (3785.2, "1:03:05"), (-2, "0:00")]
)
def test_a_time_left_is_minutes_and_seconds_and_hours_where_there_are_some(seconds, words):
    assert time_left(seconds) == f"{words} left"
