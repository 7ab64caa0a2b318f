"""The optional kernel for INT4 products, routed experts and attention: C++ in src/, built at first use."""

# Of its ops.
EXPERTS, LINEAR = "moe_jax.routed_experts", "moe_jax.linear"
EMBEDDING, ATTENTION = "moe_jax.embedding", "moe_jax.attention"
ROTARY, ROUTE = "moe_jax.rotary", "moe_jax.route"
NAMES = (EXPERTS, LINEAR, EMBEDDING, ATTENTION, ROTARY, ROUTE)
