"""Text made up from few words, and files of every kind that hold it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
from array_record.python.array_record_module import ArrayRecordWriter

from moe_jax.data.corpus import Message
from moe_jax.data.tokenizer import BOS, EOT, HEADER_END, HEADER_START

TEXT = "the quick brown fox jumps over a lazy dog while Ünïcödé and 漢字 look on, 12345 times"
WORDS = TEXT.split()


def sentence(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * i) % len(WORDS)] for i in range(words))


def render_text(messages: Sequence[Message], generation_prompt: bool = False) -> str:
    """What the chat template should render."""
    turns = [f"{HEADER_START}{m['role']}{HEADER_END}\n\n{m['content']}{EOT}" for m in messages]
    prompt = f"{HEADER_START}assistant{HEADER_END}\n\n" if generation_prompt else ""
    return BOS + "".join(turns) + prompt


def write_records(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write(folder: Path, kind: str, field: str, values: list) -> str:
    """The values in one file of the kind; text files take one file each. Returns the path or glob."""
    path = folder / f"data.{kind}"
    rows = [{field: value} for value in values]
    if kind == "txt":
        for i, value in enumerate(values):
            (folder / f"{i}.txt").write_bytes(value.encode())
        return str(folder / "*.txt")
    if kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        write_records(path, [json.dumps(row).encode() for row in rows])
    return str(path)


def take(iterator: Iterator[dict], count: int) -> list[dict]:
    return list(islice(iterator, count))


def same(left: list[dict], right: list[dict]) -> bool:
    """Whether two lists of batches are equal."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )
