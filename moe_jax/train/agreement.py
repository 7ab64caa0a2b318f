"""What the processes of a run tell each other without a device: over JAX's coordination service, from any thread.

A save ends in the background while the devices are at work, where a device collective would mix with the step's.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the client has no public name

from moe_jax.outages import passes

_MINUTES = 30.0  # a dead process is noticed long before, by its missing heartbeat

_rounds: defaultdict[str, Any] = defaultdict(itertools.count)


class Elsewhere(Exception):
    """Another process failed; the message names it and its reason, `passes` is as `moe_jax.outages.passes`."""

    def __init__(self, message: str, passes: bool) -> None:
        super().__init__(message)
        self.passes = passes


def together(name: str, work: Callable[[], Any], minutes: float = _MINUTES) -> list[Any]:
    """Do `work` in every process at once; the results of all, by process, which must be JSON.

    The first to be done waits for the last, at most so many minutes. Every process calls it with the same names in
    the same order, each name from one thread.

    Raises:
        Elsewhere: the work failed in another process; what failed in this one is raised as it is.
    """
    if jax.process_count() == 1:
        return [work()]
    failure, result = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    client: Any = distributed.global_state.client
    number = next(_rounds[name])
    mine, folder = str(jax.process_index()), f"moe_jax/{name}"
    reason = None if failure is None else str(failure) or type(failure).__name__
    client.key_value_set(f"{folder}/{number}/{mine}", json.dumps([reason, passes(failure), result]))
    client.wait_at_barrier(f"{folder}/{number}", int(minutes * 60_000))
    found = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client.key_value_dir_get(f"{folder}/{number}/")}
    if number:  # all are past it, or they would not have come here
        client.key_value_delete(f"{folder}/{number - 1}/{mine}")
    if failure is not None:
        raise failure
    for index, (reason, passing, _) in sorted(found.items()):
        if reason is not None:
            raise Elsewhere(f"process {index}: {reason}", passing)
    return [found[index][2] for index in range(jax.process_count())]


def by_first(name: str, work: Callable[[], Any]) -> Any:
    """Do `work` in process 0 alone; its result, in every process."""
    return together(name, lambda: work() if jax.process_index() == 0 else None)[0]
