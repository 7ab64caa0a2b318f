"""Run folders and data in a bucket, on a real object-store protocol over loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import requests
from gcsfs import retry

from moe_jax import files, run_lock
from moe_jax.command_line import guarded
from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data.pipeline import make_train_iterator
from moe_jax.data.sources import iter_documents
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import MISTAKEN, UNAVAILABLE, UserError
from moe_jax.files import (
    LineLog,
    cut_lines,
    location,
    parts,
    read_lines,
    remote_filesystem,
    sizes_below,
    write_bytes,
    write_json,
)
from moe_jax.run_lock import exclusive
from moe_jax.train.catalogue import clean, complete_steps, set_aside_names
from moe_jax.train.run_folder import changed_options
from tests.children import HOLD, child
from tests.data.helpers import same, sentence, take, write
from tests.object_store import BUCKET, object_store

BEAT = 0.5  # six of them without a sign of life, and a lease is stale


@pytest.fixture(scope="module", autouse=True)
def store() -> Iterator[None]:
    with object_store() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    return f"gs://{BUCKET}/{request.node.name.partition('[')[0]}"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", BEAT)


@pytest.mark.parametrize("end", [b"", b"\r", b"\n", b"\r\n", b"\r\r", b"\n\r"])
@pytest.mark.parametrize("size", [0, 1, 3, 6 << 20])
def test_whole_files_come_back_as_they_were_written(folder, size, end):
    data = (b"--a\r\n--\0\xff\r" * (size // 10 + 1))[:size] + end
    path = location(folder) / "deep" / "file.bin"
    for content in (b"older", data):
        write_bytes(path, content)
    assert path.read_bytes() == data and path.stat().length == len(data)
    write_json(f"{folder}/a.json", {"b": [1]})
    assert json.loads(location(f"{folder}/a.json").read_text()) == {"b": [1]}


def test_files_below_a_folder_are_listed_alike_on_a_disk_and_in_a_bucket(folder, tmp_path):
    for root in (folder, str(tmp_path)):
        for name in ("a/b/c", "a/d", "e"):
            write_bytes(f"{root}/run/{name}", name.encode())
        write_bytes(f"{root}/run.other/f", b"beside it")
        assert sizes_below(f"{root}/run") == {"a/b/c": 5, "a/d": 3, "e": 1}
        assert sizes_below(f"{root}/none") == {}


def test_a_folder_may_have_its_parents_name(folder):
    for name in ("sft/sft/config.json", "sft/qat/config.json"):
        write_json(f"{folder}/{name}", {})
    assert sorted(path.name for path in files.folders_in(f"{folder}/sft")) == ["qat", "sft"]


def test_what_a_peer_writes_and_removes_is_seen_at_once(folder):
    write_bytes(f"{folder}/1/a", b"a")
    peer = fsspec.filesystem("gcs", skip_instance_cache=True)
    for step in ("2", "3"):
        assert step not in {path.name for path in location(folder).iterdir()}
        peer.pipe_file(f"{folder}/{step}/a", b"a")
        assert step in {path.name for path in location(folder).iterdir()}
    peer.rm(f"{folder}/3", recursive=True)
    assert not location(f"{folder}/3").exists() and {path.name for path in location(folder).iterdir()} == {"1", "2"}


def test_a_log_can_be_read_once_flushed_and_is_gone_on_with(folder):
    path = f"{folder}/log.jsonl"
    assert read_lines(path) == []
    for number in (0, 2):
        log = LineLog(path)
        log.write({"n": number})
        log.flush()
        assert [line["n"] for line in read_lines(path)] == list(range(number + 1))
        log.write({"n": number + 1})
        log.close()
    assert [line["n"] for line in read_lines(path)] == [0, 1, 2, 3]


def test_a_log_that_nobody_flushes_is_sent_by_itself(folder, monkeypatch):
    monkeypatch.setattr("moe_jax.files._SECONDS", 0.05)
    log = LineLog(f"{folder}/log.jsonl")
    log.write({"n": 1})
    deadline = time.monotonic() + 60
    while not read_lines(f"{folder}/log.jsonl") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert read_lines(f"{folder}/log.jsonl") == [{"n": 1}]
    log.close()


OUTAGES = [
    requests.exceptions.ProxyError(),
    retry.aiohttp.client_exceptions.ClientConnectionError("reset by peer"),
    TimeoutError(),
    retry.HttpError({"code": 503, "message": "backend error"}),
    retry.google.auth.exceptions.TransportError("no metadata server"),
]
DENIED = OSError("Forbidden: https://storage/b/o\naccount has no storage.objects.list access")


def break_bucket(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def fail(*_, **__):
        raise error

    monkeypatch.setattr("gcsfs.core.GCSFileSystem._call", fail)


@pytest.mark.parametrize("error", [*OUTAGES, DENIED], ids=lambda error: type(error).__name__)
def test_a_bucket_that_does_not_answer_is_not_taken_for_an_empty_one(folder, error, monkeypatch):
    """Else a run would start again from step 0 and go over its log."""
    write_json(f"{folder}/config.json", {})
    for step in ("4", "6"):
        write_json(f"{folder}/checkpoints/{step}/checksums.json", {})
    assert complete_steps(folder) == [4, 6]

    break_bucket(monkeypatch, error)
    looks = [complete_steps, set_aside_names, clean, lambda run: changed_options(None, location(run))]  # pyrefly: ignore
    for look in looks:
        with pytest.raises(type(error)):
            look(folder)
        assert guarded(look, folder) == (MISTAKEN if error is DENIED else UNAVAILABLE)


@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: type(error).__name__)
def test_a_log_that_an_outage_keeps_from_being_sent_is_no_mistake(folder, error, monkeypatch, capsys):
    log = LineLog(f"{folder}/log.jsonl")
    break_bucket(monkeypatch, error)
    log.write({"n": 1})
    assert guarded(lambda _: log.flush(), None) == UNAVAILABLE
    assert "error: cannot write gs://" in capsys.readouterr().err


def test_a_log_in_a_bucket_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"cannot write gs://none/log\.jsonl: .*mend the access"):
        log = LineLog("gs://none/log.jsonl")
        log.write({"n": 1})
        log.flush()


def numbers(path: str) -> list[int]:
    return [line["n"] for line in read_lines(path)]


def generations(path: str) -> dict[str, str]:
    return {part.name: remote_filesystem().info(str(part))["generation"] for part in parts(path)}


def test_of_a_long_log_only_the_last_object_is_put_again_and_held(folder, monkeypatch):
    monkeypatch.setattr("moe_jax.files.PART_BYTES", 30)
    path, before, count = f"{folder}/log.jsonl", {}, 0
    for more in (5, 3, 4, 5):  # opened anew in the middle of an object and where one is full
        log = LineLog(path)
        for _ in range(more):
            log.write({"n": count})
            count += 1
            log.flush()
            after = generations(path)
            changed = [name for name in after if after[name] != before.get(name)]
            assert changed == list(after)[-1:] and sum(map(len, log._lines)) < 60
            before = after
        log.close()
        assert generations(path) == before and numbers(path) == list(range(count))
    assert [part.read_bytes().count(b"\n") for part in parts(path)] == [4, 4, 4, 3, 2]
    assert list(before) == ["log.jsonl", *(f"log.jsonl.000{number}" for number in range(1, 5))]


def test_a_long_object_of_another_version_is_not_put_again(folder, monkeypatch):
    monkeypatch.setattr("moe_jax.files.PART_BYTES", 30)
    path = f"{folder}/log.jsonl"
    write_bytes(path, b'{"n": 0}\n' * 9 + b'{"n"')  # copied from a disk, with a torn line
    before = generations(path)
    log = LineLog(path)
    log.write({"n": 1})
    log.close()
    assert generations(path).items() > before.items() and numbers(path) == [0] * 9 + [1]


def test_a_put_that_fails_leaves_no_gap_in_a_log_and_is_made_up_for(folder, monkeypatch):
    monkeypatch.setattr("moe_jax.files.PART_BYTES", 1)
    path, log = f"{folder}/log.jsonl", LineLog(f"{folder}/log.jsonl")
    log.write({"n": 0})
    log.flush()
    with monkeypatch.context() as patch:
        patch.setattr("moe_jax.files.write_bytes", lambda *_: os.listdir("/none"))
        for number in (1, 2):
            log.write({"n": number})
            with pytest.raises(UserError, match=r"cannot write .*/log\.jsonl\.0001: No such file"):
                log.flush()
    log.close()
    assert numbers(path) == [0, 1, 2] and list(generations(path)) == ["log.jsonl", "log.jsonl.0001"]


def test_parts_of_a_log_are_in_the_order_of_their_numbers(folder, tmp_path):
    for root in (folder, str(tmp_path)):
        for name in ("log.jsonl.10000", "log.jsonl.9999", "log.jsonl", "log.jsonl.bak", "log.jsonl.1", "a.jsonl"):
            write_bytes(f"{root}/{name}", b"{}\n")
        names = [part.name for part in parts(f"{root}/log.jsonl")]
        assert names == ["log.jsonl", "log.jsonl.9999", "log.jsonl.10000"]
        assert parts(f"{root}/none.jsonl") == parts(f"{root}/none/log.jsonl") == []


class Killed(BaseException):
    """What nobody catches."""


@pytest.mark.parametrize("place", ["bucket", "disk"])
@pytest.mark.parametrize(("kept", "changes"), [(20, 0), (19, 1), (10, 3), (8, 3), (1, 5), (0, 5)])
def test_a_cut_killed_before_any_of_its_changes_keeps_lines_and_order(
    folder, tmp_path, monkeypatch, place, kept, changes
):
    path = f"{folder if place == 'bucket' else tmp_path}/[{kept}]/log.jsonl"  # brackets are no pattern
    lines = [json.dumps({"n": number}).encode() + b"\n" for number in range(20)]
    left = 0

    def mortal(change):
        def call(*values):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            change(*values)

        return call

    for survived in range(changes + 1):
        for part in range(5):
            write_bytes(path + f".{part:04d}" * (part > 0), b"".join(lines[4 * part : 4 * part + 4]))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for name in ("write_bytes", "_remove"):
                patch.setattr(f"moe_jax.files.{name}", mortal(getattr(files, name)))
            left = survived
            cut = cut_lines(path, lambda line: line["n"] >= kept)
            assert survived == changes and [line["n"] for line in cut] == list(range(19, kept - 1, -1))
        found = numbers(path)
        assert found == list(range(len(found))) and len(found) >= kept and (left == 0) == (survived == changes)
        cut_lines(path, lambda line: line["n"] >= kept)
        assert numbers(path) == list(range(kept))
        log = LineLog(path)
        log.write({"n": kept})
        log.close()
        assert numbers(path) == list(range(kept + 1)) and len(parts(path)) == max(1, -(-kept // 4))


def test_a_second_holder_is_refused_while_the_first_lives_and_let_in_when_it_is_killed(folder, quick):
    with child(HOLD, folder, BEAT) as process:
        for _ in range(2):
            with pytest.raises(UserError, match=f"in use by process {process.pid} on {os.uname().nodename}; wait"):
                exclusive(folder).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with exclusive(folder) as check:
            check()
    assert not location(f"{folder}/.lock").exists()


def test_a_lease_of_another_machine_is_taken_over_once_it_is_stale(folder, quick, capsys):
    write_json(f"{folder}/.lock", {"holder": "process 1 on afar", "pid": os.getpid(), "pids_of": "another kernel"})
    begin = time.monotonic()
    with exclusive(folder):
        assert time.monotonic() - begin > 6 * BEAT
        assert "process 1 on afar" not in location(f"{folder}/.lock").read_text()
    assert "up to 3 s for a sign of process 1 on afar" in capsys.readouterr().err


def test_a_lease_of_the_same_owner_is_that_of_a_process_before(folder, monkeypatch, capsys):
    """Else every restart of a pod would cost two minutes of all its chips."""
    stale = {"holder": "process 1 on afar", "pid": os.getpid(), "pids_of": "another kernel", "owner": "uid"}
    monkeypatch.setenv("MOE_JAX_OWNER", "uid")
    for pids_of in ("another kernel", run_lock._pids_of()):  # and the container's number, which is given again
        write_json(f"{folder}/.lock", stale | {"pids_of": pids_of})
        with exclusive(folder):
            assert json.loads(location(f"{folder}/.lock").read_text())["owner"] == "uid"
    assert "sign of" not in capsys.readouterr().err
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", BEAT)
    for other in ("", "another"):
        monkeypatch.setenv("MOE_JAX_OWNER", other)
        write_json(f"{folder}/.lock", stale | {"owner": "" if not other else "uid"})
        with exclusive(folder):
            assert "for a sign of process 1 on afar" in capsys.readouterr().err


def test_a_lock_that_was_copied_from_a_disk_is_no_lease(folder, quick):
    write_bytes(f"{folder}/.lock", b"process 1 on afar")
    with exclusive(folder):
        assert "pids_of" in location(f"{folder}/.lock").read_text()


def test_of_many_that_start_at_one_time_one_holds_the_folder(folder):
    script = f"""
from moe_jax import run_lock
run_lock.BEAT_SECONDS = {BEAT}
run_lock.remote_filesystem()
print("ready", flush=True)
sys.stdin.readline()
try:
    with run_lock.exclusive(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.read()
except run_lock.UserError as error:
    print(error, flush=True)
"""
    with contextlib.ExitStack() as stack:
        starters = [stack.enter_context(child(script, folder)) for _ in range(3)]
        for starter in starters:
            print("go", file=starter.stdin, flush=True)
        said = [starter.stdout.readline() for starter in starters if starter.stdout]
    (holder,) = (starter for starter, line in zip(starters, said, strict=True) if line == "held\n")
    refused = [line for line in said if f"{folder} is in use by process {holder.pid} on " in line]
    assert len(refused) == 2


def test_a_holder_that_lost_its_lease_is_told(folder, quick):
    with exclusive(folder) as check:
        check()
        remote_filesystem().rm(f"{folder}/.lock")
        write_json(f"{folder}/.lock", {"holder": "another", "pid": 0, "pids_of": ""})
        deadline = time.monotonic() + 60
        with pytest.raises(UserError, match="was taken over by another run"):
            while time.monotonic() < deadline:
                check()
                time.sleep(0.02)
    assert json.loads(location(f"{folder}/.lock").read_text())["holder"] == "another"


def upload(source: Path, target: str) -> None:
    for path in source.iterdir():
        write_bytes(f"{target}/{path.name}", path.read_bytes())


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "array_record"])
def test_every_kind_of_file_is_read_from_a_bucket_as_from_a_disk(folder, tmp_path, kind):
    local = write(tmp_path, kind, "text", [sentence(i, 20) for i in range(12)])
    upload(tmp_path, f"{folder}/{kind}")
    found = list(iter_documents(SourceConfig(f"{folder}/{kind}/{Path(local).name}")))
    assert found == list(iter_documents(SourceConfig(local))) and len(found) == 12


def test_batches_from_a_bucket_are_those_from_a_disk_and_a_changed_object_is_named(folder, tmp_path):
    trained = Tokenizer.train([sentence(i, 40) for i in range(20)], 300)
    trained.save(f"{folder}/tokenizer.json")
    tokenizer = Tokenizer.load(f"{folder}/tokenizer.json")
    assert tokenizer.fingerprint == trained.fingerprint
    (tmp_path / "texts").mkdir()
    local = write(tmp_path / "texts", "txt", "text", [sentence(i, 50) for i in range(12)])
    upload(tmp_path / "texts", f"{folder}/texts")
    on_disk = DataConfig((SourceConfig(local),), seq_len=32, global_batch_size=2, cache_dir=f"{tmp_path}/cache")
    in_bucket = dataclasses.replace(on_disk, sources=(SourceConfig(f"{folder}/texts/*.txt"),))
    here, there = (make_train_iterator(config, tokenizer) for config in (on_disk, in_bucket))
    assert same(take(here, 10), take(there, 10))
    assert make_train_iterator(in_bucket, tokenizer).set_state(here.get_state()) == []
    state = there.get_state()
    content = location(f"{folder}/texts/7.txt").read_bytes()
    for change, words in ((content[:-1], "is shorter"), (b"X" + content[1:], "has other content")):
        write_bytes(f"{folder}/texts/7.txt", change)
        with pytest.raises(UserError, match=f"{folder}/texts/7.txt {words}"):
            make_train_iterator(in_bucket, tokenizer).set_state(state)


def test_paths_in_a_bucket_that_cannot_be_used_are_named(folder):
    write_bytes(f"{folder}/empty.txt", b"")
    write_bytes(f"{folder}/table.csv", b"a")
    write_bytes(f"{folder}/bad.txt", b"\xff")
    for path, words in (
        (f"{folder}/none*", "no file matches"),
        (f"{folder}/empty.txt", "is empty"),
        (f"{folder}/table.csv", "is of no known kind"),
        (f"{folder}/bad.txt", f"{folder}/bad.txt is not UTF-8 at byte 0"),
        ("gs://none/a.txt", "no file matches"),
    ):
        with pytest.raises(UserError, match=words):
            list(iter_documents(SourceConfig(path)))
    with pytest.raises(UserError, match=f"there is no tokenizer at {folder}/tokenizer.json"):
        Tokenizer.load(f"{folder}/tokenizer.json")
