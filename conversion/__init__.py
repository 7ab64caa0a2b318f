"""From a QAT checkpoint to files that phones run: PyTorch tensors in INT4, a .tflite, a .litertlm.

The way is checkpoint -> keymap -> weights -> torch_model -> litert; every code and scale of the checkpoint
arrives unchanged. `litert/` makes LiteRT files and asks the engine, `kernel/` is the optional C++ of experts and
tokens, `arm/` asks the engine's Arm build; `executorch/`, the `hf_*` and the `gguf*` modules are the formats of
others.
"""

MASKED = -1e30  # added to the scores of positions that must not be seen; finite, so 0 * it is 0
