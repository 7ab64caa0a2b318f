"""What the tests of the pod launchers share: a job, its command line, and fake tools that write down calls."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from launch.job import Job
from launch.pipeline import add_pipeline_command
from launch.pods import add_pod_commands, relaunchers
from launch.record import add_resume_command
from moe_jax.command_line import guarded, parse

# Every judged family, as single hosts, several hosts, and a shape that is not its size's default.
TOPOLOGIES = (
    "v5e-256",
    "v5e:4x4",
    "v5p-128",
    "v5p:4x4x16",
    "v6e-256",
    "v6e-8",
    "tpu7x-128",
    "tpu7x:2x2x2",
    "v4-32",
)

# Data that the hosts of mobilemoe_s can reach, which a job that is submitted must have.
SUBMIT = (
    "data.sources.0.path=gs://bucket/train.jsonl", "data.heldout.0.path=gs://bucket/heldout.jsonl",
    "data.tokenizer=gs://bucket/tokenizer.json", "--submit",
)  # fmt: skip

# Any argument that a process can be given, and some that each reader on the way has a meaning for.
NASTY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1) | st.sampled_from(
    [
        "$$",
        "a$$(V0)",
        "$(JAX_PLATFORMS)",
        "$HOME `id` $(id)",
        "'",
        '"',
        "\\",
        "!!",
        "{job}",
        "#",
        "a\nEND\nEND_\nrm x",
        "END",
    ]
)

_FAKE = """#!{python}
import json, sys
call = {{"words": sys.argv[1:], "stdin": "" if sys.stdin.isatty() else sys.stdin.read(), "files": {{}}}}
for word in sys.argv[1:]:
    if word.startswith("--metadata-from-file=startup-script="):
        call["files"]["startup"] = open(word.split("=", 2)[2]).read()
print("said on standard output")
open({log!r}, "a").write(json.dumps(call) + "\\n")
"""


def job(launcher: str = "gke", **fields: Any) -> Job:
    """A small job; `fields` replace its own."""
    given: dict[str, Any] = {
        "config": "mobilemoe_s",
        "overrides": ["seed=3"],
        "name": "mobilemoe-s",
        "bucket": "gs://b",
        "image": "us-docker.pkg.dev/p/r/train:1",
        "topology": "v5e-256",
        "zone": "us-west4-a" if launcher != "gke" else "",
        "cluster": "pool" if launcher == "xpk" else "",
    }
    return Job(launcher, **(given | fields))


def run(*words: str, check_fit: Any = None) -> int:
    """`python -m launch` with these words, of which it has the pods' commands alone; the exit status."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    add_pod_commands(commands, check_fit)
    add_pipeline_command(commands, check_fit)
    add_resume_command(commands, relaunchers(check_fit))
    arguments = parse(parser, words)
    return guarded(arguments.command, arguments)


def fake_tools(folder: Path, monkeypatch: Any, *names: str) -> Path:
    """Nothing but these tools is on PATH; each appends its words and standard input to the file returned."""
    folder.mkdir()
    log = folder / "calls.jsonl"
    for name in names:
        path = folder / name
        path.write_text(_FAKE.format(python=sys.executable, log=str(log)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return log


def calls(log: Path) -> list[dict[str, Any]]:
    """The calls in order."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def expanded(text: str, env: dict[str, str] | None = None) -> str:
    """What Kubernetes makes of `text` in a command: $$ is one $, and $(NAME) the variable if there is one."""

    def one(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else (env or {}).get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)
