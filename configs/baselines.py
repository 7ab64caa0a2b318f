"""What MobileMoE is compared with: a dense model of the same class, and the shapes a peer was measured at."""

from __future__ import annotations

from dataclasses import replace

from configs.mobilemoe import mobilemoe_s
from moe_jax.config import ModelConfig, MoEConfig, RunConfig


def dense_twin() -> RunConfig:
    """A dense model shaped like MobileLLM-Pro (1.1B): the paper's baseline in speed and memory.

    Run: python -m moe_jax train dense_twin --run runs/dense/pretrain mesh.fsdp=-1
    Expect: slower than mobilemoe_s on a phone by 2.2x to 2.6x in decode (paper, Galaxy S25 CPU).
    """
    model = ModelConfig(
        num_layers=30, d_model=1280, num_heads=20, num_kv_heads=4, vocab_size=202_048, ffn_width=6144, moe=None
    )
    return replace(mobilemoe_s(), model=model)


def peer_maxtext_64e8() -> RunConfig:
    """64 experts, top-8, no shared one: the shapes at which MaxText 0.2.5 was compiled for comparison.

    Run: python -m launch fit peer_maxtext_64e8 --topology v5e:4x4 --seq-len 2048 --per-device-batch 8
    Expect: less memory and fewer cycles than MaxText's figures, see docs/pods.md; not meant to be trained.
    """
    moe = MoEConfig(num_experts=64, num_experts_per_tok=8, expert_width=384, shared_expert_width=0)
    cfg = mobilemoe_s()
    return replace(cfg, model=replace(cfg.model, moe=moe))
