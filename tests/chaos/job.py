"""The run that the faults strike: a tiny model, a corpus of its own, and `python -m launch local` around it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from moe_jax.config import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
)
from moe_jax.data.commands import build_tokenizer
from moe_jax.files import write_json
from moe_jax.overrides import to_dict

ROOT = Path(__file__).parents[2]
PROCESSES = DEVICES = 2
EVERY, KEEP = 10, 3  # steps between two saves; checkpoints that stay
HANG_SECONDS = 20.0
_RESTARTS = 1000
_ROWS, _LENGTH, _VOCAB = 4, 32, 290
_WORDS = ("alpha", "beta", "gamma", "delta", "def", "return", "import", "class", "for", "x", "y", "1")
_FILES = 4
# Two processes fit two cores only with one thread each; the program is too small to be worth optimising.
_ENVIRONMENT = {
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0",
    "OMP_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}


def write_job(root: Path, steps: int, seed: int) -> Path:
    """Write corpus, tokenizer and config of a run of `steps` below `root`; the config's path.

    The text is of few words and shorter than what the run reads; at one file of noise the loss spikes.
    """
    rng, texts = random.Random(seed), root / "texts"
    texts.mkdir(parents=True)
    words = steps * _ROWS * _LENGTH // (2 * _FILES)  # of 1.4 tokens: every text comes at least once
    for index in range(_FILES):
        (texts / f"{index}.txt").write_text(" ".join(rng.choices(_WORDS, k=words)))
    source = SourceConfig(str(texts / "*.txt"))
    build_tokenizer((source,), _VOCAB, root / "tokenizer.json")
    (texts / "noise.txt").write_text("".join(rng.choices("QWZJKVXYUG#@%^&~|", k=2 * _LENGTH)))
    cfg = RunConfig(
        model=ModelConfig(
            num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=_VOCAB,
            max_position_embeddings=64,
            moe=MoEConfig(num_experts=8, num_experts_per_tok=2, expert_width=64, shared_expert_width=64),
        ),
        data=DataConfig(
            sources=(source,), heldout=(source,), tokenizer=str(root / "tokenizer.json"), seq_len=_LENGTH,
            global_batch_size=_ROWS, cache_dir=str(root / "tokens"),
        ),
        mesh=MeshConfig(fsdp=2, expert=2),
        # Constant, so that a copy of the run may end sooner and still take the same steps.
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
        checkpoint=CheckpointConfig(every_steps=EVERY, keep=KEEP),
        guard=GuardConfig(on_bad_step="skip", spike_factor=1.5, hang_minutes=HANG_SECONDS / 60),
        steps=steps, compute_dtype="float32", remat="nothing",
    )  # fmt: skip
    write_json(root / "config.json", to_dict(cfg))
    return root / "config.json"


class Job:
    """One run folder and the supervisor that works on it, which is started again and again.

    A context manager; at its end nothing of the run is left alive. What the supervisors print goes to `output`.
    """

    def __init__(self, config: Path, run: Path) -> None:
        self.config, self.run, self.output = config, run, run.with_suffix(".log")
        self._supervisor: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._supervisor is not None:
            self.kill()

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        """The one started last."""
        assert self._supervisor is not None
        return self._supervisor

    @property
    def texts(self) -> Path:
        """The folder of the corpus."""
        return self.config.parent / "texts"

    def start(self, *words: str, processes: int = PROCESSES, devices: int = DEVICES) -> None:
        """Start a supervisor on the folder; `words` are overrides and options."""
        self._supervisor = self.another(self.output, *words, processes=processes, devices=devices)

    def another(
        self, output: Path, *words: str, processes: int = PROCESSES, devices: int = DEVICES
    ) -> subprocess.Popen[bytes]:
        """A supervisor on the folder, whichever else is there."""
        command = [sys.executable, "-m", "launch", "local", str(self.config), *words, "--run", str(self.run)]
        command += ["--processes", str(processes), "--devices-per-process", str(devices)]
        compiled = {"JAX_COMPILATION_CACHE_DIR": str(self.config.parent / "compiled")}
        with output.open("ab") as file:
            return subprocess.Popen(
                [*command, "--max-restarts", str(_RESTARTS)], cwd=ROOT, env=os.environ | _ENVIRONMENT | compiled,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL for the supervisor alone; return once its processes are dead too."""
        left = list(self.pids().values())
        self.supervisor.kill()
        self.supervisor.wait()
        while any(map(is_alive, left)):
            time.sleep(0.005)

    def pids(self) -> dict[int, int]:
        """{process: pid} of those that the supervisor has running."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, KeyError):  # ended meanwhile, or forked and not yet the program
                if self._supervisor is not None and _state_and_parent(folder)[1] == self._supervisor.pid:
                    words = (folder / "environ").read_bytes().split(b"\0")
                    variables = dict(word.split(b"=", 1) for word in words if b"=" in word)
                    found[int(variables.get(b"JAX_PROCESS_ID", b"0"))] = int(folder.name)
        return found

    def strike(self, process: int) -> None:
        """SIGKILL for one process."""
        os.kill(self.pids()[process], signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked about its end does not."""
    try:
        return _state_and_parent(Path(f"/proc/{pid}"))[0] not in "ZX"
    except OSError:
        return False


def _state_and_parent(folder: Path) -> tuple[str, int]:
    state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
    return state, int(parent)
