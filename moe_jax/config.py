"""Every option of a run, as nested frozen dataclasses validated where they are built.

Values that follow from others (parameter counts, steps from tokens, tiles from shapes) are never options.
`moe_jax.overrides` reads and writes these classes; `tests/test_config.py` freezes the list of fields. A new option
has the default that does what was done before it came, so that runs of earlier versions go on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from moe_jax.errors import UserError

REMAT_POLICIES = ("nothing", "full", "save_attention", "save_dispatch")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _positive(prefix: str, options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        _require(0 < value < math.inf, f"{prefix}{name} is {value}; it must be positive{_finite(value)}")


def _not_negative(prefix: str, options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        _require(0 <= value < math.inf, f"{prefix}{name} is {value}; it must be 0 or positive{_finite(value)}")


def _countable(prefix: str, options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        _require(value < 2**31, f"{prefix}{name} is {value}; it must be below 2**31")


def _seeded(prefix: str, options: DataConfig | RunConfig) -> None:
    seed = options.seed
    _require(0 <= seed < 2**32, f"{prefix}seed is {seed}; it must lie in 0..2**32-1")


def _finite(value: float) -> str:
    return " and finite" if isinstance(value, float) else ""


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} is {value!r}; choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding with llama3-type scaling by selection (low and high frequency factors equal)."""

    theta: float = 500_000.0
    factor: float = 16.0  # pairs with a wavelength above the original context turn this much slower
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        _positive("model.rope.", self, "theta", "factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class MoEConfig:
    """Routed fine-grained experts plus an optional shared one (paper section 3, released checkpoints)."""

    num_experts: int = 60
    num_experts_per_tok: int = 4
    expert_width: int = 384
    shared_expert_width: int = 1536  # 0 switches the shared expert off
    score_func: str = "sigmoid"  # or softmax
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    use_expert_bias: bool = True  # loss-free balancing: the bias takes part in the selection only
    bias_update_rate: float = 1e-3
    router_z_loss: float = 1e-4  # of the mean over layers
    aux_loss: float = 0.0  # Switch-style balance loss, within each microbatch; of the mean over layers
    dispatch: str = "dropless"  # or drop_and_pad
    capacity_factor: float = 1.5  # rows per expert over the mean, drop_and_pad only
    # Rows per device of an expert group over the mean, beyond which its largest experts drop; 0: the worst case.
    buffer_factor: float = 0.0

    def __post_init__(self) -> None:
        _one_of("model.moe.score_func", self.score_func, ("sigmoid", "softmax"))
        _one_of("model.moe.dispatch", self.dispatch, ("dropless", "drop_and_pad"))
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            f"model.moe.num_experts_per_tok is {self.num_experts_per_tok}; it must lie between 1 and "
            f"model.moe.num_experts ({self.num_experts})",
        )
        _positive("model.moe.", self, "expert_width", "routed_scaling_factor", "capacity_factor")
        _not_negative("model.moe.", self, "shared_expert_width", "bias_update_rate", "router_z_loss", "aux_loss")
        _not_negative("model.moe.", self, "buffer_factor")

    @staticmethod
    def fine_grained(
        ffn_width: int, coarse_experts: int = 8, granularity: int = 8, shared: bool = True, **kwargs
    ) -> MoEConfig:
        """Cut `coarse_experts` full-width experts into `granularity` slices each, one coarse expert active.

        With `shared`, half of the active slices become one always-on expert of their joint width, and as
        many slices leave the routed pool (8 x 8 = 64, top-8 becomes 60 + 1 shared, top-4).
        """
        if ffn_width % granularity:
            raise UserError(
                f"ffn_width {ffn_width} is not a multiple of granularity {granularity}; "
                f"use {ffn_width // granularity * granularity}"
            )
        width, swapped = ffn_width // granularity, granularity // 2 if shared else 0
        return MoEConfig(
            num_experts=coarse_experts * granularity - swapped,
            num_experts_per_tok=granularity - swapped,
            expert_width=width,
            shared_expert_width=swapped * width,
            **kwargs,
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; `moe=None` gives the dense feed-forward of `ffn_width`."""

    num_layers: int = 20
    d_model: int = 768
    num_heads: int = 12
    num_kv_heads: int = 4
    head_dim: int = 64
    vocab_size: int = 128_256
    max_position_embeddings: int = 8192
    ffn_width: int = 3072  # width of the dense feed-forward; unused when `moe` is set
    activation: str = "silu"  # or gelu_tanh
    qk_norm: bool = True  # weightless, per head
    norm_eps: float = 1e-5
    init_scale: float = 0.02  # deviation of the normal, cut at three of them, of every matrix
    rope: RopeConfig = field(default_factory=RopeConfig)
    moe: MoEConfig | None = field(default_factory=MoEConfig)

    def __post_init__(self) -> None:
        _one_of("model.activation", self.activation, ("silu", "gelu_tanh"))
        _positive("model.", self, "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
        _positive("model.", self, "max_position_embeddings", "ffn_width", "norm_eps", "init_scale")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}; "
            f"use {-(-self.num_heads // self.num_kv_heads) * self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"model.head_dim {self.head_dim} is odd; RoPE rotates pairs")

    def dropless(self) -> ModelConfig:
        """The same model where no expert is ever full: in use, a token's answer must not depend on other tokens."""
        if self.moe is None:
            return self
        return replace(self, moe=replace(self.moe, dispatch="dropless", buffer_factor=0.0))

    @property
    def output_init_scale(self) -> float:
        """Deviation of the matrices that write to the residual: smaller, as 2 * num_layers of them add up."""
        return self.init_scale / (2 * self.num_layers) ** 0.5

    @property
    def input_widths(self) -> dict[str, int]:
        """Every reduction width of a quantised product, by the option that sets it."""
        widths = {"d_model": self.d_model, "num_heads * head_dim": self.num_heads * self.head_dim}
        if self.moe is None:
            return widths | {"ffn_width": self.ffn_width}
        widths["moe.expert_width"] = self.moe.expert_width
        if self.moe.shared_expert_width:
            widths["moe.shared_expert_width"] = self.moe.shared_expert_width
        return widths


# Options of a model that only training reads (ffn_width, where there are experts); they change no answer.
TRAINING_OPTIONS = (
    "ffn_width", "init_scale", "moe.bias_update_rate", "moe.router_z_loss", "moe.aux_loss", "moe.dispatch",
    "moe.capacity_factor", "moe.buffer_factor",
)  # fmt: skip


@dataclass(frozen=True)
class QuantConfig:
    """Quantisation-aware training: symmetric INT4 weights in groups, dynamic INT8 activations per token.

    Codes and scales are exact in any `compute_dtype`. In bfloat16 a product sees code * scale rounded to 8 bits of
    significand, off by at most 2^-9 of it: for weights 3 % of a step of the grid, for activations, whose codes have
    8 bits themselves, half a step. A product is then off by 0.2 %, where INT8 costs 0.7 %. float32 is exact.
    """

    weight_group_size: int = 32
    quantize_activations: bool = True

    def __post_init__(self) -> None:
        _require(
            self.weight_group_size > 0 and self.weight_group_size % 32 == 0,
            f"quant.weight_group_size is {self.weight_group_size}; LiteRT wants a multiple of 32",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents: `path` is a file, a glob, or a part of the embedded corpus.

    The parts are `stdlib:text`, `stdlib:chat` and their held-out twins `stdlib:heldout`, `stdlib:chat_heldout`.
    """

    path: str = "stdlib:text"
    weight: float = 1.0  # share in the mixture, by rows
    kind: str = "text"  # or chat: conversations, loss on the assistant's tokens only

    def __post_init__(self) -> None:
        _one_of("source.kind", self.kind, ("text", "chat"))
        _require(
            1e-9 <= self.weight <= 1e9,
            f"source.weight of {self.path!r} is {self.weight}; it must be positive, and within 1e-9 .. 1e9",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where documents come from and how they become batches."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    heldout: tuple[SourceConfig, ...] = (SourceConfig("stdlib:heldout"),)
    tokenizer: str = "runs/tokenizer.json"
    seq_len: int = 2048
    global_batch_size: int = 256  # sequences per optimizer step, over all devices and accumulation
    seed: int = 0
    max_bytes: int = 0  # stop a source after the document that reaches this size; 0 reads all
    cache_dir: str = "runs/token_cache"  # of tokenised sources; in a bucket only `tokenize` fills it; "" keeps none

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources is empty; name at least one source")
        _require(self.seq_len > 1, f"data.seq_len is {self.seq_len}; it must be at least 2")
        _positive("data.", self, "global_batch_size")
        _seeded("data.", self)
        _not_negative("data.", self, "max_bytes")
        for number, source in enumerate(self.heldout):
            _require(
                source.weight == 1,
                f"data.heldout.{number}.weight is {source.weight}; held-out sources are read whole: leave it at 1",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with global-norm clipping and one learning-rate schedule."""

    learning_rate: float = 4e-4
    schedule: str = "cosine"  # cosine, linear or constant, after a linear warm-up
    warmup_steps: int = 0
    final_fraction: float = 0.1  # of the peak, where the schedule ends
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only: norms are exempt
    clip_norm: float = 1.0  # of all gradients together; inf is off
    offload: bool = False  # keep the moments in the host's memory between steps

    def __post_init__(self) -> None:
        _one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        _positive("optimizer.", self, "learning_rate", "eps")
        _not_negative("optimizer.", self, "warmup_steps", "weight_decay", "final_fraction")
        _countable("optimizer.", self, "warmup_steps")
        _require(self.clip_norm > 0, f"optimizer.clip_norm is {self.clip_norm}; it must be positive (inf is off)")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; it must be at least 0 and below 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; their product is the number of devices, -1 on one axis takes what is left."""

    data: int = 1  # whole replicas of the parameters
    fsdp: int = -1  # cuts the batch and, between uses, every matrix along d_model
    expert: int = 1  # cuts the batch and the routed experts by expert
    context: int = 1  # cuts the sequence
    tensor: int = 1  # cuts heads, shared expert and vocabulary
    slices: int = 1  # data parallelism between slices, over the data-centre network

    def __post_init__(self) -> None:
        sizes = vars(self)
        if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
            wanted = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
            raise UserError(f"mesh {wanted} is not usable; give sizes of 1 or more, at most one of them -1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; the newest complete checkpoint always stays."""

    every_steps: int = 1000
    every_minutes: float = 0.0  # and when this long has passed since the last save; 0 is off
    keep: int = 3  # newest complete ones
    keep_every: int = 0  # and, for good, those whose step is a multiple of this; 0 keeps none
    keep_best: bool = False  # and the one of the lowest held-out loss, which is then measured at each save
    heldout_batches: int = 16  # of data.heldout that keep_best looks at, at most

    def __post_init__(self) -> None:
        _positive("checkpoint.", self, "every_steps", "keep", "heldout_batches")
        _not_negative("checkpoint.", self, "every_minutes", "keep_every")
        _countable("checkpoint.", self, "heldout_batches")


@dataclass(frozen=True)
class GuardConfig:
    """What is done about a run that goes wrong by itself."""

    on_bad_step: str = "stop"  # or skip: back to the last checkpoint and past the batch
    spike_factor: float = 0.0  # a loss this many times the median of the last 32 is bad; 0: only a non-finite one
    max_skipped: int = 8  # batches; one more stops the run
    hang_minutes: float = 30.0  # without a step until the process ends itself with a stack dump; 0 never does

    def __post_init__(self) -> None:
        _one_of("guard.on_bad_step", self.on_bad_step, ("stop", "skip"))
        _require(
            self.spike_factor == 0 or 1 < self.spike_factor < math.inf,
            f"guard.spike_factor is {self.spike_factor}; it must be 0 (off) or above 1",
        )
        _not_negative("guard.", self, "max_skipped", "hang_minutes")


@dataclass(frozen=True)
class RunConfig:
    """One stage of training: the unit that a folder, a command and a checkpoint belong to."""

    stage: str = "pretrain"
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig | None = None  # set for the QAT stage
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    steps: int = 1000
    gradient_accumulation: int = 1  # microbatches per optimizer step
    compute_dtype: str = "bfloat16"  # or float32, slow on TPUs; parameters, router, norms and loss stay float32
    loss_chunk: int = 2048  # tokens whose logits exist at one time, per device
    remat: str = "full"  # what the backward pass recomputes: nothing, full, save_attention or save_dispatch
    seed: int = 0
    init_from: str = ""  # run folder whose last checkpoint gives the first parameters
    log_every: int = 1

    def __post_init__(self) -> None:
        _one_of("compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        _one_of("remat", self.remat, REMAT_POLICIES)
        _positive("", self, "steps", "loss_chunk", "log_every")
        _seeded("", self)
        _require(
            self.gradient_accumulation > 0 and self.data.global_batch_size % self.gradient_accumulation == 0,
            f"data.global_batch_size {self.data.global_batch_size} is not a multiple of "
            f"gradient_accumulation {self.gradient_accumulation}",
        )
        _require(
            self.data.seq_len <= self.model.max_position_embeddings,
            f"data.seq_len {self.data.seq_len} exceeds model.max_position_embeddings "
            f"{self.model.max_position_embeddings}",
        )
        if self.quant is not None:
            group = self.quant.weight_group_size
            for name, width in self.model.input_widths.items():
                _require(
                    width % group == 0,
                    f"{name} {width} is not a multiple of the quantisation group {group}; "
                    f"use {-(-width // group) * group}",
                )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, padding included."""
        return self.data.global_batch_size * self.data.seq_len
