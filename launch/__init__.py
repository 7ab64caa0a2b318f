"""Starting jobs: what `moe_jax` defines, in processes that are watched and restarted."""
