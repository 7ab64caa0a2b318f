"""Queued resources: the gcloud command, the start-up script as bash really runs it, and safe quoting."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.queued import create_command, render, startup_script
from moe_jax.errors import UserError
from tests.launch.pod_jobs import NASTY, SUBMIT, calls, fake_tools, job, run

QUEUED = [
    "queued",
    "mobilemoe_s",
    "--topology",
    "v5e-256",
    "--slices",
    "2",
    "--bucket",
    "gs://bucket",
    "--image",
    "i",
]


def bash(script: str, functions: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["/bin/bash", "-c", functions + script], capture_output=True, check=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(NASTY, max_size=3))
def test_bash_hands_docker_exactly_the_arguments_that_were_given(words):
    queued = job("queued", overrides=words, environment={f"V{i}": word for i, word in enumerate(words)})
    done = bash(
        startup_script(queued),
        functions="""gcloud() { :; }; docker() { [ "$1" != run ] || printf '%s\\0' "$@"; }\n""",
    )
    got = done.stdout.decode().split("\0")[:-1]
    assert got[-len(queued.command) :] == queued.command
    assert [got[i + 1] for i, word in enumerate(got) if word == "--env"][3:] == [
        f"V{i}={word}" for i, word in enumerate(words)
    ]


@settings(max_examples=30, deadline=None)
@given(st.lists(NASTY, max_size=3))
def test_the_printed_script_gives_gcloud_the_whole_startup_script(words):
    queued = job("queued", overrides=words)
    # mktemp names the open standard error: what cat writes there is what gcloud would read.
    done = bash(render(queued), functions="mktemp() { echo /dev/stderr; }; gcloud() { printf '%s\\0' \"$@\"; }\n")
    assert done.stderr.decode() == startup_script(queued)
    assert done.stdout.decode().split("\0")[:-1] == create_command(queued, "/dev/stderr")[1:]


@pytest.mark.parametrize(
    ("statuses", "ends_with", "starts"),
    [
        ([0], 0, 1),
        ([2], 2, 1),
        ([75] * 5 + [0], 0, 6),
        ([1, 75, 137, 0], 0, 4),
        ([1, 134, 1, 0], 1, 3),
        ([86, 75, 86, 75, 86], 86, 5),
    ],
)
def test_a_machine_restarts_after_preemption_without_limit_and_after_crashes_up_to_it(statuses, ends_with, starts):
    functions = f"""sleep() {{ :; }}; gcloud() {{ :; }}; statuses=({" ".join(map(str, statuses))}); n=0
    docker() {{ [ "$1" != run ] && return; echo start; return ${{statuses[n++]}}; }}
    """
    done = bash(startup_script(job("queued", max_restarts=2)), functions=functions)
    assert (done.returncode, done.stdout.count(b"start")) == (ends_with, starts)


def test_an_image_that_cannot_be_pulled_at_once_costs_no_restart():
    functions = """sleep() { echo wait; }; gcloud() { :; }; n=0
    docker() { case $1 in pull) [ $((n++)) -ge 3 ] ;; run) echo start ;; esac; }
    """
    done = bash(startup_script(job("queued", max_restarts=0)), functions=functions)
    assert (done.returncode, done.stdout.split()) == (0, [b"wait"] * 3 + [b"start"])


def test_crashes_before_an_hour_of_training_are_not_counted_with_those_after():
    functions = """sleep() { :; }; gcloud() { :; }; seconds=(0 4000 0 0); n=0
    docker() { [ "$1" != run ] && return; echo start; SECONDS=$((SECONDS + ${seconds[n++]})); return 1; }
    """
    done = bash(startup_script(job("queued", max_restarts=1)), functions=functions)
    assert (done.returncode, done.stdout.count(b"start")) == (1, 3)


def test_the_command_asks_for_slices_by_the_names_of_google():
    words = create_command(job("queued", slices=2, spot=True, project="p"), "s")
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mobilemoe-s"]
    assert {
        "--node-count=2", "--node-prefix=mobilemoe-s", "--accelerator-type=v5litepod-256", "--zone=us-west4-a",
        "--runtime-version=v2-alpha-tpuv5-lite", "--project=p", "--spot", "--metadata-from-file=startup-script=s",
    } == set(words[6:])  # fmt: skip
    one = create_command(job("queued", topology="v5p:4x4x16", reservation="r"), "s")
    assert one[:2] == ["gcloud", "alpha"]  # only there can a reservation be named
    assert {"--node-id=mobilemoe-s", "--type=v5p", "--topology=4x4x16", "--reservation=r"} <= set(one)
    assert not [word for word in one if word.startswith(("--accelerator-type", "--node-count"))]


def test_the_container_has_the_hosts_network_and_the_time_for_its_final_save_and_the_machine_its_account():
    queued = job("queued", grace_seconds=90, service_account="trainer@p")
    done = bash(
        startup_script(queued), functions="""gcloud() { :; }; docker() { [ "$1" != run ] || echo "$@"; }\n"""
    )
    words = done.stdout.decode().split()
    options = words[: words.index(queued.image)]
    # Processes of other machines reach the coordinator by the host's own address; the TPU needs its devices.
    assert {"--network=host", "--ipc=host", "--privileged", "--ulimit=memlock=-1", "--stop-timeout=90"} <= set(
        options
    )
    assert "--service-account=trainer@p" in create_command(queued, "s")
    assert not [word for word in create_command(job("queued"), "s") if "service-account" in word]


def test_the_commands_for_all_workers_are_printed():
    text = render(job("queued", slices=2))
    for words in (
        "ssh mobilemoe-s --zone=us-west4-a --node=all --worker=all",
        "describe mobilemoe-s",
        "delete mobil",
    ):
        assert f"queued-resources {words}" in text


def test_what_queued_resources_cannot_give_is_refused(capfd):
    with pytest.raises(UserError, match="use gke or xpk"):
        create_command(job("queued", topology="tpu7x-128"), "s")
    assert run(*QUEUED) == 2
    assert "add --zone" in capfd.readouterr().err


def test_submit_gives_gcloud_the_script_that_was_printed(tmp_path, monkeypatch, capfd, bucket):
    log = fake_tools(tmp_path / "bin", monkeypatch, "gcloud")
    assert run(*QUEUED, "--zone", "z", *SUBMIT) == 0
    (create,) = calls(log)
    assert create["words"][:4] == ["compute", "tpus", "queued-resources", "create"]
    assert create["files"]["startup"] in capfd.readouterr().out
    monkeypatch.setenv("PATH", "")
    assert run(*QUEUED, "--zone", "z", *SUBMIT) == 2
    assert "gcloud is not on PATH" in capfd.readouterr().err
