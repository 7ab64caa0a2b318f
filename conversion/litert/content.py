"""The weights of a file: each is stored once however many graphs use it, and read when the file is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from conversion.litert import bank
from conversion.litert.flatbuffer import Graph, Model, Read, Stored
from conversion.weights import Weights

_FUSED = "+"  # between the names of weights whose rows are one tensor of the file
_SILENCE = 3.0  # seconds between two words on the progress
Names = tuple[str, ...]


class Content:
    """What puts a checkpoint's weights into `model`, saying how far the writing has come."""

    def __init__(self, weights: Weights, model: Model, say: Callable[[str], object]) -> None:
        self.weights, self.model, self._say = weights, model, say
        self.int4 = set(weights.int4_names())
        self._stored: dict[Names, Stored] = {}
        self._buffers: dict[Names, int] = {}
        self._bytes, self._done, self._begun, self._said = 0, 0, 0.0, 0.0

    @property
    def activation(self) -> str:
        """Of the gated feed-forwards."""
        return self.weights.config.activation

    # For stock ops

    def weight(self, g: Graph, names: Names) -> int:
        """A tensor with the rows of all `names`, INT4 or float."""
        label = _FUSED.join(names)
        if names[0] not in self.int4:
            return g.const(self.weights.float(names[0]), label)
        if names not in self._stored:
            self._stored[names] = self.store(names)
        return g.int4(self._stored[names], label)

    def store(self, names: Names, expert: int | None = None) -> Stored:
        """INT4 rows of all `names`, or the matrix of one expert."""

        def read(get: Callable[[str], np.ndarray]) -> np.ndarray:
            parts = [get(name) if expert is None else get(name)[expert] for name in names]
            return self._counted(parts[0] if len(parts) == 1 else np.concatenate(parts))

        shape = self.shape(names)
        self._bytes += int(shape[0] * shape[1] * (0.5 + 2 / self.weights.group))
        reads: list[Read] = [partial(read, get) for get in (self.weights.packed, self.weights.scales)]
        return self.model.store_later(shape, self.weights.group, *reads)

    # For the kernel, as bank.py tells

    def matrix(self, names: Names) -> tuple[int, tuple[int, int], str]:
        """Buffer, shape and label of the rows of all `names`."""
        shape = self.shape(names)
        made = self._packed(names, bank.matrix_bytes(*shape), lambda: bank.pack(self.weights.fused(names)))
        return made, shape, _FUSED.join(names)

    def feed_forward(self, gate_up: Names, down: Names) -> tuple[int, tuple[int, int, int], str]:
        """Buffer, shape (1, D, F) and label of a dense feed-forward, which is a bank of one expert."""

        def pack() -> np.ndarray:
            return np.concatenate([bank.pack(self.weights.fused(part)) for part in (gate_up, down)], axis=1)

        names, (width, hidden) = gate_up + down, self.shape(down)
        return self._packed(names, bank.expert_bytes(width, hidden), pack), (1, width, hidden), _FUSED.join(names)

    def experts(self, gate_up: str, down: str) -> tuple[int, tuple[int, int, int]]:
        """Buffer and shape (E, D, F) of a layer's experts."""
        count, width, hidden = self.weights.shape(down)

        def pack() -> np.ndarray:
            return bank.pack_experts(self.weights.int4(gate_up), self.weights.int4(down))

        size = count * bank.expert_bytes(width, hidden)
        return self._packed((gate_up, down), size, pack), (count, width, hidden)

    def shape(self, names: Names) -> tuple[int, int]:
        """Of INT4 weights whose rows are one below the other, or of one expert's."""
        shapes = [self.weights.shape(name)[-2:] for name in names]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def _packed(self, names: Names, size: int, pack: Callable[[], np.ndarray]) -> int:
        if names not in self._buffers:
            self._bytes += size
            self._buffers[names] = self.model.later(size, lambda: self._counted(pack()))
        return self._buffers[names]

    def _counted(self, content: np.ndarray) -> np.ndarray:
        now = time.monotonic()
        self._begun, self._said = self._begun or now, self._said or now
        if self._done and now - self._said > _SILENCE:
            left = (now - self._begun) * (self._bytes / self._done - 1)
            self._say(f"weights written: {100 * self._done // self._bytes} %, {left:.0f} s left")
            self._said = now
        self._done += content.nbytes
        return content
