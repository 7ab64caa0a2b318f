"""Training of MobileMoE in JAX: configs -> data -> model -> step -> trainer -> checkpoint.

Imports neither torch nor LiteRT; `launch` and `conversion` use it, never the reverse.
"""

import os
from importlib.util import find_spec
from pathlib import Path


def has_tpu() -> bool:
    """Whether this machine has a TPU, asked without starting JAX."""
    return any(any(Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*"))


# Before jax is imported: libtpu may be here only to compile for TPUs elsewhere, and without one it complains
# on every start that it finds none.
if find_spec("libtpu") and not has_tpu():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
