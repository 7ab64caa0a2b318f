"""MobileMoE S, M and L, each in four stages. `steps` follows from each stage's budget of tokens.

Published (paper, released checkpoints): shapes (of M and L the widths of experts and that every layer has them
follow from the family's rules), the four stages, 6T and 500B tokens, INT4 in groups of 32 with INT8 activations.
From reading notes of the paper, not checked against its text: learning rates and schedules, 126B and 21B tokens,
capacity 1.5, balancing by 1e-3, z-loss 1e-4, and the points that a stage is expected to give. This project's
choice: batch, betas, weight decay, clipping, warm-up, where a cosine ends, initial scales, masking between
documents, the mean of the z-loss over layers, capacity in mid-training too, balancing in SFT and QAT too, SFT's
data for QAT. The paper mixes sources by domain; each stage here names one folder to put a mixture in.

A process tokenises the text before the first step, or copies what `tokenize` made of it. It holds all tokens on
disk (4 bytes each) and 28 bytes of memory for each document: docs/pods.md says how far that goes.
"""

from __future__ import annotations

from dataclasses import replace

from moe_jax.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    QuantConfig,
    RunConfig,
    SourceConfig,
)


def family(num_heads: int, num_layers: int | None = None, coarse_experts: int = 8) -> ModelConfig:
    """A member of the family: heads of 64, feed-forward 4 x d_model, cut by 8 into fine-grained experts.

    8 coarse experts are 60 and a shared one, 1 is a dense model. By default it has the depth for its width that S,
    M and L have, 6 layers for each 256 of d_model and 2 more (derived from the three).
    """
    d_model = 64 * num_heads
    return ModelConfig(
        num_layers=num_layers or 2 + 3 * num_heads // 2,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=4,
        ffn_width=4 * d_model,
        moe=MoEConfig.fine_grained(4 * d_model, coarse_experts) if coarse_experts > 1 else None,
    )


SMALL, MEDIUM, LARGE = family(num_heads=12), family(num_heads=16), family(num_heads=20)


def _stage(
    model: ModelConfig,
    stage: str,
    tokens: float,
    seq_len: int,
    optimizer: OptimizerConfig,
    source: SourceConfig,
    quant: QuantConfig | None = None,
    dispatch: str = "dropless",
) -> RunConfig:
    assert model.moe is not None
    tokens_per_step = 2**22
    return RunConfig(
        stage=stage,
        model=replace(model, moe=replace(model.moe, dispatch=dispatch)),
        quant=quant,
        data=DataConfig(
            sources=(source,),
            heldout=(SourceConfig(f"data/heldout/{stage}/*.jsonl", kind=source.kind),),
            tokenizer="data/tokenizer.json",
            seq_len=seq_len,
            global_batch_size=tokens_per_step // seq_len,
        ),
        optimizer=optimizer,
        checkpoint=CheckpointConfig(every_steps=1000, keep=3),
        steps=round(tokens / tokens_per_step),
    )


def _pretrain(model: ModelConfig) -> RunConfig:
    return _stage(
        model, "pretrain", 6e12, 2048,
        OptimizerConfig(learning_rate=4e-4, schedule="cosine", warmup_steps=2000),
        SourceConfig("data/pretrain/*.jsonl"), dispatch="drop_and_pad",
    )  # fmt: skip


def _midtrain(model: ModelConfig) -> RunConfig:
    return _stage(
        model, "midtrain", 500e9, 8192,
        OptimizerConfig(learning_rate=4e-5, schedule="linear", final_fraction=0.0),
        SourceConfig("data/midtrain/*.jsonl"), dispatch="drop_and_pad",
    )  # fmt: skip


def _sft(model: ModelConfig) -> RunConfig:
    return _stage(
        model, "sft", 126e9, 8192,
        OptimizerConfig(learning_rate=4e-6, schedule="cosine"),
        SourceConfig("data/sft/*.jsonl", kind="chat"),
    )  # fmt: skip


def _qat(model: ModelConfig) -> RunConfig:
    return _stage(
        model, "qat", 21e9, 8192,
        OptimizerConfig(learning_rate=4e-6, schedule="cosine"),
        SourceConfig("data/sft/*.jsonl", kind="chat"), quant=QuantConfig(),
    )  # fmt: skip


def mobilemoe_s() -> RunConfig:
    """MobileMoE-S (272M active of 1.26B), stage 1 of 4: pre-training on 6T tokens at 2048.

    Run: python -m moe_jax train mobilemoe_s --run runs/s/pretrain mesh.fsdp=-1
    Expect: INT4 average of about 44 on the paper's 14 tasks once all four stages are done.
    """
    return _pretrain(SMALL)


def mobilemoe_s_midtrain() -> RunConfig:
    """MobileMoE-S, stage 2 of 4: 500B tokens at 8192, linear decay from 4e-5.

    Run: python -m moe_jax train mobilemoe_s_midtrain --run runs/s/midtrain init_from=runs/s/pretrain
    Expect: 5 to 10 points more MMLU than after stage 1 (notes).
    """
    return _midtrain(SMALL)


def mobilemoe_s_sft() -> RunConfig:
    """MobileMoE-S, stage 3 of 4: conversations, dropless, cosine from 4e-6.

    Run: python -m moe_jax train mobilemoe_s_sft --run runs/s/sft init_from=runs/s/midtrain
    Expect: GSM8K well above stage 2 (notes: 36 to 52 on one size).
    """
    return _sft(SMALL)


def mobilemoe_s_qat() -> RunConfig:
    """MobileMoE-S, stage 4 of 4: INT4 weights in groups of 32, INT8 activations, 21B tokens.

    Run: python -m moe_jax train mobilemoe_s_qat --run runs/s/qat init_from=runs/s/sft
    Expect: 2 to 3 points below stage 3 on average (paper: 2.7).
    """
    return _qat(SMALL)


def mobilemoe_m() -> RunConfig:
    """MobileMoE-M (528M active of 2.82B), stage 1 of 4: pre-training on 6T tokens at 2048.

    Run: python -m moe_jax train mobilemoe_m --run runs/m/pretrain mesh.fsdp=-1
    Expect: INT4 average of about 52.5 on the paper's 14 tasks once all four stages are done.
    """
    return _pretrain(MEDIUM)


def mobilemoe_m_midtrain() -> RunConfig:
    """MobileMoE-M, stage 2 of 4. Run and expectation as for S, with m for s."""
    return _midtrain(MEDIUM)


def mobilemoe_m_sft() -> RunConfig:
    """MobileMoE-M, stage 3 of 4. Run and expectation as for S, with m for s."""
    return _sft(MEDIUM)


def mobilemoe_m_qat() -> RunConfig:
    """MobileMoE-M, stage 4 of 4. Run and expectation as for S, with m for s (paper: 2.8 points)."""
    return _qat(MEDIUM)


def mobilemoe_l() -> RunConfig:
    """MobileMoE-L (922M active of 5.33B), stage 1 of 4: pre-training on 6T tokens at 2048.

    Run: python -m moe_jax train mobilemoe_l --run runs/l/pretrain mesh.fsdp=-1
    Expect: INT4 average of about 57.8 on the paper's 14 tasks once all four stages are done.
    """
    return _pretrain(LARGE)


def mobilemoe_l_midtrain() -> RunConfig:
    """MobileMoE-L, stage 2 of 4. Run and expectation as for S, with l for s."""
    return _midtrain(LARGE)


def mobilemoe_l_sft() -> RunConfig:
    """MobileMoE-L, stage 3 of 4. Run and expectation as for S, with l for s."""
    return _sft(LARGE)


def mobilemoe_l_qat() -> RunConfig:
    """MobileMoE-L, stage 4 of 4. Run and expectation as for S, with l for s (paper: 2.3 points)."""
    return _qat(LARGE)
