"""launch.json: what was started, and that it is started again exactly."""

from __future__ import annotations

import subprocess
from pathlib import Path

from launch.job import Job
from launch.record import job_record, read_record, write_record
from tests.launch.pod_jobs import SUBMIT, fake_tools, job, run

ROOT = Path(__file__).parents[2]
GKE = ["gke", "mobilemoe_s", "seed=3", "--topology", "v5e-256", "--bucket", "gs://bucket", "--image", "i"]


def test_a_recorded_run_is_rebuilt_exactly_and_refused_once_its_config_is_another(
    tmp_path, monkeypatch, capfd, bucket
):
    fake_tools(tmp_path / "bin", monkeypatch, "kubectl")
    assert run(*GKE, "--spot", "--env", "A=$b", *SUBMIT) == 0
    first = capfd.readouterr().out
    assert run("resume", f"{bucket}/mobilemoe-s") == 0
    assert capfd.readouterr().out == first

    given_job = job(spot=True)
    record = job_record("gke", given_job.to_dict(), given_job.config, given_job.overrides)
    assert record["versions"]["jax"] and record["environment"].keys() >= {"JAX_PLATFORMS"}
    write_record(str(tmp_path / "run"), record)
    stored = read_record(str(tmp_path / "run"))
    assert stored == record and Job(**stored["job"]) == given_job

    stored["resolved"]["mobilemoe_s"]["optimizer"]["learning_rate"] = 1.0
    write_record(str(tmp_path / "run"), stored)
    assert run("resume", str(tmp_path / "run")) == 2
    assert "optimizer.learning_rate" in capfd.readouterr().err
    assert run("resume", str(tmp_path / "none")) == 2
    assert "none was not started by launch; the command that started it goes on" in capfd.readouterr().err
    (tmp_path / "run/launch.json").write_text("{")
    assert run("resume", str(tmp_path / "run")) == 2
    assert "run/launch.json cannot be read" in capfd.readouterr().err


def test_a_copied_run_of_pods_is_refused_and_not_gone_on_with_where_it_was_copied_from(capfd, bucket):
    given_job = job(bucket=bucket)
    record = job_record("gke", given_job.to_dict(), given_job.config, given_job.overrides)
    for run_folder in (f"{bucket}/mobilemoe-s", f"{bucket}/copy"):
        write_record(run_folder, record)
    assert run("resume", f"{bucket}/copy") == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and f"was copied from {bucket}/mobilemoe-s" in error
    assert run("resume", f"{bucket}/mobilemoe-s/") == 0


def test_a_record_holds_commit_difference_and_new_files(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    (tmp_path / "code.py").write_text("old\n")
    git("add", "code.py")
    git("commit", "-m", "one")
    (tmp_path / "code.py").write_text("changed\n")
    (tmp_path / "new file.py").write_text("")
    monkeypatch.setattr("moe_jax.repository.ROOT", tmp_path)
    found = job_record("gke", {}, "mobilemoe_s", [])["git"]
    assert found["commit"] == git("rev-parse", "HEAD") and found["untracked"] == ["new file.py"]
    assert "-old\n+changed\n" in found["diff"]
    (tmp_path / "site-packages").mkdir()  # installed there: the repository around it is somebody else's
    for place in ("none", "site-packages"):
        monkeypatch.setattr("moe_jax.repository.ROOT", tmp_path / place)
        assert job_record("gke", {}, "mobilemoe_s", [])["git"] == {"commit": "", "diff": "", "untracked": []}
