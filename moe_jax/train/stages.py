"""Several stages in a row: each starts from the last parameters of the one before, complete ones are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etils import epath

from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location
from moe_jax.train.trainer import fit, is_complete


def run_stages(configs: Sequence[RunConfig], root: AnyPath, *, new_data: bool = False) -> list[epath.Path]:
    """Train each config in `root/<stage>`; the run folders in order.

    A stage's `init_from` is set to the folder before it; the first keeps its own. Calling it again after a kill
    goes on where it stopped. `new_data` is for `fit`.
    """
    names = [cfg.stage for cfg in configs]
    if len(set(names)) < len(names):
        raise UserError(f"two stages have the same name ({', '.join(names)}); set stage in one of them")
    folders: list[epath.Path] = []
    for cfg in configs:
        folder = location(root) / cfg.stage
        if folders:
            cfg = replace(cfg, init_from=str(folders[-1]))
        if not is_complete(cfg, folder):
            fit(cfg, folder, new_data=new_data)
        folders.append(folder)
    return folders
