"""`python -m launch`: find out where a run fits, start it there and keep it going."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from launch.fit import add_fit_command
from launch.local import run_local
from launch.pods import add_pod_commands, relaunchers
from launch.record import add_resume_command
from moe_jax.__main__ import guarded

_EXAMPLES = """\
Examples:
  python -m launch local demo_pretrain --run runs/a                      restart it when it is killed
  python -m launch local demo_pretrain --run runs/a --devices 8 mesh.fsdp=4 mesh.data=2
  python -m launch local demo_pretrain,demo_sft --run runs/all --max-restarts 10
  python -m launch fit mobilemoe_s --topology v5e:4x4    memory, cost and speed on a slice, without one
  python -m launch gke mobilemoe_s --topology v5e-256 --bucket gs://b --image IMAGE > job.yaml
  python -m launch demo --run runs/demo            text to engine: what `make demo` runs
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status is the training's own."""
    parser = argparse.ArgumentParser(
        "python -m launch",
        description="Find out where a training job fits, start it there and keep it going.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser(
        "local",
        help="train on this machine, restarted from its last checkpoint when it dies",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("config", help="what python -m moe_jax train takes")
    sub.add_argument("overrides", nargs="*", help="dotted.name=value", metavar="OVERRIDE")
    sub.add_argument("--run", required=True, metavar="DIR", help="the run folder")
    sub.add_argument("--devices", type=int, default=0, help="fake CPU devices; 0 uses what is there")
    sub.add_argument("--max-restarts", type=int, default=3)
    sub.set_defaults(command=_local)
    sub = commands.add_parser(
        "demo",
        help="the whole line at small scale: train in four stages, kill, resume, convert, verify, chat, report",
        description="Run the demo's parts that are missing in the folder; the same command goes on after a stop. "
        "Overrides apply to all four stages.",
        epilog="Example:\n  python -m launch demo --run runs/small steps=40 checkpoint.every_steps=15",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("overrides", nargs="*", help="dotted.name=value", metavar="OVERRIDE")
    sub.add_argument("--run", default="runs/demo", metavar="DIR", help="the demo's folder")
    sub.add_argument("--fresh", action="store_true", help="remove what the folder holds and start over")
    sub.set_defaults(command=_demo)
    add_fit_command(commands)
    add_pod_commands(commands)
    add_resume_command(commands, relaunchers())
    arguments, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if "=" not in word or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(arguments, "overrides"):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return guarded(arguments.command, arguments)


def _local(arguments: Any) -> int:
    return run_local(
        arguments.config,
        arguments.overrides,
        arguments.run,
        devices=arguments.devices,
        max_restarts=arguments.max_restarts,
    )


def _demo(arguments: Any) -> int:
    from launch.demo import run_demo

    return run_demo(arguments.run, arguments.overrides, arguments.fresh)


if __name__ == "__main__":
    sys.exit(main())
