"""The model, in Flax NNX: one block of attention and feed-forward (routed or dense), scanned over layers.

Parameters of all layers are stacked along a first axis. `describe.py` lists every parameter before any
exists; change shapes here and sharding, counts, QAT coverage, checkpoints and export follow.
Legend: B batch, S sequence, D model, N query heads, G key/value heads, H head width, E experts, K experts
per token, F expert width, V vocabulary, L layers, C cache length.
"""
