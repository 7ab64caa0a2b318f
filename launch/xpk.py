"""A job through xpk, Google's wrapper around GKE and JobSet: its command line."""

from __future__ import annotations

import shlex

from launch.job import Job, kubernetes_literal, shell
from moe_jax.errors import HUNG, PREEMPTED, UNAVAILABLE, UserError

_LEAST_V5E = 8  # chips: its smallest topology is 2x4
_CRASHED = 1  # xpk by itself restarts on 42 and from 127 on


def command_line(job: Job) -> list[str]:
    """`xpk workload create` as words; a UserError where it has no cluster."""
    if not job.cluster:
        raise UserError("xpk works on a cluster that it knows; add --cluster")
    kind = job.slice
    flat = not kind.facts.cubes
    if kind.family == "v5e" and kind.chips < _LEAST_V5E:
        raise UserError(f"xpk has no v5e slice of less than {_LEAST_V5E} chips; use gke or queued")
    # A size of a family with shapes does not say which one; xpk takes the shape in its place.
    tpu_type = f"{kind.facts.product}-{kind.size if flat else kind.topology}"
    words = [
        "xpk", "workload", "create", f"--cluster={job.cluster}", f"--workload={job.name}", f"--tpu-type={tpu_type}",
        f"--num-slices={job.slices}", f"--docker-image={job.image}", f"--command={inner_command(job.command)}",
        f"--max-restarts={job.max_restarts}",
        f"--restart-on-exit-codes={_CRASHED},{UNAVAILABLE},{PREEMPTED},{HUNG}",
        f"--termination-grace-period-seconds={job.grace_seconds}",
        *(f"--env={name}={value}" for name, value in job.env.items()), *job.where,
    ]  # fmt: skip
    words += ["--spot"] if job.spot else []
    return words + ([f"--reservation={job.reservation}"] if job.reservation else [])


def inner_command(words: list[str]) -> str:
    """`words` as xpk's --command: it goes through one line of YAML, then Kubernetes, then bash."""
    return kubernetes_literal(" ".join(map(_one_line, words)))


def _one_line(word: str) -> str:
    if word.isascii() and word.isprintable():
        return shlex.quote(word)
    # Bytes that end a line of YAML, or that it does not allow, are spelled out for bash.
    safe = (chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in word.encode())
    return f"$'{''.join(safe)}'"


def render(job: Job) -> str:
    """The command line as a shell reads it."""
    return shell(command_line(job)) + "\n"


def hints(job: Job) -> list[str]:
    """What one should know."""
    return ["# xpk counts a preemption as a restart; raise --max-restarts on spot capacity."] if job.spot else []
