"""Published folders of MobileMoE-S's true shapes: in, out and in again, bit for bit, never twice in memory.

Takes about 20 GB of disk and some minutes, so it has a target of its own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from configs.mobilemoe import SMALL
from conversion.hf_files import Folder
from moe_jax.train.checkpoint import load_parameters
from tests.conversion.folders import write_published

PEAK = """
import sys, threading, time
from pathlib import Path
from conversion.__main__ import main
peak = 0
def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]) * 1024)
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
status = main(sys.argv[1:])
print(peak)
sys.exit(status)
"""


def conversion(*words) -> int:
    """Run a command in a process of its own; the most memory, in bytes, that it could not give back."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, words)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("kind", ["bf16", "int4-g32"])
def test_import_export_import_changes_no_bit(kind, tmp_path):
    allow = ["--allow-requantization"] if kind != "bf16" else []
    published = write_published(tmp_path / "published", SMALL, kind != "bf16")
    peaks = [
        conversion("import", published, tmp_path / "run", *allow),
        conversion("export-hf", tmp_path / "run", tmp_path / "again", "--format", kind),
        conversion("import", tmp_path / "again", tmp_path / "twice", *allow),
    ]
    left, right = Folder(published), Folder(tmp_path / "again")
    assert left.entries.keys() == right.entries.keys()
    for name, entry in left.entries.items():
        assert right.entries[name].dtype == entry.dtype
        assert left.read(name).tobytes() == right.read(name).tobytes(), name
    once, twice = (load_parameters(tmp_path / name)[1] for name in ("run", "twice"))
    assert all(once.pop(path).tobytes() == twice.pop(path).tobytes() for path in list(once)) and not twice
    # Import: what saving a checkpoint of 5 GB has in flight. Export: a few layers.
    assert max(peaks[0], peaks[2]) < 5.5e9 and peaks[1] < 3e9, peaks
