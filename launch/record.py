"""What was started, beside the run (launch.json): enough to start exactly the same again."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from typing import Any

import configs
from moe_jax.command_line import add_command
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import is_remote, location, write_json
from moe_jax.overrides import differences, from_dict, to_dict
from moe_jax.repository import git

RECORD = "launch.json"
_FORMAT = "moe_jax launch 1"
_OF_INTEREST = ("JAX_", "XLA_", "LIBTPU_", "TPU_")  # of the environment; all of it would hold secrets

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it raises is said in one line, without its tracebacks

Launch = Callable[[str, dict[str, Any], bool, bool], int]


def job_record(launcher: str, job: dict[str, Any], config: str, overrides: list[str]) -> dict[str, Any]:
    """The record of a start: `job` is what the launcher calls with to start it again (JSON values).

    Versions and commit are those of the machine that launches; an image is expected to hold the same.
    """
    return {
        "format": _FORMAT,
        "launcher": launcher,
        "job": job,
        "config": config,
        "overrides": overrides,
        "resolved": {name: to_dict(configs.load(name, overrides)) for name in config.split(",")},
        "git": {
            "commit": git("rev-parse", "HEAD").strip(),
            "diff": git("diff", "HEAD", "--", "."),
            "untracked": git("ls-files", "--others", "--exclude-standard").splitlines(),
        },
        "versions": {d.metadata["Name"]: d.version for d in metadata.distributions()} | {"python": sys.version},
        "environment": environment_of_interest(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def environment_of_interest(leave_out: Collection[str] = ()) -> dict[str, str]:
    """What of this process's environment decides how JAX runs."""
    return {k: v for k, v in os.environ.items() if k.startswith(_OF_INTEREST) and k not in leave_out}


def write_record(run: str, record: dict[str, Any]) -> None:
    """launch.json into the run folder; a bucket that cannot be written from here is only spoken of."""
    path = location(run) / RECORD
    try:
        write_json(path, record)
    except Exception as error:  # what gcsfs raises is of many kinds
        if not is_remote(run):
            raise
        print(f"# {path} was not written: {_line(error)}", file=sys.stderr, flush=True)


def read_record(run: str) -> dict[str, Any]:
    """The record of a run folder, local or in a bucket; a UserError where there is none."""
    path = location(run) / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{run} was not started by launch; the command that started it goes on with it") from None
    except Exception as error:
        raise UserError(f"{path} cannot be read ({_line(error)}); start the run by its own command") from None
    if not is_record(record):
        raise UserError(f"{path} is no record of this launcher; start the run by its own command")
    return record


def is_record(found: Any) -> bool:
    """Whether this is what `job_record` makes; other programs have a launch.json too."""
    return isinstance(found, dict) and found.get("format") == _FORMAT


def rebuild(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(launcher, job) of a record.

    Raises:
        UserError: the config is another one by now; the commit that gives the same is named.
    """
    for name, old in record["resolved"].items():
        new = configs.load(name, record["overrides"])
        if to_dict(new) == old:
            continue
        commit = record["git"]["commit"] or "the old code"
        try:
            changed = ", ".join(differences(from_dict(RunConfig, old), new))
        except UserError as error:
            changed = str(error)
        raise UserError(f"{name} has changed since that run ({changed}); check out {commit}, or start a new run")
    return record["launcher"], record["job"]


def add_resume_command(commands: Any, launchers: Mapping[str, Launch]) -> None:
    """Add `resume RUN`; `launchers` start a rebuilt job, given RUN, it, whether to submit and to check fit."""

    def resume(arguments: Any) -> int:
        launcher, job = rebuild(read_record(arguments.run))
        return launchers[launcher](arguments.run, job, arguments.submit, arguments.fit)

    text = "start a recorded run again, exactly as it was started: at once if it ran on this machine, else as its "
    sub = add_command(
        commands, "resume", resume, text + "launcher prints it", "runs/a", "gs://b/mobilemoe-s --submit"
    )
    sub.add_argument("run", help="run folder, local or gs://")
    sub.add_argument("--submit", action="store_true", help="of a job on pods: start it instead of printing it")
    sub.add_argument("--no-fit", dest="fit", action="store_false", help="of a job on pods: do not compile first")


def _line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (getattr(error, "strerror", None) or str(error).strip() or type(error).__name__).splitlines()[0]
