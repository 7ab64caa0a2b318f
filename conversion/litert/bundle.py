"""The .litertlm container that LiteRT-LM loads: model, tokenizer, and what the engine must know about both.

The same inputs give the same bytes: the builder's random id and clock are replaced by the content's digest and
the epoch, and stop tokens are sorted.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from litert_lm_builder import litertlm_builder as builder
from litert_lm_builder.runtime.proto import llm_metadata_pb2 as _pb2

from conversion.outputs import replacing
from moe_jax.data import chat
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.files import AnyPath, location

pb2: Any = _pb2  # its classes are made at run time


def write_bundle(tflite: str | Path, tokenizer: AnyPath, path: str | Path, context: int) -> None:
    """Pack `tflite` and the Hugging Face `tokenizer` (tokenizer.json) into the bundle `path`.

    `context` is the most tokens of prompt and answer together. OSError for what the disk refuses; a file that was
    there stays as it was.
    """
    path, tokens = Path(path), Tokenizer.load(tokenizer)
    with replacing(path) as aside, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        vocabulary = Path(folder, "tokenizer.json")  # the builder wants a file of a disk with this ending
        vocabulary.write_bytes(location(tokenizer).read_bytes())
        if tokens.cuts:  # an engine would do as the file says, as training did not
            tokens.save(vocabulary)
        metadata = Path(folder, "metadata.pb")
        metadata.write_bytes(llm_metadata(tokens, context).SerializeToString(deterministic=True))
        bundle = builder.LitertLmFileBuilder()
        bundle.add_llm_metadata(str(metadata))
        bundle.add_hf_tokenizer(str(vocabulary))
        bundle.add_tflite_model(str(tflite), builder.TfLiteModelType.PREFILL_DECODE)
        stamp = _stamp(metadata, vocabulary, Path(tflite))
        with (
            aside.open("wb") as file,
            mock.patch.object(builder, "populate_system_metadata", lambda given: [*given, *stamp]),
        ):
            bundle.build(file, validate_metadata=True)


def llm_metadata(tokenizer: Tokenizer, context: int) -> Any:
    """The LlmMetadata message: first and stop tokens, chat template, length of the context."""
    metadata = pb2.LlmMetadata()
    metadata.start_token.token_ids.ids.append(tokenizer.bos)
    metadata.pad_token.token_ids.ids.append(tokenizer.pad)
    for token in sorted({tokenizer.eot, tokenizer.end}):
        metadata.stop_tokens.add().token_ids.ids.append(token)
    metadata.max_num_tokens = context
    metadata.llm_model_type.generic_model.SetInParent()
    metadata.jinja_prompt_template = chat.CHAT_TEMPLATE
    metadata.supports_thinking = metadata.supports_function_calling = False
    return metadata


def _stamp(*files: Path) -> list[builder.Metadata]:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    values = {"uuid": digest.hexdigest()[:32], "creation_timestamp": "1970-01-01T00:00:00+00:00"}
    return [builder.Metadata(key, value, builder.DType.STRING) for key, value in values.items()]
