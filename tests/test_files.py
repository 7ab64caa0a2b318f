"""Logs survive a kill, and a run folder has one holder."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_jax.errors import UserError
from moe_jax.files import LineLog, cut_lines, is_remote, location, read_lines, write_json
from moe_jax.run_lock import exclusive
from tests.children import HOLD, child


def test_a_location_is_absolute_on_a_disk_and_kept_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(location("a/../b")) == f"{tmp_path}/b" and str(location("gs://b/a") / "c") == "gs://b/a/c"
    assert str(location(Path("gs://b/a"))) == "gs://b/a"  # pathlib made it gs:/b/a
    assert [is_remote(path) for path in ("gs://b", Path("gs://b"), location("gs://b/a"), "/gs/b", "gs")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_remote_files_cost_nothing_before_the_first_of_them():
    script = "import sys, moe_jax.files as f; f.location('a'); print({'fsspec', 'gcsfs'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


def test_a_line_is_there_when_write_returns_and_a_log_is_gone_on_with(tmp_path):
    for number in range(3):
        log = LineLog(tmp_path / "folder" / "log.jsonl")
        log.write({"number": number})
        assert read_lines(tmp_path / "folder" / "log.jsonl") == [{"number": n} for n in range(number + 1)]
        log.close()
    assert read_lines(tmp_path / "none.jsonl") == []


def test_lines_of_a_killed_process_stay_and_its_torn_one_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    script = (
        "from moe_jax.files import LineLog\nlog = LineLog(sys.argv[1])\nlog.write({'a': 1})\n"
        "open(sys.argv[1], 'a').write('{\"a\": 2, \"b')\nprint('written', flush=True)\nsys.stdin.read()"
    )
    with child(script, path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.read_bytes().endswith(b'"b') and read_lines(path) == [{"a": 1}]
    log = LineLog(path)
    log.write({"a": 3})
    log.close()
    assert path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_log_is_on_the_disk_when_flush_returns_and_not_at_each_line(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    log = LineLog(tmp_path / "log.jsonl")
    log.write({"a": 1})
    assert synced == []
    log.flush()
    assert synced == [len('{"a": 1}\n')]
    log.close()


def test_a_log_on_a_disk_is_one_file_however_long(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_jax.files.PART_BYTES", 10)
    log = LineLog(tmp_path / "log.jsonl")
    for number in range(9):
        log.write({"n": number})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert len(read_lines(tmp_path / "log.jsonl")) == 9


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"log\.jsonl line 2 is damaged; remove that line"):
        read_lines(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"log\.jsonl line 2 is damaged; remove that line"):
        cut_lines(tmp_path / "log.jsonl", lambda _: True)


def test_a_log_that_cannot_grow_is_named(tmp_path):
    log, (soft, hard) = LineLog(tmp_path / "log.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        log.write({"a": 1})
        with pytest.raises(UserError, match=r"cannot write .*log\.jsonl: File too large; make room"):
            log.write({"a": "b" * 20})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_lines(tmp_path / "log.jsonl") == [{"a": 1}]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*x\.jsonl: Not a directory"):
        LineLog(tmp_path / "file" / "x.jsonl")


def test_a_second_process_is_refused_and_told_by_whom_until_the_first_is_killed(tmp_path):
    run = tmp_path / "runs" / "a"
    with child(HOLD, run) as process:
        for _ in range(2):  # the refused one took nothing away
            with pytest.raises(UserError, match=f"a is in use by process {process.pid} on {os.uname().nodename}; "):
                exclusive(run).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with exclusive(run) as check:
            check()
    with child(HOLD, run):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot lock .*file/run: Not a directory; name another folder"):
        exclusive(tmp_path / "file" / "run").__enter__()


def test_json_is_readable(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path, monkeypatch):
    def fail_after_one_byte(self, data):
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fail_after_one_byte)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_link_is_written_through_and_a_pipe_written_to(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "1\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", 2)
    assert os.read(reader, 9) == b"2\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize("name", ["a[1]", "a]", "a\\b"])
def test_a_folder_in_whose_path_orbax_would_find_nothing_is_refused_before_it_is_made(tmp_path, name, monkeypatch):
    with pytest.raises(UserError, match="for its bracket or backslash; name another folder"):
        exclusive(tmp_path / name / "run").__enter__()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="for its bracket or backslash"):
        exclusive("run").__enter__()
