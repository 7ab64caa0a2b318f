"""A model so small that compilation is all its cost, a corpus for it, and one finished run to compare with."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest

from moe_jax.config import DataConfig, ModelConfig, MoEConfig, RunConfig, SourceConfig
from moe_jax.data.commands import build_tokenizer
from moe_jax.files import write_json
from moe_jax.overrides import apply, to_dict
from moe_jax.train.checkpoint import checkpoint_path, verify
from moe_jax.train.stored import describe, restore_arrays
from moe_jax.train.trainer import fit
from tests.object_store import bucket  # noqa: F401  (a fixture)

WORDS = ("alpha", "beta", "gamma", "delta", "def", "return", "import", "class", "for", "x", "y", "1")
VOCAB = 290


@dataclass(frozen=True)
class Tiny:
    """`root` holds the corpus, `tokenizer.json` and `config.json` of `cfg`; `env` is for child processes."""

    root: Path
    cfg: RunConfig
    env: dict[str, str]

    def variant(self, *overrides: str) -> RunConfig:
        return apply(self.cfg, list(overrides))

    def fit(self, run: Path, *overrides: str) -> Path:
        return Path(fit(self.variant(*overrides), run, jax.devices()[:1]))


def write_corpus(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path.write_text("\n\n".join(" ".join(rng.choices(WORDS, k=200)) for _ in range(40)))


def restore(run: Path, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """(state, stored JSON) of a checkpoint of a run, the last one for None."""
    path = checkpoint_path(run, step)
    verify(path)
    metadata, shapes = describe(path)
    return restore_arrays(path, abstract, shapes), metadata


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    for seed, name in enumerate(("train.txt", "heldout.txt")):
        write_corpus(root / name, seed)
    source = (SourceConfig(str(root / "train.txt")),)
    build_tokenizer(source, VOCAB, root / "tokenizer.json")
    cfg = RunConfig(
        model=ModelConfig(
            num_layers=1,
            d_model=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            moe=MoEConfig(num_experts=4, num_experts_per_tok=2, expert_width=32, shared_expert_width=32),
        ),
        data=DataConfig(
            sources=source,
            heldout=(SourceConfig(str(root / "heldout.txt")),),
            tokenizer=str(root / "tokenizer.json"),
            seq_len=32,
            global_batch_size=4,
            cache_dir=str(root / "tokens"),
        ),
    )
    overrides = ["steps=12", "checkpoint.every_steps=4", "checkpoint.keep=2", "remat=nothing"]
    cfg = apply(cfg, [*overrides, "compute_dtype=float32", "optimizer.learning_rate=0.01"])
    write_json(root / "config.json", to_dict(cfg))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    jax.config.update("jax_compilation_cache_dir", cache["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    package = str(Path(__file__).parents[2])
    env = os.environ | cache | {"PYTHONPATH": package, "JAX_PLATFORMS": "cpu"}
    # Compiled programs are found again only by processes with as many devices.
    return Tiny(root, cfg, env | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())})


@pytest.fixture(scope="session")
def finished(tiny: Tiny) -> Path:
    """The run folder of an uninterrupted run; read it, copy it, do not change it."""
    return tiny.fit(tiny.root / "finished")
