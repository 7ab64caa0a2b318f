"""A job on machines from a queued resource: one gcloud command, and the script that every machine runs at boot."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from launch.job import Job, shell
from moe_jax.errors import MISTAKEN, PREEMPTED, UserError
from moe_jax.run_lock import OWNER

_SOUND_SECONDS = 3600  # after a run of so long the crashes before it count no more
_QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def startup_script(job: Job) -> str:
    """What each machine does at every boot: run the container until the training has ended.

    The machines need no supervisor between them: when a process dies its peers end too, and all loops start again.
    """
    environment = [word for name, value in job.env.items() for word in ("--env", f"{name}={value}")]
    run = [
        "--rm", "--name=train", "--privileged", "--network=host", "--ipc=host",
        "--ulimit=memlock=-1", f"--stop-timeout={job.grace_seconds}", *environment, job.image, *job.command,
    ]  # fmt: skip
    registry = job.image.partition("/")[0]
    login = ""
    if registry.endswith(("docker.pkg.dev", "gcr.io")):
        login = shell(["gcloud", "auth", "configure-docker", registry, "--quiet"]) + "\n"
    return f"""\
#!/bin/bash
{login}# Apart from the restarts below; an hour, because a mistyped image never comes.
for try in $(seq 120); do docker pull {shell([job.image])} && break; sleep 30; done
restarts=0
machine=$(cat /proc/sys/kernel/random/boot_id)  # a lease of this machine's is that of the container before
while true; do
  docker rm --force train 2>/dev/null
  begun=$SECONDS
  docker run --env {OWNER}="$machine" {shell(run)}
  status=$?
  [ $((SECONDS - begun)) -gt {_SOUND_SECONDS} ] && restarts=0
  case $status in
    0 | {MISTAKEN}) exit $status ;;
    {PREEMPTED}) ;;
    *) restarts=$((restarts + 1)); [ $restarts -gt {job.max_restarts} ] && exit $status ;;
  esac
  sleep 10
done
"""


def create_command(job: Job, script: str) -> list[str]:
    """The gcloud call that asks for the machines; `script` is the path of the start-up script.

    Raises:
        UserError: no zone is given, or the family is not offered this way.
    """
    kind = job.slice
    if not kind.facts.runtime:
        raise UserError(f"{job.topology} is not offered as a queued resource; use gke or xpk")
    if not job.zone:
        raise UserError("queued resources belong to a zone; add --zone, as in --zone us-west4-a")
    # Naming a reservation is still in the alpha track.
    words = (
        [*_QUEUED, "create", job.name]
        if not job.reservation
        else ["gcloud", "alpha", *_QUEUED[1:], "create", job.name]
    )
    words += (
        [f"--node-count={job.slices}", f"--node-prefix={job.name}"] if job.slices > 1 else [f"--node-id={job.name}"]
    )
    if kind.is_default:
        words.append(f"--accelerator-type={kind.facts.product}-{kind.size}")
    else:
        words += [f"--type={kind.facts.product}", f"--topology={kind.topology}"]
    words += [f"--runtime-version={kind.facts.runtime}", *job.where]
    words += ["--spot"] if job.spot else []
    words += [f"--reservation={job.reservation}"] if job.reservation else []
    words += [f"--service-account={job.service_account}"] if job.service_account else []
    return [*words, f"--metadata-from-file=startup-script={script}"]


def render(job: Job) -> str:
    """A shell script that asks for the machines; the commands for afterwards are its comments."""
    script = startup_script(job)
    end = "END"
    while end in script.split("\n"):
        end += "_"
    create = shell(create_command(job, "STARTUP")).removesuffix("STARTUP") + '"$startup"'
    on_all = [*_QUEUED, "ssh", job.name, *job.where, "--node=all", "--worker=all"]
    log = "sudo journalctl --no-pager --lines=50 --unit=google-startup-scripts"
    comments = [
        [*_QUEUED, "describe", job.name, *job.where],
        [*on_all, f"--command={log}"],
        [*on_all, "--command=sudo docker stop train"],
        [*_QUEUED, "delete", job.name, "--force", *job.where],
    ]
    return f"""\
#!/bin/bash
set -eu
startup=$(mktemp)
cat > "$startup" <<'{end}'
{script}{end}
{create}

# Afterwards: its state, the log of all workers, a restart from a checkpoint on all workers, the end of it.
""" + "".join(f"#   {shell(words)}\n" for words in comments)


def submit(job: Job) -> int:
    """Ask for the machines; gcloud's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "startup.sh"
        path.write_text(startup_script(job))
        return subprocess.run(create_command(job, str(path)), stdout=2, check=False).returncode


def hints(job: Job) -> list[str]:
    """What one should know."""
    delete = shell([*_QUEUED, "delete", job.name, "--force", *job.where])
    lines = [f"{delete}    # until then the machines cost money, also after the training has ended"]
    if job.spot:
        lines.append(
            "# A preemption ends the resource: delete it and submit the same again, which goes on with the run."
        )
    return lines
