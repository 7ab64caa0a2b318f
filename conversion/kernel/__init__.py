"""The optional kernel for a layer's routed experts: C++ in src/, built at first use and handed to each runtime."""

NAME = "moe_jax.routed_experts"  # of the op
