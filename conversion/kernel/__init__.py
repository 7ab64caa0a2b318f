"""The optional kernel for INT4 products, routed experts and a token's layers: C++ in src/, built at first use."""

from moe_jax.config import ModelConfig
from moe_jax.errors import UserError

# Of its ops.
EXPERTS, LINEAR, EMBEDDING = "moe_jax.routed_experts", "moe_jax.linear", "moe_jax.embedding"
SELF_ATTENTION, MIXTURE = "moe_jax.self_attention", "moe_jax.mixture"
NAMES = (EXPERTS, LINEAR, EMBEDDING, SELF_ATTENTION, MIXTURE)
_MOST_EXPERTS, _MOST_CHOICES = 1024, 64  # that it has room for


def require_room(config: ModelConfig) -> None:
    """UserError for a model with more experts, or more of them for a token, than the kernel has room for."""
    moe = config.moe
    if moe and (moe.num_experts > _MOST_EXPERTS or moe.num_experts_per_tok > _MOST_CHOICES):
        raise UserError(
            f"the kernel has no room for {moe.num_experts_per_tok} of {moe.num_experts} experts (it has for "
            f"{_MOST_CHOICES} of {_MOST_EXPERTS}); take --experts sparse"
        )
