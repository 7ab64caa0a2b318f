"""The tokenizer in GGUF's terms, for llama.cpp to cut text exactly as training did, or a refusal.

llama.cpp does not read splitting rules: it has some built in, by name. Only the Llama-3 rule is used here; whether
a word that is an entry skips the merges depends on the name that asks for the rule.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers

from moe_jax.data.chat import CHAT_TEMPLATE
from moe_jax.data.tokenizer import LLAMA3_SPLIT, Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location

_NAMES = {True: "llama-bpe", False: "smaug-bpe"}  # by ignore_merges
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def vocabulary(path: AnyPath, vocab_size: int) -> dict[str, Any]:
    """Metadata `tokenizer.*` of a tokenizer.json for a model of `vocab_size` embeddings, the chat template with it.

    Raises UserError when llama.cpp would cut text otherwise, or for more entries than embeddings.
    """
    tokenizer = Tokenizer.load(path)
    tokenizer.require(vocab_size)
    # As the library writes it: older files lack fields that have a default by now.
    content = json.loads(tokenizers.Tokenizer.from_str(location(path).read_text()).to_str())
    model = content["model"]
    if why := _foreign(content):
        raise UserError(f"llama.cpp cannot cut text as {path} does ({why}); use a tokenizer with Llama 3's rule")
    tokens = [f"[UNUSED{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for text, token_id in model["vocab"].items():
        tokens[token_id], kinds[token_id] = text, _NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _NAMES[model["ignore_merges"]],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.end,
        "tokenizer.ggml.eot_token_id": tokenizer.eot,
        "tokenizer.ggml.padding_token_id": tokenizer.pad,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _foreign(content: dict[str, Any]) -> str:
    """What llama.cpp would do otherwise, or nothing."""
    model, before = content["model"], content["pre_tokenizer"]
    parts = before["pretokenizers"] if before and before["type"] == "Sequence" else [before]
    kinds = [part["type"] for part in parts if part]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        return "its model is not plain BPE"
    if content["normalizer"] is not None:
        return "it normalises text"
    if kinds != ["Split", "ByteLevel"] or parts[1]["use_regex"] or parts[1]["add_prefix_space"]:
        return "it does not split by one rule into bytes"
    split = parts[0]
    if split["pattern"].get("Regex") != LLAMA3_SPLIT or split["behavior"] != "Isolated" or split["invert"]:
        return "its splitting rule is another"
    return ""
