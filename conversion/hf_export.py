"""A run's checkpoint as a published MobileMoE folder: weights, config, tokenizer, and the model's own code.

BF16 rounds the float32 parameters; INT4 codes grouped along the input move unchanged. Experts are grouped along the
output there, so those that were not imported that way are rounded again, which is refused unless allowed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion import hf_files, keymap
from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.hf_companions import write_companions
from conversion.hf_config import GROUP, hf_config
from conversion.hf_import import layout
from conversion.hf_int4 import Loss, on_grid, parts, recovered
from conversion.int4 import Int4
from conversion.outputs import on_disk, writing
from conversion.tensor_file import BF16, DTYPES
from moe_jax.errors import UserError
from moe_jax.files import write_json


def export_folder(
    run_dir: str | Path,
    folder: str | Path,
    *,
    kind: str = "bf16",
    step: int | None = None,
    tokenizer: str | Path | None = None,
    quantize_float: bool = False,
    allow_requantization: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint of a run (the last, or that of `step`) for transformers; what it lost, for a report.

    Raises:
        UserError: no such checkpoint, a tokenizer that is not its own, a model or weights that the layout cannot
            hold, rounding that was not allowed, or a folder that is not empty. Nothing is left behind.
    """
    folder, int4 = on_disk(folder).absolute(), kind == "int4-g32"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists; name another folder")
    source = open_checkpoint(run_dir, step, tokenizer)
    config, found = source.run.model, source.tokenizer
    described = hf_config(config, found, int4)
    if int4:
        source.group(quantize_float)  # refuses a run without QAT
    writer = _Writer(source, int4, allow_requantization)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
        aside = Path(name, folder.name)
        aside.mkdir()
        writer.write(aside)
        write_json(aside / "config.json", described)
        write_companions(aside, found, source.tokenizer_file.read_bytes(), config.max_position_embeddings)
        os.replace(aside, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"folder": str(folder), "format": kind, "bytes": size} | writer.report()


class _Writer:
    """The weights, one tensor at a time."""

    def __init__(self, source: Checkpoint, int4: bool, allowed: bool) -> None:
        self._run, self._parameters, self._int4, self._allowed = source.run, source.parameters, int4, allowed
        self._rounded, self._requantized = Loss(), Loss()

    def write(self, folder: Path) -> None:
        wanted = {name: (types[0], shape) for name, (types, shape) in layout(self._run.model, self._int4).items()}
        hf_files.write(folder, wanted, self._arrays())

    def report(self) -> dict[str, Any]:
        return {"rounding": self._rounded.report(), "requantization": self._requantized.report()}

    def _arrays(self) -> Iterator[np.ndarray]:
        tensors = keymap.hf_tensors(self._run.model)
        for tensor in tqdm(tensors, "Hugging Face", unit="tensor", disable=None):
            row, stack = tensor.row, self._parameters[tensor.row.jax]
            value = np.asarray(stack[tensor.layer] if row.stacked else stack)
            names = [name.format(tensor.layer) for name in row.torch]
            value = keymap.to_hf(row, value)[names.index(tensor.name.removesuffix(".weight")) if row.int4 else 0]
            if self._int4 and row.int4:
                weight = self._experts(tensor, value) if row.in_out else self._linear(np.ascontiguousarray(value))
                yield weight.packed
                yield weight.scales
            elif row.jax.endswith("router/kernel"):
                yield value
            else:
                rounded = value.astype(DTYPES[BF16])
                self._rounded.note(tensor.name, value, rounded.astype(np.float32))
                yield rounded

    def _linear(self, value: np.ndarray) -> Int4:
        """Codes that were imported, else those of the grid, which are what was trained."""
        found = _recovered(value, placed=True)
        if found is None:
            group = self._run.quant.weight_group_size if self._run.quant else GROUP
            pieces = [Int4.from_float(value[index], group) for index in parts(value.shape)]
            found = _joined(pieces, value.shape)
            found = Int4(found.codes, np.repeat(found.scales, group // GROUP, axis=-1))
        return found

    def _experts(self, tensor: keymap.HfTensor, value: np.ndarray) -> Int4:
        """Codes that were imported, else what was trained, rounded again in groups along the output."""
        found = _recovered(value, placed=False)
        if found is not None:
            return found
        pieces, quant = [], self._run.quant
        for index in parts(value.shape):
            trained = on_grid(value[index], -2, quant.weight_group_size) if quant else value[index]
            pieces.append(Int4.from_float(trained, GROUP))
            self._requantized.note(tensor.name, trained, pieces[-1].dequantize())
        if quant and not self._allowed:
            raise UserError(
                f"the published INT4 layout groups experts along the output, this run trained groups along "
                f"the input: rounding again moves {tensor.name} by {self._requantized.relative_rms:.1%} (root mean "
                "square); pass --allow-requantization, or export as bf16, or to GGUF, which keeps the codes"
            )
        return _joined(pieces, value.shape)


def _recovered(value: np.ndarray, placed: bool) -> Int4 | None:
    """The codes and scales that a whole tensor was imported with; None if it was trained since, or here."""
    pieces = []
    for index in parts(value.shape):
        piece, exact = recovered(value[index], GROUP, placed)
        if not exact:
            return None
        pieces.append(piece)
    return _joined(pieces, value.shape)


def _joined(pieces: list[Int4], shape: tuple[int, ...]) -> Int4:
    codes, scales = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("codes", "scales"))
    return Int4(codes.reshape(shape), scales.reshape(*shape[:-1], -1))
