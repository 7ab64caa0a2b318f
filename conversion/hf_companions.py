"""The small files that transformers wants beside the weights: tokenizer, chat template, ends, the model's code."""

from __future__ import annotations

from pathlib import Path

from moe_jax.data import tokenizer as _tokenizer
from moe_jax.data.chat import CHAT_TEMPLATE
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.files import write_bytes, write_json


def write_companions(folder: Path, tokenizer: Tokenizer, content: bytes, positions: int) -> None:
    """Write tokenizer.json (`content`), its config with the chat template, generation_config.json and the code."""
    special = {
        "bos_token": _tokenizer.BOS,
        "eos_token": _tokenizer.EOT,
        "pad_token": tokenizer.token(tokenizer.pad),
    }
    write_bytes(folder / "tokenizer.json", content)
    write_json(folder / "special_tokens_map.json", special)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,  # it would eat spaces before punctuation
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", special | described)
    ends = {"bos_token_id": tokenizer.bos, "eos_token_id": [tokenizer.end, tokenizer.eot]}
    write_json(folder / "generation_config.json", ends | {"pad_token_id": tokenizer.pad, "do_sample": False})
    write_bytes(folder / "modeling_mobilemoe.py", Path(__file__).with_name("hf_modeling.py").read_bytes())
