"""Several stages in a row: each starts from the last parameters of the one before, complete ones are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from etils import epath

from moe_jax.config import RunConfig
from moe_jax.errors import Preempted, UserError
from moe_jax.files import AnyPath, location
from moe_jax.train.agreement import together
from moe_jax.train.trainer import fit, is_complete
from moe_jax.train.watch import StopRequest


def run_stages(configs: Sequence[RunConfig], root: AnyPath, *, new_data: bool = False) -> list[epath.Path]:
    """Train each config in `root/<stage>`; the run folders in order.

    A stage's `init_from` is set to the folder before it; the first keeps its own. Calling it again after a kill
    goes on where it stopped. `new_data` is for `fit`. Raises Preempted where `fit` does, and between two stages.
    """
    names = [cfg.stage for cfg in configs]
    if len(set(names)) < len(names):
        raise UserError(f"two stages have the same name ({', '.join(names)}); set stage in one of them")
    for name in names:
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"stage {name!r} names a folder here; set a stage without a slash or a leading dot")
    folders: list[epath.Path] = []
    stop = StopRequest()
    for cfg in configs:
        folder = location(root) / cfg.stage
        if folders:
            cfg = replace(cfg, init_from=str(folders[-1]))
        if not is_complete(cfg, folder, new_data):
            # A notice that came while the stage before ended must not wait until this one has compiled.
            if signals := list(filter(None, together("stage", lambda: stop.name))):
                raise Preempted(f"{signals[0]}: {', '.join(names[: len(folders)])} is complete")
            fit(cfg, folder, new_data=new_data, stop=stop)
        folders.append(folder)
    return folders
