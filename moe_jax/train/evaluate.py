"""How well a run predicts its held-out data, in the units compressors use where it is text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace

import jax
from tqdm import tqdm

from moe_jax.data.pipeline import compression_bits_per_byte, heldout_batches, heldout_rows, heldout_text
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.files import AnyPath, location
from moe_jax.overrides import apply
from moe_jax.parallel.batches import put_batch
from moe_jax.parallel.mesh import local_mesh
from moe_jax.train.checkpoint import checkpoint_path, config_of, describe, restore_model
from moe_jax.train.state import abstract_state
from moe_jax.train.step import make_eval_step

_TOKENS = 16_384  # at a time, about


def evaluate(
    run_dir: AnyPath, overrides: list[str] | None = None, devices: Sequence[jax.Device] | None = None
) -> dict[str, float | int]:
    """Held-out nats per token of a run's last checkpoint; of texts, bits per byte beside gzip -9 and xz -9.

    Every token but a text's first counts once, its end included; of conversations, those that are trained on. The
    config is the run's own with `overrides` applied, but no expert is ever full. Parameters are cut over `devices`,
    by default those of `local_mesh`. Raises UserError for a run without a readable checkpoint or without held-out
    data.
    """
    path = checkpoint_path(run_dir, None)
    stored, _ = describe(path)
    cfg = apply(config_of(path, stored), overrides or [])
    cfg = replace(cfg, model=cfg.model.dropless())
    tokenizer = Tokenizer.load(location(run_dir) / "tokenizer.json")
    tokenizer.require(cfg.model.vocab_size, stored["tokenizer"])
    sources = list(zip(cfg.data.heldout, heldout_rows(cfg.data, tokenizer), strict=True))
    print(f"held-out: {', '.join(source.path for source, _ in sources)}", file=sys.stderr, flush=True)
    mesh = local_mesh(cfg.model.d_model, devices)
    size = max(1, _TOKENS // cfg.data.seq_len // mesh.size) * mesh.size
    cfg = replace(cfg, gradient_accumulation=1, data=replace(cfg.data, global_batch_size=size))
    params, biases = restore_model(path, abstract_state(cfg, mesh))
    step = make_eval_step(cfg, mesh)
    nats, tokens = {"text": 0.0, "chat": 0.0}, 0
    with tqdm(total=sum(len(rows) for _, rows in sources), desc="held-out", unit="row", disable=None) as bar:
        for source, rows in sources:
            for batch in heldout_batches([rows], size):
                nll, count = step(params, biases, put_batch(batch, mesh))
                nats[source.kind] += float(nll)
                tokens += int(count)
                bar.update(min(size, bar.total - bar.n))
    result = {"step": int(path.name), "tokens": tokens, "nats_per_token": sum(nats.values()) / tokens}
    if not (text := heldout_text(cfg.data)):
        return result
    bits = {"model": nats["text"] / math.log(2) / len(text)} | compression_bits_per_byte(text)
    return result | {"bytes": len(text)} | {f"bits_per_byte_{name}": value for name, value in bits.items()}
