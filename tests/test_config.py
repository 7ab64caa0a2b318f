"""Options are few, frozen, and refused where they are wrong."""

import math

import pytest

import configs
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
from moe_jax.errors import UserError
from moe_jax.overrides import apply, option_names, to_dict

# A new option is a decision: does it not follow from what is here? Then add it to this list.
OPTIONS = """
stage
model.num_layers
model.d_model
model.num_heads
model.num_kv_heads
model.head_dim
model.vocab_size
model.max_position_embeddings
model.ffn_width
model.activation
model.qk_norm
model.norm_eps
model.init_scale
model.rope.theta
model.rope.factor
model.rope.original_max_position_embeddings
model.moe.num_experts
model.moe.num_experts_per_tok
model.moe.expert_width
model.moe.shared_expert_width
model.moe.score_func
model.moe.norm_topk_prob
model.moe.routed_scaling_factor
model.moe.use_expert_bias
model.moe.bias_update_rate
model.moe.router_z_loss
model.moe.aux_loss
model.moe.dispatch
model.moe.capacity_factor
model.moe.buffer_factor
quant.weight_group_size
quant.quantize_activations
data.sources.*.path
data.sources.*.weight
data.sources.*.kind
data.heldout.*.path
data.heldout.*.weight
data.heldout.*.kind
data.tokenizer
data.seq_len
data.global_batch_size
data.seed
data.max_bytes
data.cache_dir
optimizer.learning_rate
optimizer.schedule
optimizer.warmup_steps
optimizer.final_fraction
optimizer.b1
optimizer.b2
optimizer.eps
optimizer.weight_decay
optimizer.clip_norm
optimizer.offload
mesh.data
mesh.fsdp
mesh.expert
mesh.context
mesh.tensor
mesh.slices
checkpoint.every_steps
checkpoint.every_minutes
checkpoint.keep
checkpoint.keep_every
checkpoint.keep_best
checkpoint.heldout_batches
guard.on_bad_step
guard.spike_factor
guard.max_skipped
guard.hang_minutes
steps
gradient_accumulation
compute_dtype
loss_chunk
remat
seed
init_from
log_every
"""


def test_the_list_of_options_is_frozen():
    assert option_names(RunConfig) == OPTIONS.split()


def test_what_is_trained_by_default_is_frozen():
    """Another default changes every run that does not name it."""
    defaults = to_dict(RunConfig())
    assert defaults["optimizer"] == {
        "learning_rate": 4e-4, "schedule": "cosine", "warmup_steps": 0, "final_fraction": 0.1, "b1": 0.9,
        "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0, "offload": False,
    }  # fmt: skip
    assert defaults["model"]["moe"] == {
        "num_experts": 60, "num_experts_per_tok": 4, "expert_width": 384, "shared_expert_width": 1536,
        "score_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5, "use_expert_bias": True,
        "bias_update_rate": 1e-3, "router_z_loss": 1e-4, "aux_loss": 0.0, "dispatch": "dropless",
        "capacity_factor": 1.5, "buffer_factor": 0.0,
    }  # fmt: skip


# Of each stage: tokens, length, peak of the learning rate, schedule, where it ends, warm-up, dispatch, text, QAT.
RECIPE = {
    "": (6e12, 2048, 4e-4, "cosine", 0.1, 2000, "drop_and_pad", "text", None),
    "_midtrain": (500e9, 8192, 4e-5, "linear", 0.0, 0, "drop_and_pad", "text", None),
    "_sft": (126e9, 8192, 4e-6, "cosine", 0.1, 0, "dropless", "chat", None),
    "_qat": (21e9, 8192, 4e-6, "cosine", 0.1, 0, "dropless", "chat", QuantConfig(32, True)),
}
SHAPES = {"s": (20, 768, 12, 384), "m": (26, 1024, 16, 512), "l": (32, 1280, 20, 640)}


@pytest.mark.parametrize("stage", RECIPE)
@pytest.mark.parametrize("size", SHAPES)
def test_the_family_is_trained_by_the_recipe(size, stage):
    cfg = configs.load(f"mobilemoe_{size}{stage}")
    model, moe, best = cfg.model, cfg.model.moe, cfg.optimizer
    assert moe is not None
    assert (model.num_layers, model.d_model, model.num_heads, moe.expert_width) == SHAPES[size]
    assert (moe.shared_expert_width, moe.capacity_factor) == (4 * moe.expert_width, 1.5)
    tokens, *rest = RECIPE[stage]
    assert cfg.steps * cfg.tokens_per_step == pytest.approx(tokens, abs=2**22)
    assert rest == [
        cfg.data.seq_len, best.learning_rate, best.schedule, best.final_fraction, best.warmup_steps, moe.dispatch,
        cfg.data.sources[0].kind, cfg.quant,
    ]  # fmt: skip


def test_fine_grained_experts_follow_the_papers_trade():
    """8 experts cut by 8 are 64; four of the eight active ones become one shared expert."""
    moe = MoEConfig.fine_grained(3072)
    assert (moe.num_experts, moe.num_experts_per_tok) == (60, 4)
    assert (moe.expert_width, moe.shared_expert_width) == (384, 1536)
    alone = MoEConfig.fine_grained(3072, shared=False)
    assert (alone.num_experts, alone.num_experts_per_tok) == (64, 8)
    assert alone.shared_expert_width == 0
    assert MoEConfig.fine_grained(3072, granularity=16).expert_width == 192


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MoEConfig(num_experts=4, num_experts_per_tok=5), "between 1 and"),
        (lambda: MoEConfig(score_func="tanh"), "sigmoid, softmax"),
        (lambda: MoEConfig.fine_grained(3000, granularity=16), "use 2992"),
        (lambda: ModelConfig(num_heads=10, num_kv_heads=4), "use 12"),
        (lambda: ModelConfig(head_dim=63), "odd"),
        (lambda: ModelConfig(activation="relu"), "silu, gelu_tanh"),
        (lambda: QuantConfig(weight_group_size=48), "multiple of 32"),
        (lambda: SourceConfig(kind="image"), "text, chat"),
        (lambda: SourceConfig(weight=1e-307), "positive, and within"),
        (lambda: DataConfig(seq_len=1), "at least 2"),
        (lambda: OptimizerConfig(schedule="step"), "cosine, linear, constant"),
        (lambda: CheckpointConfig(keep=0), "positive"),
        (lambda: MoEConfig(buffer_factor=-1), "0 or positive"),
        (lambda: RunConfig(remat="some"), "nothing, full, save_attention, save_dispatch"),
        (lambda: RunConfig(gradient_accumulation=7), "not a multiple"),
        (lambda: RunConfig(data=DataConfig(seq_len=16384)), "max_position_embeddings"),
        (lambda: RunConfig(model=ModelConfig(d_model=80), quant=QuantConfig()), "use 96"),
    ],
)
def test_a_wrong_value_is_one_sentence_with_the_mend(build, words):
    with pytest.raises(UserError, match=words):
        build()


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.clip_norm=0", "optimizer.clip_norm=nan", "optimizer.eps=0", "optimizer.b1=-0.1",
        "optimizer.b2=1.0", "optimizer.weight_decay=-1", "optimizer.final_fraction=-1",
        "optimizer.learning_rate=nan",
        "model.moe.bias_update_rate=-1", "model.moe.router_z_loss=-1", "model.moe.aux_loss=inf",
        "model.moe.capacity_factor=inf", "model.moe.routed_scaling_factor=0", "model.rope.factor=0",
        "model.rope.theta=-1", "model.head_dim=0", "model.norm_eps=-1", "log_every=0", "loss_chunk=0",
        "loss_chunk=-4", "seed=99999999999999999999", "optimizer.warmup_steps=3000000000",
        "checkpoint.heldout_batches=100000000000000000000", "checkpoint.every_minutes=inf",
        "guard.spike_factor=nan",
    ],
)  # fmt: skip
def test_a_value_that_would_train_wrongly_or_crash_later_is_refused_by_name(override):
    with pytest.raises(UserError, match=rf"^{override.partition('=')[0].replace('.', '[.]')} is .*must"):
        apply(RunConfig(), [override])


def test_gradients_need_not_be_clipped():
    assert apply(RunConfig(), ["optimizer.clip_norm=inf"]).optimizer.clip_norm == math.inf
