"""How well a run predicts its held-out text, in the units compressors use."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from moe_jax.data.pipeline import compression_bits_per_byte, heldout_batches, heldout_documents, heldout_rows
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.overrides import apply
from moe_jax.parallel.batches import put_batch
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train.checkpoint import Checkpoints, checkpoint_path, config_of, restore_model
from moe_jax.train.state import abstract_state
from moe_jax.train.step import make_eval_step

_TOKENS = 16_384  # at a time: one device holds them, whatever the batch of all


def evaluate(run_dir: str | Path, overrides: list[str] | None = None) -> dict[str, float | int]:
    """Held-out nats per token and bits per byte of a run's last checkpoint, beside gzip -9 and xz -9.

    Every token but a document's first counts once, its end included; the config is the run's own with
    `overrides` applied, but no expert is ever full. Raises UserError for a run without a readable checkpoint or
    without held-out text.
    """
    path = checkpoint_path(run_dir, None)
    stored = Checkpoints(run_dir).metadata()
    cfg = apply(config_of(path, stored), overrides or [])
    cfg = replace(cfg, model=cfg.model.dropless())
    tokenizer = Tokenizer.load(Path(run_dir) / "tokenizer.json")
    tokenizer.require(cfg.model.vocab_size, stored["tokenizer"])
    data = replace(cfg.data, heldout=tuple(s for s in cfg.data.heldout if s.kind == "text"))
    documents = heldout_documents(data, tokenizer)
    mesh = single_device_mesh()
    params, biases = restore_model(run_dir, abstract_state(cfg, mesh))
    step = make_eval_step(cfg, mesh)
    nats, tokens = 0.0, 0
    for batch in heldout_batches(heldout_rows(data, tokenizer), max(1, _TOKENS // data.seq_len)):
        nll, count = step(params, biases, put_batch(batch, mesh))
        nats, tokens = nats + float(nll), tokens + int(count)
    size = sum(document.num_bytes for document in documents)
    bits = {"model": nats / math.log(2) / size} | compression_bits_per_byte(documents)
    return {"step": int(path.name), "tokens": tokens, "bytes": size, "nats_per_token": nats / tokens} | {
        f"bits_per_byte_{name}": value for name, value in bits.items()
    }
