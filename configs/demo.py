"""The demo: a small MobileMoE through all four stages on a laptop, trained on Python's standard library.

The stages share one model and tokenizer and start from each other's final checkpoint; `make demo` runs them.
"""

from __future__ import annotations

from moe_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    QuantConfig,
    RunConfig,
    SourceConfig,
)

MODEL = ModelConfig(
    num_layers=3,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=2048,
    max_position_embeddings=1024,
    ffn_width=512,
    moe=MoEConfig(
        num_experts=60,
        num_experts_per_tok=4,
        expert_width=64,
        shared_expert_width=256,
        # A few hundred steps, not a million: balance has to come 20 times as fast, and from a loss as well.
        bias_update_rate=0.02,
        aux_loss=0.02,
    ),
)
TEXT = SourceConfig("stdlib:text")
CHAT = SourceConfig("stdlib:chat", kind="chat")


def _stage(
    stage: str,
    steps: int,
    seq_len: int,
    sources: tuple[SourceConfig, ...],
    optimizer: OptimizerConfig,
    every_steps: int,
    quant: QuantConfig | None = None,
) -> RunConfig:
    return RunConfig(
        stage=stage,
        model=MODEL,
        quant=quant,
        data=DataConfig(
            sources=sources,
            tokenizer="runs/demo/tokenizer.json",
            seq_len=seq_len,
            global_batch_size=1024 // seq_len,
        ),
        optimizer=optimizer,
        mesh=MeshConfig(data=1, fsdp=1, expert=1),
        checkpoint=CheckpointConfig(every_steps=every_steps, keep=2),
        steps=steps,
        compute_dtype="float32",  # a CPU has no faster bfloat16
        remat="nothing",
        loss_chunk=512,
    )


def demo_pretrain() -> RunConfig:
    """Demo, stage 1 of 4: the standard library's source at a sequence of 256.

    Run: make demo, or python -m moe_jax train demo_pretrain --run runs/mine/pretrain
    Expect: loss from 7.6 to about 4.2 nats per token.
    """
    optimizer = OptimizerConfig(learning_rate=1.2e-3, warmup_steps=20, final_fraction=0.2)
    return _stage("pretrain", 460, 256, (TEXT,), optimizer, 100)


def demo_midtrain() -> RunConfig:
    """Demo, stage 2 of 4: twice the sequence, a tenth of it conversations, rate decaying to a tenth.

    Run: python -m moe_jax train demo_midtrain --run runs/mine/midtrain init_from=runs/mine/pretrain
    Expect: loss a little below the end of stage 1.
    """
    sources = (SourceConfig("stdlib:text", weight=0.9), SourceConfig("stdlib:chat", 0.1, "chat"))
    optimizer = OptimizerConfig(learning_rate=6e-4, schedule="linear", final_fraction=0.1)
    return _stage("midtrain", 60, 512, sources, optimizer, 30)


def demo_sft() -> RunConfig:
    """Demo, stage 3 of 4: conversations about real functions, loss on the answers only.

    Run: python -m moe_jax train demo_sft --run runs/mine/sft init_from=runs/mine/midtrain
    Expect: the loss on answers falls by about a third of a nat.
    """
    optimizer = OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5)
    return _stage("sft", 60, 512, (CHAT,), optimizer, 20)


def demo_qat() -> RunConfig:
    """Demo, stage 4 of 4: INT4 weights and INT8 activations emulated, text and some conversations.

    Run: python -m moe_jax train demo_qat --run runs/mine/qat init_from=runs/mine/sft
    Expect: starts slightly above the float loss and recovers it.
    """
    sources = (SourceConfig("stdlib:text", weight=0.8), SourceConfig("stdlib:chat", 0.2, "chat"))
    optimizer = OptimizerConfig(learning_rate=4e-4, schedule="cosine", warmup_steps=5)
    return _stage("qat", 60, 512, sources, optimizer, 30, QuantConfig())
