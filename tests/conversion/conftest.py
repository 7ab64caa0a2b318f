"""One tiny model of each kind, exported once for all tests of this folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from conversion import weights
from conversion.litert import bundle, lower
from conversion.litert.engine import Engine, reply
from conversion.weights import Weights
from moe_jax.config import DataConfig, ModelConfig, MoEConfig, QuantConfig, RunConfig, SourceConfig
from moe_jax.data.tokenizer import Tokenizer
from tests.conversion.folders import parameters_of_random_weights, write_checkpoint
from tests.object_store import bucket  # noqa: F401  (a fixture)

CONTEXT, PREFILL = 64, (8,)
ROUTED = MoEConfig(num_experts=5, num_experts_per_tok=2, expert_width=32, shared_expert_width=64)
MOE = ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    ffn_width=96,
    max_position_embeddings=128,
    moe=ROUTED,
)
DENSE = dataclasses.replace(MOE, moe=None)
QAT = QuantConfig()


@dataclass(frozen=True)
class Exported:
    """A model and its files."""

    weights: Weights
    tflite: Path
    bundle: Path
    tokenizer: Tokenizer

    def again(self, folder: Path, experts: str = "sparse", context: int = CONTEXT) -> Path:
        """The bundle of the same model in another form or for another context, `folder`/m.litertlm."""
        prefill = tuple(min(length, context) for length in PREFILL)
        lower.export_tflite(self.weights, folder / "m.tflite", context, prefill, experts=experts)
        tokenizer = self.bundle.with_name("tokenizer.json")
        bundle.write_bundle(folder / "m.tflite", tokenizer, folder / "m.litertlm", context)
        return folder / "m.litertlm"


def answer(engine: Engine, message: str, most: int) -> str:
    """The whole reply to one user message."""
    with engine.conversation(most) as conversation:
        return "".join(reply(conversation, message))


@pytest.fixture(scope="session", params=["moe", "dense"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Random weights with a .tflite (context 64, prefill_8, decode), a byte-level tokenizer and a .litertlm."""
    folder = tmp_path_factory.mktemp(request.param)
    model = weights.random({"moe": MOE, "dense": DENSE}[request.param])
    texts = ["def add(first, second):\n    return first + second\n", "while True:\n    pass\n"] * 3
    tokenizer = Tokenizer.train(texts, 270)
    tokenizer.save(folder / "tokenizer.json")
    lower.export_tflite(model, folder / "model.tflite", CONTEXT, PREFILL)
    files = folder / "model.tflite", folder / "tokenizer.json", folder / "model.litertlm"
    bundle.write_bundle(*files, CONTEXT)
    return Exported(model, files[0], files[2], tokenizer)


@pytest.fixture(scope="session")
def run_dir(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose last checkpoint, of a QAT stage, is what `exported` was made of; it has held-out text."""
    return write_run(tmp_path_factory.mktemp("run"), exported.weights.config, exported.tokenizer)


def write_run(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer, quant: QuantConfig | None = QAT, steps: int = 1
) -> Path:
    """A run folder with checkpoints of steps 1 to `steps`: `parameters_of_random_weights` of seeds 0 and on."""
    heldout = folder / "heldout.txt"
    heldout.write_text("def add(first, second):\n    return first + second  # and on\n" * 40)
    source = (SourceConfig(str(heldout)),)
    run = RunConfig(
        stage="qat" if quant else "sft",
        model=config,
        quant=quant,
        data=DataConfig(sources=source, heldout=source, seq_len=CONTEXT),
    )
    tokenizer.save(folder / "tokenizer.json")
    for step in range(1, steps + 1):
        write_checkpoint(folder, run, parameters_of_random_weights(config, step - 1), tokenizer, step)
    return folder
