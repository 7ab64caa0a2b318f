"""Asking `launch fit` before a job is started on machines that cost money."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace

from launch.fit import check_fit, on_slices
from launch.fit_compile import cache_path, say
from launch.slices import Slice
from moe_jax.config import CheckpointConfig, DataConfig, GuardConfig, RunConfig
from moe_jax.errors import UserError


def fit_first(cfg: RunConfig, kind: Slice, slices: int, which: str) -> float | None:
    """Tokens per second and chip at the roofline; None, with the reason on standard error, where nothing can tell.

    `which` of the job's stages this is, as in `1 of 4`, stands in what is said while the step is compiled.

    Raises:
        UserError: the step does not fit, or cannot be cut over these slices.
    """
    if importlib.util.find_spec("libtpu") is None:
        say(f"{cfg.stage}: whether it fits is not known without libtpu: pip install -r requirements/tpu.txt")
        return None
    cfg, start = _step_alone(cfg), time.monotonic()
    if not (kept := cache_path(on_slices(cfg, slices), kind, slices).exists()):
        where = f"{slices} x {kind.family}:{kind.topology}"
        say(f"{cfg.stage} ({which}): compiling for {where}, which takes a minute or two; --no-fit leaves it out")
    try:
        rate = check_fit(cfg, kind, slices)
    except UserError as error:
        raise UserError(f"{error}; --no-fit starts it all the same") from None
    if not kept:
        say(f"{cfg.stage} fits, compiled in {time.monotonic() - start:.0f} s; the answer is kept")
    return rate


def _step_alone(cfg: RunConfig) -> RunConfig:
    """`cfg` without what the compiled step does not depend on, so that one kept answer serves many jobs."""
    data = DataConfig(seq_len=cfg.data.seq_len, global_batch_size=cfg.data.global_batch_size)
    return replace(
        cfg, data=data, checkpoint=CheckpointConfig(), guard=GuardConfig(), seed=0, init_from="", log_every=1
    )
