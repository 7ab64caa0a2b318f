"""Tokens per second of a bundle in the stock engine, and of the same model with all experts computed densely.

Both read the same pieces of real held-out text in turn, because routing, and with it the work, depends on the
text; the medians are compared.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from statistics import median

from conversion import heldout
from conversion.litert.engine import Engine
from conversion.readback import sections
from moe_jax.config import SourceConfig
from moe_jax.errors import UserError


def bench(
    bundle: str | Path,
    dense: str | Path | None = None,
    *,
    text: str = "stdlib:heldout",
    texts: int = 12,
    prefill: int = 128,
    decode: int = 64,
    threads: int = 2,
) -> dict[str, dict[str, float | int]]:
    """{"speed": medians over `texts` pieces}: `decode_tok_s` and `prefill_tok_s`, for a `dense` bundle as well.

    Each piece gives `prefill` tokens to take in, then `decode` tokens are sampled after it. `text` is a path, a
    glob or a part of the embedded corpus. Raises UserError for unreadable bundles or text, or too long ones.
    """
    names = [""] if dense is None else ["", "dense_"]
    found: dict[str, list[float]] = {f"{n}{p}_tok_s": [] for n in names for p in ("decode", "prefill")}
    parts = sections(bundle)
    if prefill + decode > parts.metadata.max_num_tokens:
        raise UserError(
            f"{prefill} tokens to read and {decode} to write exceed the bundle's context of "
            f"{parts.metadata.max_num_tokens}; ask for fewer"
        )
    pieces = heldout.pieces((SourceConfig(text),), parts.tokenizer, texts, prefill)
    prompts = [parts.tokenizer.decode(ids) for ids in pieces]
    with ExitStack() as stack:
        paths = [bundle] if dense is None else [bundle, dense]
        engines = [stack.enter_context(Engine(path, threads, measured=True)) for path in paths]
        for seed, prompt in enumerate([prompts[0], *prompts]):
            for name, engine in zip(names, engines, strict=True):
                info = engine.run(prompt, decode, seed)
                if seed:  # the first run only warms up
                    found[f"{name}decode_tok_s"].append(info.last_decode_tokens_per_second)
                    found[f"{name}prefill_tok_s"].append(info.last_prefill_tokens_per_second)
    speed: dict[str, float | int] = {name: median(values) for name, values in found.items()}
    for phase in ("decode", "prefill") if dense is not None else ():
        pairs = zip(found[f"{phase}_tok_s"], found[f"dense_{phase}_tok_s"], strict=True)
        speed[f"{phase}_speedup"] = median(sparse / full for sparse, full in pairs)
    return {
        "speed": speed
        | {"texts": len(pieces), "prefill_tokens": prefill, "decode_tokens": decode, "threads": threads}
    }
