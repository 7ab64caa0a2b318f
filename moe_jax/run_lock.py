"""One trainer a run folder: a second one would remove the first one's save under way.

A local folder is locked by the kernel, which lets go when the holder dies. A bucket holds a lease: an object made
only where none is, whose holder touches it; one that is not touched any more may be taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe_jax.errors import UserError
from moe_jax.files import AnyPath, is_remote, location, remote_filesystem

BEAT_SECONDS = 20.0
_BEATS_TO_STALE = 6
_NAME, _HOLDER = ".lock", "process {} on {}"
_OBJECT = "b/{}/o/{}"
# A variable by which a launcher says that of processes with this value only the newest is alive.
OWNER = "MOE_JAX_OWNER"


@contextlib.contextmanager
def exclusive(run_dir: AnyPath) -> Iterator[Callable[[], None]]:
    """Hold the run folder, made where it is missing; UserError naming process and host of another holder.

    In a bucket, the lease of a process that is not known to be dead (by its id, or by OWNER) is watched for up to
    two minutes before it is taken over, so that a killed run starts again by itself. The function that this yields
    raises UserError where the lease was lost, as to a machine that stood still for so long; call it before each
    save.
    """
    require_plain(run_dir)
    with _leased(str(location(run_dir))) if is_remote(run_dir) else _locked(Path(location(run_dir))) as check:
        yield check


def holder(run_dir: AnyPath) -> str:
    """Who trains in the folder now, as its lock tells; empty if nobody does. The lock itself is left alone."""
    folder = location(run_dir)
    lock = folder / _NAME
    try:
        if is_remote(folder):
            updated = remote_filesystem().info(str(lock))["mtime"].timestamp()
            return json.loads(lock.read_text())["holder"] if time.time() - updated < _patience() else ""
        text = lock.read_text().strip()
    except (FileNotFoundError, ValueError):  # a run copied into a bucket brings a lock that is no lease
        return ""
    if (match := re.fullmatch(_HOLDER.format(r"(\d+)", r"(\S+)"), text)) is None:
        return ""
    if match[2] != socket.gethostname():  # a disk that several machines share
        age = time.time() - max(Path(path).stat().st_mtime for path in (lock, *Path(folder).glob("*.jsonl*")))
        return text if age < _patience() else ""
    return text if any(path == os.path.realpath(lock) for path in _open_files(int(match[1]))) else ""


def _open_files(process: int) -> Iterator[str]:
    try:
        names = os.listdir(f"/proc/{process}/fd")
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(f"/proc/{process}/fd/{name}")
        except OSError:
            continue


def require_plain(run_dir: AnyPath) -> None:
    """UserError for a path that Orbax, which looks for its files by patterns, would find nothing in."""
    whole = str(location(run_dir)) if is_remote(run_dir) else os.path.abspath(location(run_dir))
    if re.search(r"[\[\]\\]", whole):
        raise UserError(
            f"no checkpoint can be written in {whole}, for its bracket or backslash; name another folder"
        )


def _patience() -> float:
    """Seconds after which a sign of life is none."""
    return _BEATS_TO_STALE * BEAT_SECONDS


def _myself() -> str:
    return _HOLDER.format(os.getpid(), socket.gethostname())


def _in_use(run_dir: object, holder: str) -> UserError:
    return UserError(f"{run_dir} is in use by {holder or 'another run'}; wait for it or stop it")


@contextlib.contextmanager
def _locked(run_dir: Path) -> Iterator[Callable[[], None]]:
    with contextlib.ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((run_dir / _NAME).open("a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(_myself())
            file.flush()
        except BlockingIOError:
            raise _in_use(run_dir, (run_dir / _NAME).read_text().strip()) from None
        except OSError as error:
            raise UserError(f"cannot lock {run_dir}: {error.strerror}; name another folder") from None
        yield lambda: None


@contextlib.contextmanager
def _leased(run_dir: str) -> Iterator[Callable[[], None]]:
    path, stop, lost = f"{run_dir}/{_NAME}", threading.Event(), threading.Event()
    generation = _acquire(run_dir, path)
    beat = threading.Thread(target=_keep, args=(path, generation, stop, lost), daemon=True)
    beat.start()

    def check() -> None:
        if lost.is_set():
            raise UserError(f"{run_dir} was taken over by another run while this one stood still; stop one of them")

    try:
        yield check
    finally:
        stop.set()
        beat.join()
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # taken over meanwhile
            _remove(path, {"generation": generation})


def _acquire(run_dir: str, path: str) -> str:
    """The generation of a lease of our own."""
    lease = {"holder": _myself(), "pid": os.getpid(), "pids_of": _pids_of(), "owner": os.environ.get(OWNER, "")}
    seen, since = None, time.monotonic()
    while True:
        with contextlib.suppress(FileExistsError):
            return remote_filesystem().pipe_file(path, json.dumps(lease).encode(), mode="create")["generation"]
        try:
            state, other = _look(path)
        except FileNotFoundError:
            continue
        if seen not in (None, state):
            raise _in_use(run_dir, other["holder"])
        patience = _patience()
        if _is_dead(other) or time.monotonic() - since > patience:
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # it beats again, or a third was first
                _remove(path, state)
            seen, since = None, time.monotonic()
            continue
        if seen is None:
            print(f"{run_dir}: up to {patience:.0f} s for a sign of {other['holder']}", file=sys.stderr, flush=True)
        seen = state
        time.sleep(BEAT_SECONDS / 4)


def _pids_of() -> str:
    """What process ids count within: this start of the kernel, this namespace; empty where that is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _is_dead(lease: dict[str, Any]) -> bool:
    if lease.get("owner") and lease["owner"] == os.environ.get(OWNER):
        return True  # asked first: a container's successor often has its namespace's number and its process id
    return lease["pids_of"] == _pids_of() != "" and not Path(f"/proc/{lease['pid']}").exists()


def _look(path: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Generation and metageneration, and content, of the lease that stands; FileNotFoundError without one."""
    files = remote_filesystem()
    stored = files.call("GET", _OBJECT, *files.split_path(path)[:2], json_out=True)
    try:
        lease = json.loads(files.cat_file(path))
    except ValueError:  # no lease, but the lock of a local folder that was copied to the bucket: nobody beats it
        lease = {"holder": "another run", "pid": 0, "pids_of": None}
    return {k: stored[k] for k in ("generation", "metageneration")}, lease


def _keep(path: str, generation: str, stop: threading.Event, lost: threading.Event) -> None:
    """Touch the lease, which counts its metageneration up, until told to stop or until it is another's."""
    files = remote_filesystem()
    while not stop.wait(BEAT_SECONDS):
        beat = {"metadata": {"beat": str(time.time())}}
        try:
            files.call("PATCH", _OBJECT, *files.split_path(path)[:2], ifGenerationMatch=generation, json=beat)
        except (FileNotFoundError, FileExistsError):
            lost.set()
            return
        except Exception:  # a bucket out of reach: the next beat tries again
            continue


def _remove(path: str, state: dict[str, str]) -> None:
    """Remove exactly this lease; FileExistsError where it changed, FileNotFoundError where it is gone."""
    files = remote_filesystem()
    conditions = {f"if{name.capitalize()}Match": value for name, value in state.items()}
    files.call("DELETE", _OBJECT, *files.split_path(path)[:2], **conditions)
