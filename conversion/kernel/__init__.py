"""The optional kernel for INT4 products, routed experts and a token's layers: C++ in src/, built at first use."""

# Of its ops.
EXPERTS, LINEAR, EMBEDDING = "moe_jax.routed_experts", "moe_jax.linear", "moe_jax.embedding"
SELF_ATTENTION, MIXTURE = "moe_jax.self_attention", "moe_jax.mixture"
NAMES = (EXPERTS, LINEAR, EMBEDDING, SELF_ATTENTION, MIXTURE)
