"""One run in several processes: how they find each other, and which of them writes.

On TPU pods JAX finds the others by itself; on one machine `launch local` names them in the environment
(JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), and gloo carries the collectives between CPUs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from moe_jax import has_tpu
from moe_jax.errors import PREEMPTED, UserError


def start() -> None:
    """Join the run's other processes, if it has any; before JAX's first use of a device.

    Raises:
        UserError: the environment names processes that do not exist or do not answer.
    """
    # The trainer answers SIGTERM itself: JAX's own handler would swallow it.
    jax.config.update("jax_enable_preemption_service", False)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        try:
            count, index = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
            jax.distributed.initialize(address, count, index, cluster_detection_method="deactivate")
        except (KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the processes of this run do not find each other at {address} ({error}); "
                "set JAX_NUM_PROCESSES and JAX_PROCESS_ID, or start them by 'python -m launch local'"
            ) from None
    elif has_tpu() and "cpu" not in os.environ.get("JAX_PLATFORMS", "").split(",")[:1]:
        with contextlib.suppress(ValueError):  # one host outside a cluster: nobody to find
            jax.distributed.initialize(initialization_timeout=_start_seconds())


def _start_seconds() -> int:
    """How long to wait for the others: nodes of Kubernetes come one by one, machines of a TPU slice together."""
    return 1800 if "KUBERNETES_SERVICE_HOST" in os.environ else 300


def end_with(work: Callable[[], int]) -> int:
    """The exit status of `work`. One of several processes that failed ends here and at once: an orderly end would
    wait for peers, which wait for it in a collective."""
    if jax.process_count() == 1:
        return work()
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
        status = 1
    if status in (0, PREEMPTED):
        jax.distributed.shutdown()  # all come here: the first must not take the coordinator away
    else:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_first() -> bool:
    """Whether this process writes what exists once: logs, metadata, the lock."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
