"""Reading a checkpoint: whether it is what was written, what it describes, its arrays onto shardings or the host.

It holds two flat trees, `model` (parameters and router biases by tree path, all that conversion reads) and
`optimizer` (moments, PRNG key, step), and as JSON the config, the data position and the tokenizer's hash.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, location
from moe_jax.overrides import from_dict
from moe_jax.train.agreement import together
from moe_jax.train.catalogue import checkpoint_path, damaged_sentence, require_present
from moe_jax.train.checksums import Damaged, read_record, share, wrong_content

FORMAT = "moe_jax 1"
_MODEL_PREFIXES = ("params/", "biases/")
_READ_AT_ONCE = 128 * 2**20  # bytes, beside the arrays that are there already
_FORMER = {"rng"}  # leaves of earlier versions, which read nothing from them
_OPTIMIZER_ARRAYS = re.compile("optimizer/(.*/)?d/")

# Every failure is raised again with path and mend; the libraries' own tracebacks of it would bury that sentence.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def load_parameters(run_dir: AnyPath, step: int | None = None) -> tuple[RunConfig, dict[str, np.ndarray]]:
    """Config and {tree path: array} of parameters and router biases, on the host, without devices or shardings.

    Raises:
        UserError: no such checkpoint, or one that is damaged or was not written by this package.
    """
    path = checkpoint_path(run_dir, step)
    verify(path, model_only=True)
    metadata, shapes = describe(path)
    wanted = {k: np.empty(v.shape, v.dtype) for k, v in shapes["model"].items()}
    loaded = _load(path, {"model": wanted})["model"]
    return config_of(path, metadata), {k: np.asarray(v) for k, v in loaded.items()}


def restore_model(path: epath.Path, abstract: Any) -> tuple[Any, Any]:
    """(params, biases) of a checkpoint on the shardings of the abstract train state; UserError if it is damaged."""
    verify(path, model_only=True)
    loaded = restore_arrays(path, {"params": abstract.params, "biases": abstract.biases}, describe(path)[1])
    return loaded["params"], loaded["biases"]


def config_of(path: epath.Path, metadata: dict[str, Any]) -> RunConfig:
    """The config stored with a checkpoint."""
    try:
        return from_dict(RunConfig, metadata["config"])
    except (UserError, KeyError) as error:
        raise UserError(f"checkpoint {path} holds another version's config: {error}") from None


def find_damage(
    path: epath.Path, model_only: bool = False, progress: Callable[[int, int], None] | None = None
) -> str | None:
    """What is wrong with a complete checkpoint, naming the file; None when it is what was written.

    Every file is read, each by one of the processes, and all return the same. With `model_only` the optimizer's
    arrays are not read; `progress` is told (bytes done, bytes to do) of this process's share.
    """

    def mine() -> str | None:
        try:
            record = read_record(path)
        except Damaged as damage:
            return str(damage)
        except FileNotFoundError:
            return "its record is missing"
        sizes = {k: n for k, (n, _) in record.files.items() if not (model_only and _OPTIMIZER_ARRAYS.match(k))}
        names = share(sizes, jax.process_index(), jax.process_count())
        done, total = 0, sum(sizes[name] for name in names)
        for name, reason in wrong_content(path, record, names, threads=min(os.cpu_count() or 1, 8)):
            if reason is not None:
                return reason
            done += sizes[name]
            if progress is not None:
                progress(done, total)
        return None

    return next(filter(None, together("damage", mine)), None)


def verify(path: AnyPath, model_only: bool = False, progress: Callable[[int, int], None] | None = None) -> None:
    """Read a complete checkpoint against its checksums, as `find_damage` does; UserError naming a wrong file."""
    reason = find_damage(location(path), model_only, progress)
    require_present(location(path))
    if reason:
        raise UserError(damaged_sentence(location(path), reason))


def flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf} of a state or a part of one; a path names its field first, as in params/embed/embedding."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def tree_of(name: str) -> str:
    """The tree of the checkpoint that a leaf goes to."""
    return "model" if name.startswith(_MODEL_PREFIXES) else "optimizer"


def stored_name(name: str) -> str:
    """Parameters and biases share one tree under their bare paths, which are disjoint."""
    return name.partition("/")[2] if name.startswith(_MODEL_PREFIXES) else name


def describe(path: epath.Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(stored JSON, {tree: {name: leaf metadata}}) without reading any array."""
    try:
        described = ocp.checkpointables_metadata(str(path))
        metadata, trees = described.custom_metadata, described.metadata
    except Exception as error:
        require_present(path)
        raise _unreadable(path, reason_of(error)) from error
    require_present(path)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this trainer or is damaged; name another folder")
    if any(not isinstance(trees.get(name), dict) for name in ("model", "optimizer")):
        raise _unreadable(path, "its list of arrays is cut")
    return metadata, {name: trees[name] for name in ("model", "optimizer")}


def restore_arrays(path: epath.Path, abstract: Any, shapes: dict[str, dict[str, Any]]) -> Any:
    """The leaves of `abstract`, a state or a part of one, on its shardings; `shapes` is what `describe` returned.

    Beside the arrays no more than a bounded number of bytes is in memory: reading all at once would hold all twice.

    Raises:
        UserError: leaves that are missing, unknown, or of another shape or dtype, by name.
    """
    names = flatten(abstract)
    wanted: dict[str, dict[str, Any]] = {tree: {} for tree in {tree_of(name) for name in names}}
    for name, leaf in names.items():
        wanted[tree_of(name)][stored_name(name)] = leaf
    problems = []
    for tree, leaves in wanted.items():
        stored = shapes[tree]
        problems += [f"{name} is missing" for name in leaves if name not in stored]
        problems += [f"{name} is unknown" for name in stored if name not in leaves and name not in _FORMER]
        for name in leaves.keys() & stored.keys():
            leaf, found = leaves[name], stored[name]
            if (tuple(found.shape), found.dtype) != (tuple(leaf.shape), leaf.dtype):
                want, have = f"{leaf.dtype}{list(leaf.shape)}", f"{found.dtype}{list(found.shape)}"
                problems.append(f"{name} is {have} instead of {want}")
    if problems:
        if "optimizer" in wanted and shapes["optimizer"].keys() == {"step"}:  # an import
            raise UserError(f"checkpoint {path} holds parameters only: name its run in init_from of a new one")
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(sorted(problems)[:8])
        raise UserError(f"checkpoint {path} does not fit this config: {listed}{more}; use its own config")
    shards = [_shard_bytes(leaf, shapes[tree][name]) for tree in wanted for name, leaf in wanted[tree].items()]
    loaded = _load(path, wanted, max(_READ_AT_ONCE, 2 * max(shards)) + 1)
    leaves = [loaded[tree_of(name)][stored_name(name)] for name in names]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _shard_bytes(leaf: Any, stored: Any) -> int:
    """The most that one shard of a leaf on this process reads: the stored chunks that it overlaps, whole."""
    shape, chunk = stored.shape, stored.storage_metadata.chunk_shape
    if not shape:
        return 1024
    sizes = [stored.dtype.itemsize]
    for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values():
        ends = [cut.indices(size) for cut, size in zip(index, shape, strict=True)]
        covered = [-(-end // c) * c - begin // c * c for (begin, end, _), c in zip(ends, chunk, strict=True)]
        sizes.append(stored.dtype.itemsize * math.prod(covered))
    return max(sizes)


def _load(path: epath.Path, wanted: dict[str, Any], read_at_once: int | None = None) -> dict[str, Any]:
    context = ocp.Context()
    context.memory.read_concurrent_bytes = read_at_once
    context.pytree.loading.partial_load = True  # what is there is compared with what is wanted before
    try:
        with context:
            loaded = ocp.load_checkpointables(str(path), wanted)
    except Exception as error:
        require_present(path)
        raise _unreadable(path, reason_of(error)) from error
    require_present(path)
    return loaded


def _unreadable(path: epath.Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {path} cannot be read ({reason}); see if it is damaged by 'python -m moe_jax inspect', "
        "else mend the access to it"
    )


def reason_of(error: BaseException) -> str:
    """The library's message without its kilobytes of context."""
    text = " ".join(str(error).partition("[tensorstore_spec")[0].split()) or type(error).__name__
    return text if len(text) < 240 else text[:240] + "..."
