"""What was started, beside the run (launch.json): enough to start exactly the same again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import configs
from launch.job import RECORD
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import write_json
from moe_jax.overrides import differences, from_dict, to_dict

_FORMAT = "moe_jax launch 1"
_OF_INTEREST = ("JAX_", "XLA_", "LIBTPU_", "TPU_")  # of the environment; all of it would hold secrets
_ROOT = Path(__file__).parents[1]

Launch = Callable[[dict[str, Any], bool], int]


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
            "commit": _git("rev-parse", "HEAD").strip(),
            "diff": _git("diff", "HEAD"),
            "untracked": _git("ls-files", "--others", "--exclude-standard").splitlines(),
        },
        "versions": {d.metadata["Name"]: d.version for d in metadata.distributions()} | {"python": sys.version},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(_OF_INTEREST)},
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def write_record(run: str, record: dict[str, Any]) -> None:
    """launch.json into the run folder; gcloud takes it to a bucket, and where it cannot, that is only said."""
    path = f"{run.rstrip('/')}/{RECORD}"
    if not run.startswith("gs://"):
        write_json(path, record)
        return
    try:
        done = _gcloud("cp", "-", path, text=json.dumps(record, indent=2))
    except OSError as error:
        done = f"gcloud does not run ({error.strerror})"
    if done:
        print(f"# {path} was not written: {done}", file=sys.stderr)


def read_record(run: str) -> dict[str, Any]:
    """The record of a run folder, local or in a bucket; a UserError where there is none."""
    path = f"{run.rstrip('/')}/{RECORD}"
    try:
        if run.startswith("gs://"):
            words = ["gcloud", "storage", "cat", path]
            text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        else:
            text = Path(path).read_text()
        record = json.loads(text)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(f"{path} cannot be read ({why}); start the run by its own command") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise UserError(f"{path} is no record of this launcher; start the run by its own command")
    return record


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
    """Add `resume RUN`; `launchers` start a rebuilt job, given it and whether to submit."""
    sub = commands.add_parser("resume", help="start a recorded run again, exactly as it was started")
    sub.add_argument("run", help="run folder, local or gs://")
    sub.add_argument("--submit", action="store_true", help="run it instead of printing it")

    def resume(arguments: Any) -> int:
        launcher, job = rebuild(read_record(arguments.run))
        return launchers[launcher](job, arguments.submit)

    sub.set_defaults(command=resume)


def _git(*words: str) -> str:
    """What git says in this repository; nothing where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.decode(errors="replace")


def _gcloud(*words: str, text: str) -> str:
    """What went wrong, in one line, or nothing."""
    done = subprocess.run(["gcloud", "storage", *words], input=text, capture_output=True, text=True, check=False)
    said = done.stderr.strip().splitlines() or [f"gcloud exited with {done.returncode}"]
    return said[0] if done.returncode else ""
