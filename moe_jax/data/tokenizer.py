"""The byte-level BPE tokenizer: trained, checked, saved as `tokenizer.json`, and named by a fingerprint.

The file is an ordinary Hugging Face tokenizer with the Llama-3 splitting rule and the special tokens of the chat
format, so the LiteRT-LM engine reads it as it is. Encoding here never turns text into a special token: those ids
come only from the code that places them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location, write_bytes

PAD = "<|finetune_right_pad|>"
BOS = "<|begin_of_text|>"
END = "<|end_of_text|>"
HEADER_START = "<|header_start|>"
HEADER_END = "<|header_end|>"
EOT = "<|eot|>"
SPECIAL_TOKENS = (PAD, BOS, END, HEADER_START, HEADER_END, EOT)  # ids 0..5 of a tokenizer trained here

# Llama 3: contractions, words with one leading mark, digits by threes, punctuation, line ends, other spaces.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PROBE = "def F(x):\n\treturn  'é 漢字 🙂' # 1234\r\n"


class Tokenizer:
    """A loaded tokenizer with the ids of its special tokens: pad, bos, end, header_start, header_end, eot.

    `special_texts` are the names of all special tokens of the file, which may have more. `cuts` says that the file
    asks to cut or fill texts; here that is never done, and it is not part of what `save` writes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "the tokenizer") -> None:
        backend.encode_special_tokens = True  # special-token text in a document stays text
        self.cuts = bool(backend.truncation or backend.padding)  # as a file that transformers saved may say
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        ids = {token: found for token in SPECIAL_TOKENS if (found := backend.token_to_id(token)) is not None}
        self.special_texts = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
        missing = [token for token in SPECIAL_TOKENS if token not in ids and token != PAD]
        if missing:
            raise UserError(f"{name} lacks {', '.join(missing)}; use a tokenizer with the chat format's tokens")
        self.bos, self.end, self.eot = ids[BOS], ids[END], ids[EOT]
        self.header_start, self.header_end = ids[HEADER_START], ids[HEADER_END]
        self.pad = ids.get(PAD, self.end)
        try:
            same = self.decode(self.encode(_PROBE)) == _PROBE
        except Exception:  # the package knows no narrower one
            same = False
        if not same:
            raise UserError(f"{name} does not give back the text it encodes; use a byte-level BPE tokenizer")

    @property
    def vocab_size(self) -> int:
        """The least `model.vocab_size` that fits all ids, special ones included; ids of some files have gaps."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """sha256 of the content, whatever the file's spacing: kept in checkpoints and compared there."""
        content = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn `vocab_size` entries; same texts, same tokenizer. UserError where there is too little text."""
        least = len(SPECIAL_TOKENS) + 256
        if vocab_size < least:
            raise UserError(f"vocab_size is {vocab_size}; bytes and special tokens alone need {least}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        # As in Llama 3, encode(..., add_special_tokens=True) of other programs puts the beginning in front.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
        if (found := backend.get_vocab_size()) < vocab_size:
            raise UserError(
                f"the text gives only {found} of {vocab_size} entries; add text or set model.vocab_size to {found}"
            )
        return Tokenizer(backend)

    @staticmethod
    def load(path: AnyPath) -> Tokenizer:
        """Read a `tokenizer.json`; UserError where it is missing, damaged, or lacks what training needs."""
        try:
            content = location(path).read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"there is no tokenizer at {path}; copy the run's there, or train one with "
                f"'python -m moe_jax tokenizer CONFIG data.tokenizer={path}'"
            ) from None
        except Exception as error:  # gcsfs raises errors of many kinds
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read the tokenizer at {path}: {reason}; name a tokenizer.json") from None
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception for anything it cannot parse
            raise UserError(f"{path} is no sound tokenizer.json ({error}); copy it again") from None
        return Tokenizer(backend, str(path))

    def save(self, path: AnyPath) -> None:
        """Write `tokenizer.json`, aside and then renamed."""
        write_bytes(path, self._backend.to_str(pretty=True).encode())

    def require(self, vocab_size: int, fingerprint: str | None = None) -> None:
        """UserError unless the ids fit a model's vocabulary and `fingerprint`, a checkpoint's, is this one."""
        if self.vocab_size > vocab_size:
            raise UserError(
                f"the tokenizer has {self.vocab_size} entries but model.vocab_size is {vocab_size}; "
                f"set model.vocab_size to {self.vocab_size}"
            )
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise UserError(
                f"the tokenizer ({self.fingerprint[:12]}) is not the one the checkpoint was trained with "
                f"({fingerprint[:12]}); use the tokenizer.json of its run folder"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special tokens, whatever the text says."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of ids, special tokens spelled out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """The entry itself, in the byte alphabet of the file; empty for an id the tokenizer does not have."""
        return self._backend.id_to_token(int(token_id)) or ""
