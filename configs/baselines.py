"""What MobileMoE is compared with: a dense model of the same class."""

from __future__ import annotations

from dataclasses import replace

from configs.mobilemoe import mobilemoe_s
from moe_jax.config import ModelConfig, RunConfig


def dense_twin() -> RunConfig:
    """A dense model shaped like MobileLLM-Pro (1.1B): the paper's baseline in speed and memory.

    Run: python -m moe_jax train dense_twin --run runs/dense/pretrain mesh.fsdp=-1
    Expect: slower than mobilemoe_s on a phone by 2.2x to 2.6x in decode (paper, Galaxy S25 CPU).
    """
    model = ModelConfig(
        num_layers=30, d_model=1280, num_heads=20, num_kv_heads=4, vocab_size=202_048, ffn_width=6144, moe=None
    )
    return replace(mobilemoe_s(), model=model)
