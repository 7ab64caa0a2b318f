"""`python -m launch gke|queued|xpk`: print what starts a job on TPU pods, and start it with --submit.

The job itself goes to standard output and nothing else does: what one should know stands on standard error.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from launch import jobset, queued, xpk
from launch.fit_compile import check_mesh
from launch.job import Job, shell
from launch.record import job_record, write_record
from launch.slices import Slice
from moe_jax.command_line import add_command
from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import is_remote, location

# (config, slice, slices, which stage of how many) -> tokens/s per chip, None where it cannot be told; raises
# UserError where the job does not fit.
CheckFit = Callable[[RunConfig, Slice, int, str], float | None]


class _Launcher(NamedTuple):
    tool: str
    summary: str
    render: Callable[[Job], str]
    hints: Callable[[Job], list[str]]
    submit: Callable[[Job], int]


def _create_jobset(job: Job) -> int:
    # Not `apply`, which finds a JobSet of this name that has ended "unchanged" and starts nothing.
    command = ["kubectl", "create", "-f", "-"]
    return subprocess.run(command, input=jobset.render(job), text=True, stdout=2, check=False).returncode


def _create_workload(job: Job) -> int:
    return subprocess.run(xpk.command_line(job), stdout=2, check=False).returncode


LAUNCHERS = {
    "gke": _Launcher("kubectl", "a JobSet manifest for GKE", jobset.render, jobset.hints, _create_jobset),
    "queued": _Launcher("gcloud", "machines from a queued resource", queued.render, queued.hints, queued.submit),
    "xpk": _Launcher("xpk", "an xpk workload", xpk.render, xpk.hints, _create_workload),
}


def chip_hours(cfg: RunConfig, tokens_per_second_per_chip: float) -> float:
    """What a stage costs, on however many chips it runs."""
    return cfg.steps * cfg.tokens_per_step / tokens_per_second_per_chip / 3600


def launch_job(job: Job, submit: bool, check_fit: CheckFit | None = None) -> int:
    """Print a job, after it is found to fit; with `submit` also start and record it. The tool's exit status.

    Raises:
        UserError: the config is mistyped, its mesh is not of these slices, the job does not fit, or the tool is
            missing or data that hosts reach.
    """
    launcher, kind, stages = LAUNCHERS[job.launcher], job.slice, job.stages
    notes = [f"# {job.slices} x {kind.family}:{kind.topology}, {job.slices * kind.chips} chips on "
             f"{job.slices * kind.hosts} hosts; the run is {job.run}"]  # fmt: skip
    costs, missing = [], list(dict.fromkeys(path for cfg in stages for path in _local_paths(cfg)))
    if submit and missing:
        raise UserError(
            f"{missing[0]} is a path of this machine; copy it to the bucket and name it there, as in "
            f"data.sources.0.path='{job.bucket}/data/*.jsonl', or by its whole path in the image, /app/{missing[0]}"
        )
    for cfg in stages:
        check_mesh(cfg, kind, job.slices)
    for number, cfg in enumerate(stages, 1):
        if check_fit and (rate := check_fit(cfg, kind, job.slices, f"{number} of {len(stages)}")):
            costs.append(chip_hours(cfg, rate))
            notes.append(f"# {cfg.stage}: at least {costs[-1]:,.0f} chip-hours")
    if len(costs) > 1:
        notes.append(f"# in all: at least {sum(costs):,.0f} chip-hours")
    notes += [f"# {path} is neither in the bucket nor in the image" for path in missing]
    image = shell([job.image])
    notes.append(f"docker build -t {image} . && docker push {image}")
    text = launcher.render(job)
    print(text, end="", flush=True)
    print("\n".join([*notes, *launcher.hints(job)]), file=sys.stderr, flush=True)
    if not submit:
        return 0
    if shutil.which(launcher.tool) is None:
        raise UserError(
            f"{launcher.tool} is not on PATH; install it, or leave --submit out and take what is printed"
        )
    record = job_record(job.launcher, job.to_dict(), job.config, job.overrides)
    status = launcher.submit(job)
    if status == 0:  # the record of a job that runs must not give way to one that was refused
        write_record(job.run, record)
    return status


def _local_paths(cfg: RunConfig) -> list[str]:
    """Paths of the config that a host would look for in its own file system."""
    paths = [source.path for source in (*cfg.data.sources, *cfg.data.heldout)]
    paths += [cfg.data.tokenizer, cfg.init_from]
    return [path for path in paths if path and not path.startswith(("gs://", "/", "stdlib:"))]


def add_pod_commands(commands: Any, check_fit: CheckFit | None = None) -> None:
    """Add `gke`, `queued` and `xpk`; `check_fit` is asked before anything is printed."""
    for name, launcher in LAUNCHERS.items():
        sub = add_command(
            commands,
            name,
            partial(_command, launcher=name, check_fit=check_fit),
            f"print {launcher.summary}; --submit starts it with {launcher.tool}",
            f"mobilemoe_s --topology v5e-256 --slices 2 --bucket gs://b --image IMAGE{_EXAMPLE[name]} mesh.data=2",
            config="what python -m moe_jax train takes: registered names",
        )
        sub.add_argument("--run", metavar="NAME", help="of the job and its folder in the bucket; the config's")
        sub.add_argument("--max-restarts", type=int, default=10, help="after crashes (default: 10)")
        add_pod_options(sub, [name], required=True)


_EXAMPLE = {"gke": "", "queued": " --zone us-west4-a", "xpk": " --zone us-west4-a --cluster CLUSTER"}


def add_pod_options(sub: Any, launchers: list[str], required: bool) -> None:
    """Options of jobs of these launchers, for `pod_job`; `required` are those that no pod job can do without."""
    sub.add_argument("--topology", required=required, help="one slice: v5e-256 or v5e:16x16")
    sub.add_argument("--slices", type=int, default=1)
    sub.add_argument("--bucket", required=required, default="", metavar="gs://...", help="where runs are kept")
    sub.add_argument("--image", required=required, default="", help="container image, built by the Dockerfile")
    capacity = sub.add_mutually_exclusive_group()
    capacity.add_argument("--spot", action="store_true", help="capacity that can be taken away")
    capacity.add_argument("--reservation", default="", metavar="R", help="capacity that is reserved")
    sub.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--grace-seconds", type=int, default=300, help="for the final save (default: 300)")
    sub.add_argument("--submit", action="store_true", help="start it instead of printing it alone")
    sub.add_argument("--no-fit", dest="fit", action="store_false", help="do not compile first whether it fits")
    if launchers != ["xpk"]:
        sub.add_argument("--service-account", default="", metavar="NAME")
    if "gke" in launchers:
        sub.add_argument("--mount", action="store_true", help="mount the bucket instead of using gs://")
        sub.add_argument(
            "--no-host-network",
            dest="host_network",
            action="store_false",
            help="unprivileged pods, for Autopilot; several slices: their own network and identity, slower",
        )
    if launchers != ["gke"]:
        sub.add_argument("--zone", default="")
        sub.add_argument("--project", default="")
    if "xpk" in launchers:
        sub.add_argument("--cluster", default="")


def pod_job(arguments: Any, launcher: str, **fields: Any) -> Job:
    """The job of a command line; `fields` replace its own."""
    given = {key: value for key, value in vars(arguments).items() if key in Job.__dataclass_fields__}
    environment = {}
    for text in arguments.env:
        name, equals, environment[name] = text.partition("=")
        if not equals:
            raise UserError(f"--env {text!r} is not of the form NAME=VALUE")
    return Job(**(given | {"launcher": launcher, "environment": environment} | fields))


def _command(arguments: Any, launcher: str, check_fit: CheckFit | None) -> int:
    name = arguments.run or arguments.config.partition(",")[0].replace("_", "-")
    job = pod_job(arguments, launcher, name=name)
    return launch_job(job, arguments.submit, check_fit if arguments.fit else None)


def relaunchers(check_fit: CheckFit | None = None) -> dict[str, Callable[..., int]]:
    """For `launch.record.add_resume_command`: each launcher with a run, its job, whether to submit and to check."""

    def relaunch(run: str, job: dict[str, Any], submit: bool, fit: bool) -> int:
        again = Job(**job)
        if is_remote(run) and location(run) != location(again.run):
            raise UserError(
                f"{run} was copied from {again.run}, where its job would go on; start it by its own command, with "
                "--bucket and --run of the copy"
            )
        return launch_job(again, submit, check_fit if fit else None)

    return dict.fromkeys(LAUNCHERS, relaunch)
