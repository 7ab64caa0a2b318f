"""Where a run fits and how it starts.

`design` and `scaling_law` find what to train; `fit*` compile it for TPU slices that are not here; `pods`, `jobset`,
`queued` and `xpk` print what starts it there; `local` and `demo` run it on this machine. All use what `moe_jax`
defines; nothing in `moe_jax` knows of them.
"""
