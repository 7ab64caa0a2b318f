"""Asynchronous checkpoints under `run/checkpoints/<step>`: what is saved, when it counts, how it is refused.

A checkpoint holds two flat trees, `model` (parameters and router biases by tree path, all that conversion reads)
and `optimizer` (moments, PRNG key, step), and as JSON the config, the data position and the tokenizer's hash. Orbax
writes aside and renames, so a folder named by a step with its commit marker is whole and anything else is not.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import write_json
from moe_jax.overrides import from_dict

FORMAT = "moe_jax 1"
_COMMIT = "commit_success.txt"
_SIZES = "sizes.json"
_MODEL_PREFIXES = ("params/", "biases/")

# Every failure is raised again with path and mend; the libraries' own tracebacks of it would bury that sentence.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def complete_steps(run_dir: str | Path) -> list[int]:
    """Steps whose checkpoint is committed, ascending; half-written folders do not count."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir() if p.name.isdecimal() and (p / _COMMIT).is_file()]
    return sorted(int(name) for name in names)


def load_parameters(run_dir: str | Path, step: int | None = None) -> tuple[RunConfig, dict[str, np.ndarray]]:
    """Config and {tree path: array} of parameters and router biases, on the host, without devices or shardings.

    Raises:
        UserError: no such checkpoint, or one that is truncated or was not written by this package.
    """
    path = checkpoint_path(run_dir, step)
    metadata, shapes = _describe(path)
    wanted = {k: np.empty(v.shape, v.dtype) for k, v in shapes["model"].items()}
    loaded = _load(path, {"model": wanted})["model"]
    return config_of(path, metadata), {k: np.asarray(v) for k, v in loaded.items()}


def restore_model(run_dir: str | Path, abstract: Any) -> tuple[Any, Any]:
    """(params, biases) of the last checkpoint, on the shardings of the abstract train state."""
    path = checkpoint_path(run_dir, None)
    part = {"params": abstract.params, "biases": abstract.biases}
    loaded = _restore(path, part, _describe(path)[1])
    return loaded["params"], loaded["biases"]


def checkpoint_path(run_dir: str | Path, step: int | None) -> Path:
    """Folder of the checkpoint of `step`, the last complete one for None; UserError when there is none."""
    steps = complete_steps(run_dir)
    if not steps or (step is not None and step not in steps):
        which = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
        have = f"it has {', '.join(map(str, steps))}" if steps else "train it first"
        raise UserError(f"{run_dir} has no {which}; {have}")
    return Path(run_dir).absolute() / "checkpoints" / str(steps[-1] if step is None else step)


def config_of(path: Path, metadata: dict[str, Any]) -> RunConfig:
    """The config stored with a checkpoint."""
    try:
        return from_dict(RunConfig, metadata["config"])
    except (UserError, KeyError) as error:
        raise UserError(f"checkpoint {path} holds another version's config: {error}") from None


class Checkpoints:
    """The checkpoints of one run folder: at most one save is under way, the last `keep` complete ones stay."""

    def __init__(self, run_dir: str | Path, keep: int) -> None:
        self.run_dir, self.keep = Path(run_dir).absolute(), keep
        self.folder = self.run_dir / "checkpoints"
        self._saver: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Start saving `state` (copied to the host before this returns, so that the caller may donate it).

        Raises:
            UserError: this save could not start or the one before it failed.
        """
        self.wait()
        self._step, self._error = step, None
        trees: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
        for name, leaf in _flatten(state).items():
            trees[_tree(name)][_stored(name)] = leaf
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        try:
            self.clean()
            self.folder.mkdir(parents=True, exist_ok=True)
            if (target := self.folder / str(step)).exists():  # incomplete, else it had been restored
                os.rename(target, self.folder / f"{step}.damaged-{time.time_ns()}")
            with ocp.Context(async_options=options):
                response = ocp.save_checkpointables_async(
                    str(target), trees, custom_metadata={"format": FORMAT, **metadata}
                )
        except Exception as error:
            self._fail(error)
        self._saver = threading.Thread(target=self._finish, args=(response,), daemon=True)
        self._saver.start()

    def check(self) -> None:
        """Raise the UserError of a save that failed in the background; cheap enough for every step."""
        if self._saver is not None and not self._saver.is_alive():
            self.wait()

    def wait(self) -> None:
        """Block until no save is under way, raise if it failed, then remove what is older than the last `keep`."""
        if self._saver is None:
            return
        self._saver.join()
        self._saver = None
        if self._error is not None:
            self._fail(self._error)
        for step in complete_steps(self.run_dir)[: -self.keep]:
            # Renamed first: a kill during the removal must not leave a folder that looks complete.
            doomed = self.folder / f"{step}.removed"
            os.rename(self.folder / str(step), doomed)
            shutil.rmtree(doomed)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """(state on the shardings of `abstract`, stored JSON) of `step`, the last complete one for None.

        Raises:
            UserError: no such checkpoint, truncated, foreign, or leaves that are missing or of another shape.
        """
        path = checkpoint_path(self.run_dir, step)
        metadata, shapes = _describe(path)
        return _restore(path, abstract, shapes), metadata

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The stored JSON alone: config, data position, tokenizer hash."""
        return _describe(checkpoint_path(self.run_dir, step))[0]

    def clean(self) -> None:
        """Remove what a killed save or removal left behind; nothing named by a step is touched."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if ".orbax-checkpoint-tmp" in path.name or path.suffix == ".removed":
                shutil.rmtree(path)

    def _finish(self, response: ocp.AsyncResponse) -> None:
        try:
            response.result()
            path = self.folder / str(self._step)
            files = [p for p in path.rglob("*") if p.is_file()]
            write_json(path / _SIZES, {str(p.relative_to(path)): p.stat().st_size for p in files})
        except BaseException as error:
            self._error = error

    def _fail(self, error: BaseException) -> NoReturn:
        shutil.rmtree(self.folder / f"{self._step}.orbax-checkpoint-tmp", ignore_errors=True)
        steps = complete_steps(self.run_dir)
        last = f"the last good one is step {steps[-1]}" if steps else "there is no earlier one"
        raise UserError(
            f"saving checkpoint {self.folder / str(self._step)} failed ({_reason(error)}); {last}: "
            "free disk space or make the folder writable, then run the same command to go on"
        ) from error


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _tree(name: str) -> str:
    return "model" if name.startswith(_MODEL_PREFIXES) else "optimizer"


def _stored(name: str) -> str:
    """Parameters and biases share one tree under their bare paths, which are disjoint."""
    return name.partition("/")[2] if name.startswith(_MODEL_PREFIXES) else name


def _describe(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(stored JSON, {tree: {name: leaf metadata}}) without reading any array."""
    _check_sizes(path)
    try:
        described = ocp.checkpointables_metadata(str(path))
        metadata, trees = described.custom_metadata, described.metadata
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this trainer or is damaged; name another folder")
    if any(not isinstance(trees.get(name), dict) for name in ("model", "optimizer")):
        raise _unreadable(path, ValueError("its list of arrays cannot be read"))
    return metadata, {name: trees[name] for name in ("model", "optimizer")}


def _check_sizes(path: Path) -> None:
    """Name a lost or shortened file before Orbax meets it: its own report is pages of nested tracebacks.

    The list is written just after the commit; a kill between the two leaves a whole checkpoint without it.
    """
    if not (path / _SIZES).is_file():
        return
    try:
        for name, size in json.loads((path / _SIZES).read_text()).items():
            found = (path / name).stat().st_size if (path / name).is_file() else None
            if found != size:
                how = "is missing" if found is None else f"has {found} bytes instead of {size}"
                raise _unreadable(path, ValueError(f"{name} {how}"))
    except ValueError as error:
        raise _unreadable(path, ValueError(f"{_SIZES} cannot be read")) from error


def _restore(path: Path, abstract: Any, shapes: dict[str, dict[str, Any]]) -> Any:
    names = _flatten(abstract)
    wanted: dict[str, dict[str, Any]] = {tree: {} for tree in {_tree(name) for name in names}}
    for name, leaf in names.items():
        wanted[_tree(name)][_stored(name)] = leaf
    problems = []
    for tree, leaves in wanted.items():
        stored = shapes[tree]
        problems += [f"{name} is missing" for name in leaves if name not in stored]
        problems += [f"{name} is unknown" for name in stored if name not in leaves]
        for name in leaves.keys() & stored.keys():
            leaf, found = leaves[name], stored[name]
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.eval_shape(jax.random.key_data, leaf)
            if (tuple(found.shape), found.dtype) != (tuple(leaf.shape), leaf.dtype):
                want, have = f"{leaf.dtype}{list(leaf.shape)}", f"{found.dtype}{list(found.shape)}"
                problems.append(f"{name} is {have} instead of {want}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        listed = "; ".join(sorted(problems)[:8])
        raise UserError(f"checkpoint {path} does not fit this config: {listed}{more}")
    loaded = _load(path, wanted)
    leaves = [loaded[_tree(name)][_stored(name)] for name in names]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _load(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
        return ocp.load_checkpointables(str(path), wanted)
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    earlier = [s for s in complete_steps(path.parents[1]) if s < int(path.name)]
    mend = f"to fall back to step {earlier[-1]}" if earlier else "and train again"
    return UserError(f"checkpoint {path} is truncated or damaged ({_reason(error)}); remove it {mend}")


def _reason(error: BaseException) -> str:
    """The library's message without its kilobytes of context."""
    text = " ".join(str(error).partition("[tensorstore_spec")[0].split()) or type(error).__name__
    return text if len(text) < 240 else text[:240] + "..."
