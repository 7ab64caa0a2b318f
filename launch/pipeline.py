"""`python -m launch pipeline`: the stages of a family in one run, on this machine or on pods.

The run is one folder with a folder a stage. Each starts from the final checkpoint of the one before; complete ones
are skipped (`moe_jax.train.stages`), so that the same command goes on wherever the last one stopped.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import configs
from launch.local import add_local_options, job_of, run_local
from launch.pods import LAUNCHERS, CheckFit, add_pod_options, launch_job, pod_job
from moe_jax.command_line import add_command, add_overrides
from moe_jax.errors import UserError
from moe_jax.files import location


def chosen(family: str, first: str | None, last: str | None, overrides: list[str]) -> list[tuple[str, str]]:
    """(name, stage) of a family's configs from stage `first` to stage `last`, by default of all.

    Raises:
        UserError: no such family or stage, or no stage between the two.
    """
    found = [(name, configs.load(name, overrides).stage) for name in configs.stages(family)]
    known = [stage for _, stage in found]
    for option, stage in (("--from", first), ("--until", last)):
        if stage is not None and stage not in known:
            raise UserError(f"{option} {stage!r}: {family} has the stages {', '.join(known)}")
    begin = known.index(first) if first else 0
    end = known.index(last) + 1 if last else len(known)
    if begin >= end:
        raise UserError(f"--from {first} comes after --until {last}; {family} has the stages {', '.join(known)}")
    return found[begin:end]


def predecessor(family: str, first: str | None, overrides: list[str]) -> str:
    """The stage before `first`, empty where there is none to start from or the overrides name a start."""
    stages = [stage for _, stage in chosen(family, None, first, overrides)] if first else []
    given = any(word.startswith("init_from=") for word in overrides)
    return stages[-2] if len(stages) > 1 and not given else ""


def _refuse(arguments: Any, group: Any, where: str) -> None:
    """A UserError for an option of the group that was given, and would be passed over in silence."""
    for action in group._group_actions:  # argparse has no other list of them
        if getattr(arguments, action.dest) != action.default:
            raise UserError(f"{action.option_strings[0]} means nothing {where}")


def add_pipeline_command(commands: Any, check_fit: CheckFit | None = None) -> None:
    """Add `pipeline` to the subparsers of `python -m launch`; `check_fit` is for `launch.pods`."""

    def command(arguments: Any) -> int:
        family, overrides = arguments.family, arguments.overrides
        stages = chosen(family, arguments.first, arguments.last, overrides)
        config = ",".join(name for name, _ in stages)
        only = stages[0][1] if len(stages) == 1 else ""  # a run of one config has no folders of stages
        before = predecessor(family, arguments.first, overrides)
        here = not arguments.topology
        limit = (3 if here else 10) if arguments.max_restarts is None else arguments.max_restarts
        if here:
            _refuse(arguments, pods, "on this machine; leave it out, or add --topology, as in --topology v5e-256")
            root = arguments.run or os.path.join("runs", family)
            start = [f"init_from={location(root) / before}"] if before else []
            run = os.path.join(root, only) if only else root
            return run_local(job_of(arguments, config, run=run, overrides=[*overrides, *start], max_restarts=limit))
        _refuse(arguments, local, "on pods; leave it out")
        name = arguments.run or family.replace("_", "-")
        job = pod_job(arguments, arguments.on, config=config, name=name, max_restarts=limit, stage=only)
        if before:
            job = replace(job, overrides=[*overrides, f"init_from={job.on_host(f'{job.root}/{before}')}"])
        return launch_job(job, arguments.submit, check_fit if arguments.fit else None)

    sub = add_command(
        commands,
        "pipeline",
        command,
        "train all stages of a family in one run: on this machine, or with --topology as one job on pods",
        "demo --run runs/four --processes 2 --devices-per-process 2 mesh.fsdp=4",
        "mobilemoe_s --topology v5e-256 --slices 2 --bucket gs://b --image IMAGE > job.yaml",
    )
    sub.add_argument("family", help=f"one of {', '.join(configs.families())}")
    add_overrides(sub)
    sub.add_argument("--from", dest="first", metavar="STAGE", help="the first one; its predecessor is complete")
    sub.add_argument("--until", dest="last", metavar="STAGE", help="the last one")
    sub.add_argument("--run", help="folder on this machine (default: runs/FAMILY), or name of the job on pods")
    sub.add_argument("--max-restarts", type=int, metavar="K", help="after crashes (default: 3, on pods 10)")
    local = sub.add_argument_group("on this machine")
    add_local_options(local)
    pods = sub.add_argument_group("on pods")
    pods.add_argument("--on", choices=list(LAUNCHERS), default="gke", help="what starts it there (default: gke)")
    add_pod_options(pods, list(LAUNCHERS), required=False)
