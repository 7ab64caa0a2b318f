"""Several stages in a row: each starts from the last parameters of the one before, complete ones are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from etils import epath

from moe_jax.config import RunConfig
from moe_jax.data.sources import source_files
from moe_jax.data.tokenized import require_tokens
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import Preempted, UserError
from moe_jax.files import AnyPath, location
from moe_jax.model.describe import describe
from moe_jax.parallel.mesh import make_mesh
from moe_jax.parallel.rules import check_divisible
from moe_jax.run_lock import require_plain
from moe_jax.train.agreement import by_first, together
from moe_jax.train.catalogue import complete_steps
from moe_jax.train.trainer import fit, is_complete
from moe_jax.train.watch import StopRequest


def run_stages(configs: Sequence[RunConfig], root: AnyPath, *, new_data: bool = False) -> list[epath.Path]:
    """Train each config in `root/<stage>`; the run folders in order.

    A stage's `init_from` is set to the folder before it; the first keeps its own. Text and tokenizer of every stage
    must be there at the start. Calling it again after a kill goes on where it stopped. `new_data` is for `fit`.
    Raises Preempted where `fit` does, and between two stages.
    """
    names = [cfg.stage for cfg in configs]
    if len(set(names)) < len(names):
        raise UserError(f"two stages have the same name ({', '.join(names)}); set stage in one of them")
    for name in names:
        if not name or "/" in name or name.startswith("."):
            raise UserError(f"stage {name!r} names a folder here; set a stage without a slash or a leading dot")
    for before, cfg in zip([None, *configs[:-1]], configs, strict=True):
        folder = location(root) / cfg.stage
        if is_complete(cfg, folder, new_data):
            continue
        begun = by_first("begun", partial(complete_steps, folder))
        _require_usable(cfg, None if begun else before, folder)
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


def _require_usable(cfg: RunConfig, before: RunConfig | None, folder: epath.Path) -> None:
    """UserError for what `fit` would refuse when the stage's turn comes, after days of others.

    `before` is the stage whose parameters it still has to start from, if any.
    """
    require_plain(folder)
    tokenizer = Tokenizer.load(cfg.data.tokenizer)
    tokenizer.require(cfg.model.vocab_size)
    check_divisible(cfg, make_mesh(cfg.mesh))
    if cfg.checkpoint.keep_best and not cfg.data.heldout:
        raise UserError(f"{cfg.stage}: checkpoint.keep_best needs data.heldout, which is empty; name a source")
    for source in (*cfg.data.sources, *(cfg.data.heldout if cfg.checkpoint.keep_best else ())):
        source_files(source.path)
        require_tokens(source, tokenizer, cfg.data.max_bytes, cfg.data.cache_dir)
    if before is not None:
        shapes, needed = ({path: leaf.shape for path, leaf in describe(c.model).items()} for c in (before, cfg))
        if other := sorted(path for path in shapes.keys() | needed if shapes.get(path) != needed.get(path)):
            raise UserError(
                f"{cfg.stage} has other parameters than {before.stage}, which it starts from ({other[0]} and "
                f"{len(other) - 1} more); give both the same model"
            )
