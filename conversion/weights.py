"""The model's tensors on the PyTorch side: INT4 codes and scales, and the few floats, by name.

Everything after this file (reference model, LiteRT, verifier) reads weights here and nowhere else; a code or a
scale is computed once, from the float32 master weights of a QAT checkpoint, and never again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from conversion import keymap
from conversion.int4 import Int4, unpack_nibbles
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError
from moe_jax.overrides import from_dict, to_dict

_FORMAT = "mobilemoe-int4"


class Weights:
    """Read-only tensors of one model; INT4 weights stay packed until they are asked for.

    `arrays` holds what a safetensors file would: `<name>.qweight` uint8 [..., out, in/2], `<name>.weight_scale`
    float16 [..., out, in/group], and float32 tensors under their own names.
    """

    def __init__(self, config: ModelConfig, group: int, arrays: Mapping[str, np.ndarray]):
        self.config = config
        self.group = group
        self._arrays = dict(arrays)
        self._check()

    def names(self) -> list[str]:
        """Names of all tensors, an INT4 weight counting once, in the order of the key map."""
        return [tensor.name for tensor in keymap.torch_tensors(self.config)]

    def int4_names(self) -> list[str]:
        """Names of the INT4 tensors."""
        return [tensor.name for tensor in keymap.torch_tensors(self.config) if tensor.int4]

    def int4(self, name: str) -> Int4:
        """Codes and scales of an INT4 tensor [..., out, in]."""
        return Int4(unpack_nibbles(self._arrays[f"{name}.qweight"]), self.scales(name))

    def packed(self, name: str) -> np.ndarray:
        """The codes of an INT4 tensor as the file holds them: uint8 [..., out, in/2], low nibble first."""
        return self._arrays[f"{name}.qweight"]

    def scales(self, name: str) -> np.ndarray:
        """The float16 scales of an INT4 tensor [..., out, in/group]."""
        return self._arrays[f"{name}.weight_scale"]

    def float(self, name: str) -> np.ndarray:
        """A tensor that is not quantised: norms, router, expert bias."""
        return self._arrays[name]

    def fused(self, names: tuple[str, ...]) -> Int4:
        """Several [out, in] weights on one input, their rows one below the other."""
        parts = [self.int4(name) for name in names]
        return Int4(np.concatenate([part.codes for part in parts]), np.concatenate([part.scales for part in parts]))

    def _check(self) -> None:
        wanted: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for tensor in keymap.torch_tensors(self.config):
            if not tensor.int4:
                wanted[tensor.name] = (tensor.shape, np.dtype(np.float32))
                continue
            *lead, width = tensor.shape
            if width % self.group:
                raise UserError(
                    f"{tensor.name} has input width {width}, no multiple of the group {self.group}; "
                    f"use {-(-width // self.group) * self.group}"
                )
            wanted[f"{tensor.name}.qweight"] = ((*lead, width // 2), np.dtype(np.uint8))
            shape = (*lead, width // self.group)
            wanted[f"{tensor.name}.weight_scale"] = (shape, np.dtype(np.float16))
        if missing := sorted(wanted.keys() - self._arrays.keys()):
            raise UserError(f"the weights miss {keymap.listed(missing)}; export the model again")
        if extra := sorted(self._arrays.keys() - wanted.keys()):
            raise UserError(f"the weights hold unknown {keymap.listed(extra)}; they are of another model")
        for name, expected in wanted.items():
            array = self._arrays[name]
            if (array.shape, array.dtype) != expected:
                raise UserError(
                    f"{name} is {array.dtype} {array.shape} where the configuration gives "
                    f"{expected[1]} {expected[0]}; they are of another model"
                )


def from_parameters(parameters: Mapping[str, np.ndarray], config: ModelConfig, group: int = 32) -> Weights:
    """Quantise JAX parameters (float32 by path, layers stacked) on the grid of QAT."""
    arrays = {}
    for tensor, value in keymap.to_torch(parameters, config):
        if tensor.int4:
            quantised = Int4.from_float(value, group)
            arrays[f"{tensor.name}.qweight"] = quantised.packed
            arrays[f"{tensor.name}.weight_scale"] = quantised.scales
        else:
            arrays[tensor.name] = value
    return Weights(config, group, arrays)


def random(config: ModelConfig, seed: int = 0, group: int = 32) -> Weights:
    """`random_parameters`, quantised."""
    return from_parameters(random_parameters(config, seed), config, group)


def random_parameters(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random JAX parameters, every kind of tensor non-trivial, for tests and speed measurements."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for path, shape in keymap.jax_shapes(config).items():
        if path.endswith("scale"):
            parameters[path] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif path.endswith("bias"):
            parameters[path] = rng.normal(0, 0.1, shape).astype(np.float32)
        else:
            width = shape[-3] if "gate_up" in path and "experts" not in path else shape[-2]
            # A small embedding lets the layers, not the input token, decide the tied head's answer.
            deviation = 0.1 if path.startswith("embed") else width**-0.5
            parameters[path] = deviation * rng.standard_normal(shape, np.float32)
    return parameters


def save_safetensors(weights: Weights, path: str | Path) -> None:
    """Write one safetensors file with the configuration in its metadata; written aside, then renamed."""
    path = Path(path)
    described = {"format": _FORMAT, "group_size": weights.group, "config": to_dict(weights.config)}
    # One key, because safetensors writes several in random order.
    metadata = {"mobilemoe": json.dumps(described, sort_keys=True)}
    aside = path.with_name(f".{path.name}.partial")
    try:
        save_file(weights._arrays, aside, metadata)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}; free the disk or choose another") from error
    finally:
        aside.unlink(missing_ok=True)


def load_safetensors(path: str | Path) -> Weights:
    """Read a file of `save_safetensors`; a tensor missing, added or of another shape or type is a UserError."""
    try:
        with safe_open(path, "np") as file:
            described = json.loads((file.metadata() or {}).get("mobilemoe", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); export it again") from None
    if described.get("format") != _FORMAT:
        raise UserError(f"{path} is not of format {_FORMAT}; export it with this project")
    config = from_dict(ModelConfig, described["config"])
    return Weights(config, described["group_size"], arrays)
