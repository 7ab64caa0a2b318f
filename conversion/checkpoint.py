"""One checkpoint of a run, looked up once, as every format reads it; a layer is read when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from moe_jax.config import RunConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import AnyPath, is_remote, location
from moe_jax.train.catalogue import require_present


class Stack:
    """A float32 parameter, layers stacked, of which only the layers asked for are read."""

    def __init__(self, path: epath.Path, name: str) -> None:
        import tensorstore

        base: Any = f"{path}/model"
        if not is_remote(path):  # as a URL, what follows a % # ? or | in the path would mean something
            base = {"driver": "file", "path": f"{base}/"}
        store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        self._path = path
        self._array = tensorstore.open({"driver": "zarr3", "kvstore": store}, read=True).result()
        self.shape = tuple(self._array.shape)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self._read(self._array[layer])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(self._array)

    def _read(self, array: Any) -> np.ndarray:
        try:
            value = array.read().result()
        except ValueError:
            require_present(self._path)
            raise
        require_present(self._path)
        return value


@dataclass(frozen=True)
class Checkpoint:
    """What a run holds at one step: its config, float32 parameters by tree path, and the tokenizer that it read."""

    path: epath.Path
    run: RunConfig
    parameters: dict[str, Stack]
    tokenizer: Tokenizer
    tokenizer_file: epath.Path

    def arrays(self) -> dict[str, np.ndarray]:
        """All parameters in memory."""
        return {name: np.asarray(stack) for name, stack in self.parameters.items()}

    def group(self, quantize_float: bool = False) -> int:
        """Weights that share a scale; for a run without QAT 32, or unless `quantize_float` a UserError."""
        if self.run.quant is None and not quantize_float:
            raise UserError(
                f"{self.path.parents[1]} is a {self.run.stage} run without quantisation; export the folder of its "
                "QAT stage, or pass --quantize-float to round weights that were not trained for it"
            )
        return self.run.quant.weight_group_size if self.run.quant else 32


def open_checkpoint(run_dir: AnyPath, step: int | None = None, tokenizer: AnyPath | None = None) -> Checkpoint:
    """The checkpoint of `step` or the last, verified by its checksums, and `tokenizer` or the run's own.

    Raises:
        UserError: no such checkpoint or a damaged one, or a tokenizer that it was not trained with.
    """
    from conversion import keymap
    from moe_jax.train.checkpoint import checkpoint_path, config_of, describe, verify

    path = checkpoint_path(run_dir, step)
    verify(path, model_only=True)
    metadata, _ = describe(path)
    run = config_of(path, metadata)
    try:
        parameters = {name: Stack(path, name) for name in keymap.jax_shapes(run.model)}
    except ValueError as error:
        require_present(path)
        raise UserError(f"checkpoint {path} lacks a parameter of its config ({error}); export another") from None
    file = location(tokenizer or location(run_dir) / "tokenizer.json")
    found = Tokenizer.load(file)
    found.require(run.model.vocab_size, metadata["tokenizer"])
    return Checkpoint(path, run, parameters, found, file)
