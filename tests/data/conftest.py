"""A small tokenizer and corpus shared by the data tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_jax.config import DataConfig, SourceConfig
from moe_jax.data.tokenizer import Tokenizer
from tests.data.helpers import sentence
from tests.object_store import bucket  # noqa: F401  (a fixture)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentence(i, 40) for i in range(20)], 300)


@pytest.fixture
def text_source(tmp_path: Path) -> SourceConfig:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": sentence(i, 3 + i % 30)}) + "\n" for i in range(60)))
    return SourceConfig(str(path))


@pytest.fixture
def chat_source(tmp_path: Path) -> SourceConfig:
    path = tmp_path / "chats.jsonl"
    chats = [
        [
            {"role": "user", "content": f"{i}: {sentence(i, 2 + i % 5)}?"},
            {"role": "assistant", "content": sentence(i + 1, 1 + i % 7)},
        ]
        for i in range(60)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return SourceConfig(str(path), kind="chat")


@pytest.fixture
def config(text_source: SourceConfig, chat_source: SourceConfig) -> DataConfig:
    """Three parts of text and one of chats, in batches of 4 rows of 64."""
    sources = (SourceConfig(text_source.path, weight=3.0), SourceConfig(chat_source.path, weight=1.0, kind="chat"))
    return DataConfig(sources, heldout=(text_source,), seq_len=64, global_batch_size=4, seed=3, cache_dir="")
