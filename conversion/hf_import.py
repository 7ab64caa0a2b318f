"""A published MobileMoE folder to a run folder, from which training goes on and conversion exports.

BF16 moves exactly. Of INT4, codes grouped along the input become floats that the grid takes back to those codes;
experts, grouped along the output, are dequantised, and the grid will round them again: refused unless allowed.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion import keymap
from conversion.hf_config import GROUP, read_config
from conversion.hf_files import Folder
from conversion.hf_int4 import Loss, masters, on_grid, parts
from conversion.int4 import Int4, unpack_nibbles
from conversion.outputs import on_disk
from conversion.tensor_file import BF16, F16, F32, U8
from moe_jax.config import DataConfig, ModelConfig, QuantConfig, RunConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import write_bytes, write_json
from moe_jax.overrides import to_dict
from moe_jax.paths import unflatten_paths
from moe_jax.run_lock import require_plain


def import_folder(
    folder: str | Path, run_dir: str | Path, *, allow_requantization: bool = False, stage: str = ""
) -> dict[str, Any]:
    """Write the model in `folder` as the final checkpoint of a run; what was read and what it lost, for a report.

    The parameters in float32 lie on disk until the checkpoint is written: they take 8 bytes each there for a while,
    4 at the end, and as much as 4 in memory while the checkpoint is under way (L: 43 GB of disk, 20 of memory).

    Raises:
        UserError: a field, tensor or tokenizer that is not of the layout, by its name; codes that would have to be
            rounded again without `allow_requantization`; a run folder that is not empty. Nothing is left behind.
    """
    folder, run_dir = Path(folder), on_disk(run_dir).absolute()
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise UserError(f"{run_dir} exists; name another run folder")
    config, int4, unread = read_config(folder / "config.json")
    if not (folder / "tokenizer.json").exists():  # a new one could not fit the weights
        raise UserError(f"{folder} has no tokenizer.json; download it again")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    tokenizer.require(config.vocab_size)
    files = Folder(folder)
    files.require(layout(config, int4))
    if int4 and not allow_requantization:
        _refuse_loss(files, config)
    run = RunConfig(
        stage=stage or ("qat" if int4 else "import"),
        model=config,
        quant=QuantConfig(GROUP) if int4 else None,
        data=DataConfig(tokenizer=str(run_dir / "tokenizer.json"), seq_len=config.max_position_embeddings),
        steps=1,
    )
    loss = Loss()
    require_plain(run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{run_dir.name}.", dir=run_dir.parent) as name:
        # The folder as the trainer leaves it, aside: a kill leaves none that looks like a run.
        aside, scratch = Path(name, run_dir.name), Path(name)
        parameters = _read(files, config, int4, loss, scratch)
        report = {
            "source": folder.absolute().name,
            "format": "mobilemoe-int4-g32" if int4 else "bf16",
            "unread_fields": unread,
            "requantization": loss.report(),
        }
        write_json(aside / "config.json", to_dict(run))
        write_bytes(aside / "tokenizer.json", (folder / "tokenizer.json").read_bytes())
        write_json(aside / "import.json", report)
        _save(aside, run, parameters, tokenizer.fingerprint)
        os.replace(aside, run_dir)
    return {"run": str(run_dir), "parameters": sum(v.size for v in parameters.values())} | report


def layout(config: ModelConfig, int4: bool) -> dict[str, tuple[Sequence[str], tuple[int, ...]]]:
    """Every tensor of a folder with its types and shape."""
    wanted: dict[str, tuple[Sequence[str], tuple[int, ...]]] = {}
    for tensor in keymap.hf_tensors(config):
        if int4 and tensor.row.int4:
            *lead, last = tensor.shape
            if last % GROUP:
                raise UserError(
                    f"{tensor.name} has {last} weights a row, no multiple of the group {GROUP}; use bf16"
                )
            wanted[tensor.codes] = (U8,), (*lead, last // 2)
            wanted[tensor.scales] = (F16,), (*lead, last // GROUP)
        elif tensor.row.jax.endswith("router/kernel"):
            wanted[tensor.name] = (F32,) if int4 else (F32, BF16), tensor.shape
        else:
            wanted[tensor.name] = (BF16,) if int4 else (BF16, F32), tensor.shape
    return wanted


class _OnDisk(np.memmap):
    """An array in a file. Saving copies arrays, since a trainer goes on with its own; this one is not copied."""

    def __deepcopy__(self, memo: dict[int, Any] | None, /) -> _OnDisk:
        return self


def _read(files: Folder, config: ModelConfig, int4: bool, loss: Loss, scratch: Path) -> dict[str, np.ndarray]:
    """JAX parameters, layers stacked, in files in `scratch`; memory holds one tensor at a time."""
    parameters: dict[str, np.ndarray] = {}
    for path, shape in keymap.jax_shapes(config).items():
        file, size = scratch / path.replace("/", "."), 4 * math.prod(shape)
        try:
            with file.open("wb") as raw:
                os.posix_fallocate(raw.fileno(), 0, size)  # a full disk would end a mapped write with a signal
        except OSError as error:
            raise UserError(
                f"cannot write {size:,} bytes in {scratch.parent}: {error.strerror}; free disk"
            ) from None
        parameters[path] = _OnDisk(file, np.float32, "r+", shape=shape)
    for row, layer, tensors in tqdm(list(_by_layer(config)), "import", unit="tensor", disable=None):
        values = [_masters(files, t, loss) if int4 and row.int4 else _float(files, t) for t in tensors]
        target = parameters[row.jax]
        (target[layer] if row.stacked else target)[...] = keymap.from_hf(row, values)
    return parameters


def _by_layer(config: ModelConfig) -> Iterator[tuple[keymap.Row, int, list[keymap.HfTensor]]]:
    """Tensors that make up one layer of one JAX parameter."""
    tensors = keymap.hf_tensors(config)
    while tensors:
        count = len(tensors[0].row.torch)
        yield tensors[0].row, tensors[0].layer, tensors[:count]
        tensors = tensors[count:]


def _float(files: Folder, tensor: keymap.HfTensor) -> np.ndarray:
    return files.read(tensor.name).astype(np.float32)


def _masters(files: Folder, tensor: keymap.HfTensor, loss: Loss) -> np.ndarray:
    """Float32 weights of one tensor; what the grid makes of them is noted."""
    scales = files.read(tensor.scales)
    if (scales < 0).any():
        raise UserError(f"{tensor.scales} in {files.folder} holds negative scales; download it again")
    packed, found = files.read(tensor.codes), np.empty(tensor.shape, np.float32)
    for index in parts(tensor.shape):
        weight = Int4(unpack_nibbles(packed[index]), scales[index])
        exact = weight.dequantize()
        found[index] = exact if tensor.row.in_out else masters(weight)
        loss.note(tensor.name, exact, on_grid(found[index], -2 if tensor.row.in_out else -1, GROUP))
    return found


def _refuse_loss(files: Folder, config: ModelConfig) -> None:
    """UserError saying what rounding again costs, as measured on the first layer, if it costs anything."""
    loss = Loss()
    for tensor in keymap.hf_tensors(config):
        if tensor.row.int4 and tensor.row.stacked and tensor.layer == 0:
            _masters(files, tensor, loss)
    if loss.tensors:
        most = max(loss.tensors, key=lambda name: loss.tensors[name]["relative_rms"])
        raise UserError(
            f"{files.folder} groups its experts along the output and engines want groups along the input: rounding "
            f"again moves the first layer's weights by {loss.relative_rms:.1%} (root mean square; {most} by "
            f"{loss.tensors[most]['relative_rms']:.1%}); pass --allow-requantization, or import the BF16 folder"
        )


def _save(run_dir: Path, run: RunConfig, parameters: dict[str, np.ndarray], fingerprint: str) -> None:
    from moe_jax.train.checkpoint import Checkpoints  # brings JAX, which is not needed to refuse

    flat: dict[str, dict[str, np.ndarray]] = {"params": {}, "biases": {}}
    for path, value in parameters.items():
        flat["biases" if path.endswith("router/bias") else "params"][path] = value
    state = {name: unflatten_paths(leaves) for name, leaves in flat.items()}
    checkpoints = Checkpoints(run_dir, run.checkpoint)
    stored = {"config": to_dict(run), "data": {}, "tokenizer": fingerprint}
    checkpoints.save(run.steps, state | {"step": np.array(run.steps, np.int32)}, stored, final=True)
    checkpoints.wait()
