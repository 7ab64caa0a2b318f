"""`python -m launch`: find out where a run fits, start it there and keep it going."""

from __future__ import annotations

import argparse
from typing import Any

from launch.design import add_design_command
from launch.fit import add_fit_command
from launch.fit_first import fit_first
from launch.local import add_local_command, resume_local
from launch.pipeline import add_pipeline_command
from launch.pods import add_pod_commands, relaunchers
from launch.record import add_resume_command
from launch.status import add_status_command
from moe_jax.command_line import add_command, add_overrides, guarded, heed_interrupts, leave, make_parser, parse

_EXAMPLES = """\
Examples:
  python -m launch local demo_pretrain --run runs/a               train here; started again when it is killed
  python -m launch local demo_pretrain --run runs/a --processes 2 --devices-per-process 2 mesh.fsdp=4
  python -m launch pipeline demo --run runs/four                  all stages, each from the end of the one before
  python -m launch status runs/four                               how far, how fast, how healthy
  python -m launch resume runs/a                                  exactly what was started there
  python -m launch fit mobilemoe_s --topology v5e:4x4             memory, cost and speed on a slice, without one
  python -m launch design --memory 1.1 --active 0.3               the model of least loss that a phone holds
  python -m launch gke mobilemoe_s --topology v5e-256 --bucket gs://b --image IMAGE > job.yaml
  python -m launch pipeline mobilemoe_s --topology v5e-256 --bucket gs://b --image IMAGE > job.yaml
  python -m launch demo --run runs/demo                           text to engine: what `make demo` runs
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is the training's own."""
    arguments = parse(_parser(), argv)
    return guarded(arguments.command, arguments)


def _parser() -> argparse.ArgumentParser:
    text = "Find out where a training job fits, start it there and keep it going."
    parser, commands = make_parser("python -m launch", text, _EXAMPLES)
    add_local_command(commands)
    sub = add_command(
        commands,
        "demo",
        _demo,
        "train in four stages, kill, resume, convert, verify, chat, report: the whole line at small scale. "
        "Parts that the folder holds are skipped, so that the same command goes on after a stop",
        "--run runs/small steps=40 checkpoint.every_steps=15",
    )
    add_overrides(sub)
    sub.add_argument("--run", default="runs/demo", metavar="DIR", help="the demo's folder")
    sub.add_argument("--fresh", action="store_true", help="remove what the folder holds and start over")
    add_fit_command(commands)
    add_design_command(commands)
    add_pod_commands(commands, fit_first)
    add_pipeline_command(commands, fit_first)
    add_status_command(commands)
    add_resume_command(commands, relaunchers(fit_first) | {"local": resume_local})
    return parser


def _demo(arguments: Any) -> int:
    from launch.demo import run_demo

    return run_demo(arguments.run, arguments.overrides, arguments.fresh)


if __name__ == "__main__":
    heed_interrupts()
    leave(main())
