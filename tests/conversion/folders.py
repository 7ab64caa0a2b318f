"""Run folders and published folders of tiny models, for the tests of formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion import hf_files, keymap, weights
from conversion.checkpoint import open_checkpoint
from conversion.hf_companions import write_companions
from conversion.hf_config import hf_config
from conversion.hf_import import layout
from conversion.hf_int4 import masters
from conversion.tensor_file import F16, F32, U8
from moe_jax.config import DataConfig, ModelConfig, MoEConfig, QuantConfig, RopeConfig, RunConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.files import write_json
from moe_jax.overrides import to_dict
from moe_jax.paths import unflatten_paths
from moe_jax.train.checkpoint import Checkpoints

ROUTED = MoEConfig(num_experts=5, num_experts_per_tok=2, expert_width=32, shared_expert_width=160)
# Widths that all differ, so that swapped axes show, and scaled positions within the context.
TINY = ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    max_position_embeddings=1024,
    ffn_width=2 * 32 + 160,
    rope=RopeConfig(10_000.0, 16.0, 64),
    moe=ROUTED,
)
TINY_DENSE = dataclasses.replace(TINY, moe=None)
# Every input is a multiple of 64, so that groups may be as wide.
WIDE = dataclasses.replace(
    TINY, num_heads=8, moe=dataclasses.replace(ROUTED, expert_width=64, shared_expert_width=128)
)


def tiny_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of 270 entries."""
    texts = ["def add(first, second):\n    return first + second\n", "while True:\n    pass\n"] * 3
    return Tokenizer.train(texts, 270)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 JAX parameters off any grid, every kind of tensor non-trivial."""
    rng = np.random.default_rng(seed)
    found = {}
    for path, shape in keymap.jax_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        small = path.startswith("embed") or path.endswith(("bias", "scale"))
        found[path] = np.float32(0.1 if small else shape[-2] ** -0.5) * values + path.endswith("scale")
    return found


def parameters_of_random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 JAX parameters whose quantisation is `weights.random`, code for code."""
    source = weights.random(config, seed)
    int4 = set(source.int4_names())
    read = {name: masters(source.int4(name)) if name in int4 else source.float(name) for name in source.names()}
    return keymap.to_jax(read, config)


def write_checkpoint(
    folder: Path,
    run: RunConfig,
    parameters: dict[str, np.ndarray],
    tokenizer: Tokenizer,
    step: int = 1,
    final: bool = False,
) -> None:
    """Add a checkpoint of `parameters` to a run folder, as the trainer writes it."""
    parts: dict[str, dict[str, np.ndarray]] = {"params": {}, "biases": {}}
    for path, value in parameters.items():
        parts["biases" if path.endswith("bias") else "params"][path] = value
    state = {name: unflatten_paths(flat) for name, flat in parts.items()} | {"step": np.array(step, np.int32)}
    checkpoints = Checkpoints(folder)
    stored = {"config": to_dict(run), "data": {}, "tokenizer": tokenizer.fingerprint}
    checkpoints.save(step, state, stored, final=final)
    checkpoints.wait()


def write_run(
    folder: Path,
    config: ModelConfig,
    parameters: dict[str, np.ndarray],
    quant: QuantConfig | None = None,
    *later: dict[str, np.ndarray],
) -> Path:
    """A finished run as the trainer leaves it; its checkpoints of steps 1 and on hold `parameters` and `later`."""
    run = RunConfig(
        stage="qat" if quant else "sft",
        model=config,
        quant=quant,
        data=DataConfig(tokenizer=str(folder / "tokenizer.json"), seq_len=64),
        steps=1 + len(later),
    )
    tokenizer = tiny_tokenizer()
    write_json(folder / "config.json", to_dict(run))
    tokenizer.save(folder / "tokenizer.json")
    for step, held in enumerate((parameters, *later), 1):
        write_checkpoint(folder, run, held, tokenizer, step, final=step == run.steps)
    return folder


def read_run(folder: Path) -> tuple[RunConfig, dict[str, np.ndarray], weights.Weights]:
    """Config, float32 parameters by path and INT4 weights of a run's last checkpoint."""
    source = open_checkpoint(folder)
    parameters = source.arrays()
    return source.run, parameters, weights.from_parameters(parameters, source.run.model, source.group())


def flip_largest(run_dir: Path) -> None:
    """Damage the one checkpoint of a run: one bit in the middle of its largest file."""
    file = max((run_dir / "checkpoints").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def share_buffer(raw: bytearray, tensor: Any, other: Any) -> None:
    """Let one tensor of a .tflite `raw` have the content of another."""
    place = tensor._tab.Pos + tensor._tab.Offset(8)  # of its field `buffer`
    raw[place : place + 4] = other.Buffer().to_bytes(4, "little")


def write_published(
    folder: Path, config: ModelConfig, int4: bool, seed: int = 0, full: bool = False, wide: bool = False
) -> Path:
    """A folder as published: random BF16, or random codes of any kind with scales that bfloat16 does not hold.

    With `full`, codes and scales are such as rounding to the nearest makes: every group reaches the grid's end.
    With `wide`, floats are F32 where they may be.
    """
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer.json")
    content = (folder / "tokenizer.json").read_bytes()
    write_companions(folder, tokenizer, content, config.max_position_embeddings)
    write_json(folder / "config.json", hf_config(config, tokenizer, int4))
    described = {
        name: (F32 if wide and F32 in types else types[0], shape)
        for name, (types, shape) in layout(config, int4).items()
    }
    rng = np.random.default_rng(seed)

    def arrays():
        for name, (kind, shape) in described.items():
            if kind == U8:
                codes = rng.integers(0, 256, shape, np.uint8)
                if full:  # a code of 7 in each group of 32
                    codes.reshape(-1, 16)[:, 5] = codes.reshape(-1, 16)[:, 5] & 0xF0 | 7
                yield codes
            elif kind == F16:
                yield (rng.uniform(0.5, 1.5, shape) * (0.02 if "embed" in name else 0.04)).astype(np.float16)
            else:
                spread = 0.1 if "embed" in name or "bias" in name else shape[-1] ** -0.5
                values = rng.standard_normal(shape, np.float32) * np.float32(spread) + ("norm" in name)
                yield values.astype(np.float32 if kind == F32 else ml_dtypes.bfloat16)

    hf_files.write(folder, described, arrays())
    return folder
