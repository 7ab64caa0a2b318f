"""xpk: its command line, and quoting through YAML, Kubernetes and bash."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.record import read_record
from launch.xpk import command_line, inner_command, render
from moe_jax.errors import UserError
from tests.launch.pod_jobs import NASTY, SUBMIT, calls, expanded, fake_tools, job, run

XPK = ["xpk", "mobilemoe_s", "--topology", "v5e-256", "--slices", "2", "--bucket", "gs://bucket", "--image", "i"]


@settings(max_examples=100, deadline=None)
@given(st.lists(NASTY, max_size=4))
def test_any_argument_survives_xpks_yaml_kubernetes_and_bash(words):
    # xpk puts the command on one line of a literal block, which the pod runs with bash -c.
    block = yaml.safe_load("command: |\n  (" + inner_command(["printf", "%s\\0", "", *words]) + ")\n")
    done = subprocess.run(
        ["/bin/bash", "-c", expanded(block["command"], {"JAX_PLATFORMS": "tpu,cpu"})],
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().split("\0")[1:-1] == words


@pytest.mark.parametrize(
    ("topology", "tpu_type"),
    [
        ("v5e-256", "v5litepod-256"),
        ("v6e:4x4", "v6e-16"),
        ("v5p-128", "v5p-4x4x4"),
        ("v5p:4x4x16", "v5p-4x4x16"),
        ("tpu7x-128", "tpu7x-4x4x4"),
    ],
)
def test_slices_have_the_names_that_xpk_knows(topology, tpu_type):
    assert f"--tpu-type={tpu_type}" in command_line(job("xpk", topology=topology))


def test_a_slice_that_xpk_does_not_know_is_refused():
    with pytest.raises(UserError, match="gke or queued"):
        command_line(job("xpk", topology="v5e-4"))


def test_the_line_says_what_the_manifest_says():
    words = command_line(job("xpk", slices=2, spot=True, grace_seconds=60, max_restarts=4))
    assert words[:3] == ["xpk", "workload", "create"]
    assert {
        "--cluster=pool", "--workload=mobilemoe-s", "--num-slices=2", "--max-restarts=4", "--spot",
        "--termination-grace-period-seconds=60", "--restart-on-exit-codes=1,69,75,86",
        "--env=JAX_PLATFORMS=tpu,cpu",
    } < set(words)  # fmt: skip
    assert "--command=python -m moe_jax train mobilemoe_s seed=3 mesh.slices=2 --run gs://b/mobilemoe-s" in words
    assert shlex.split(render(job("xpk", slices=2))) == command_line(job("xpk", slices=2))


def test_capacity_is_asked_for_as_it_was_paid_for():
    def asked(**fields) -> list[str]:
        return [word for word in command_line(job("xpk", **fields)) if word.startswith(("--reserv", "--spot"))]

    assert asked(reservation="r") == ["--reservation=r"] and asked(spot=True) == ["--spot"] and asked() == []


def test_paths_that_no_host_has_are_named_those_of_the_held_out_text_too(capfd):
    def listed(*paths: str) -> str:
        return json.dumps([{"path": path, "weight": 1, "kind": "text"} for path in paths])

    data = [f"data.sources={listed('a.txt', 'gs://b/c.txt')}", f"data.heldout={listed('d.txt', '/e.txt')}"]
    assert run(*XPK, "--cluster", "c", *data, "data.tokenizer=f.json", "init_from=runs/g") == 0
    lines = capfd.readouterr().err.splitlines()
    named = [line.split()[1] for line in lines if line.endswith(" is neither in the bucket nor in the image")]
    assert named == ["a.txt", "d.txt", "f.json", "runs/g"]


def test_submit_runs_what_is_printed_and_names_a_missing_tool(tmp_path, monkeypatch, capfd, bucket):
    assert run(*XPK) == 2
    assert "add --cluster" in capfd.readouterr().err
    log = fake_tools(tmp_path / "bin", monkeypatch, "xpk")
    assert run(*XPK, "--cluster", "c", *SUBMIT) == 0
    assert ["xpk", *calls(log)[-1]["words"]] == shlex.split(capfd.readouterr().out)
    monkeypatch.setenv("PATH", "")
    assert run(*XPK, "--cluster", "c", *SUBMIT) == 2
    assert "xpk is not on PATH" in capfd.readouterr().err


def test_a_job_that_is_refused_leaves_the_record_of_the_one_that_runs(tmp_path, monkeypatch, bucket):
    log = fake_tools(tmp_path / "bin", monkeypatch, "xpk")
    assert run(*XPK, "--cluster", "c", *SUBMIT) == 0
    tool = tmp_path / "bin/xpk"
    tool.write_text(tool.read_text() + "sys.exit(3)\n")
    assert run(*XPK, "--cluster", "c", "steps=9", *SUBMIT) == 3 and len(calls(log)) == 2
    record = read_record(f"{bucket}/mobilemoe-s")
    assert "steps=9" not in record["overrides"]


def test_where_the_bucket_cannot_be_written_a_job_starts_all_the_same_and_that_is_said(
    tmp_path, monkeypatch, capfd, bucket
):
    log = fake_tools(tmp_path / "bin", monkeypatch, "xpk")
    words = [word.replace(bucket, "gs://no-such-bucket") for word in XPK]
    assert run(*words, "--cluster", "c", *SUBMIT) == 0
    error = capfd.readouterr().err
    assert "launch.json was not written" in error and "Traceback" not in error and len(calls(log)) == 1
