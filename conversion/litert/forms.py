"""What takes the place of markers: builtin ops, all experts at once to compare with, or the ops of the kernel.

A form has a method for each marker it knows, by the marker's name. It takes the graph to append to, the marker's
options (names of weights among them), its inputs, and the tensors that its results go to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from conversion import litert
from conversion.litert import bank, kernel_op, markers
from conversion.litert.attention import Attention
from conversion.litert.content import Content, Names
from conversion.litert.dense import DenseExperts
from conversion.litert.experts import Experts, gated
from conversion.litert.flatbuffer import Graph
from conversion.litert.routed import expand
from conversion.torch_model import swiglu
from moe_jax.config import MoEConfig

Options = dict[str, Any]


class Stock:
    """Builtin ops: only the experts that a token chooses are computed, or read."""

    markers = markers.Markers  # that lowering leaves for this form

    def __init__(self, content: Content) -> None:
        self.content = content
        self._banks: dict[str, Any] = {}

    def begin(self, g: Graph, positions: int, length: int, call: str) -> None:
        """A new graph for a call, with the positions int32 [T] of its tokens in a cache of `length`."""
        self._attention = Attention(g, positions, length, call)

    def expand(self, g: Graph, code: str, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """Append what the marker `code` stands for."""
        getattr(self, code.removeprefix("moe_jax."))(g, options, inputs, outs)

    def linear(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """One product."""
        g.fully_connected(inputs[0], self.content.weight(g, options["names"]), outs[0])

    def embedding(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """Rows of a table."""
        g.embedding_lookup(inputs[0], self.content.weight(g, options["names"]), outs[0])

    def feed_forward(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """A dense feed-forward."""
        *gate_up, down = options["names"]
        h = g.fully_connected(inputs[0], self.content.weight(g, tuple(gate_up)))
        g.fully_connected(gated(g, h, self.content.activation), self.content.weight(g, (down,)), outs[0])

    def attention(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """A layer's attention over the cache."""
        self._attention.expand(inputs, outs[0])

    def experts(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """A layer's routed experts."""
        (name,), content = options["names"], self.content
        if name not in self._banks:
            names = _names(name)
            # An expert's two matrices one after the other, so that they lie side by side in the file.
            count = content.weights.shape(names[0])[0]
            pairs = [[content.store((part,), e) for part in names] for e in range(count)]
            first, second = (list(side) for side in zip(*pairs, strict=True))
            self._banks[name] = Experts(content.model, first, second, content.activation, name)
        h, ids, routing = inputs
        expand(g, self._banks[name], h, ids, routing, outs[0])


class Dense(Stock):
    """All experts on all tokens, which only serves to measure what sparsity is worth."""

    def experts(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """See `Stock.experts`."""
        (name,), content = options["names"], self.content
        if name not in self._banks:
            gate_up, down = (content.weights.int4(part) for part in _names(name))
            self._banks[name] = DenseExperts(content.model, gate_up, down, content.activation)
        self._banks[name].expand(g, *inputs, outs[0])


class Kernel(Stock):
    """The kernel's ops for half a layer of one token and for INT4 products; stock ops where none fits."""

    markers = markers.KernelMarkers

    def linear(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """See `Stock.linear`."""
        if self._fits(options["names"]):
            kernel_op.linear(g, inputs[0], *self.content.matrix(options["names"]), outs[0])
        else:
            super().linear(g, options, inputs, outs)

    def embedding(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """See `Stock.embedding`."""
        if self._fits(options["names"]):
            kernel_op.embedding(g, inputs[0], *self.content.matrix(options["names"]), outs[0])
        else:
            super().embedding(g, options, inputs, outs)

    def feed_forward(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """See `Stock.feed_forward`."""
        *gate_up, down = options["names"]
        if all(self._fits(names) for names in (tuple(gate_up), (down,))):
            self._dense(tuple(gate_up), (down,)).feed_forward(g, inputs[0], outs[0])
        else:
            super().feed_forward(g, options, inputs, outs)

    def experts(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """See `Stock.experts`."""
        h, ids, routing = inputs
        self._experts(options["names"][0]).expand(g, h, ids, routing, outs[0])

    def self_attention(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """The first half of a layer for one token."""
        config, (*qkv, out) = self.content.weights.config, options["names"]
        weights = [self.content.matrix(names) for names in (tuple(qkv), (out,))]
        epsilons = config.norm_eps, config.norm_eps if config.qk_norm else 0.0
        kernel_op.self_attention(g, inputs, weights, epsilons, outs)

    def mixture(self, g: Graph, options: Options, inputs: Sequence[int], outs: Sequence[int]) -> None:
        """The second half of a layer for one token."""
        config, (name,), (x, norm, bias) = self.content.weights.config, options["names"], inputs
        moe, experts = cast(MoEConfig, config.moe), self._experts(f"{name}.experts")
        gate_up, down = swiglu(f"{name}.shared_expert")
        shared = self._dense(gate_up, (down,)) if moe.shared_expert_width else None
        given = x, norm, self.content.weight(g, (f"{name}.router.weight",)), bias
        kernel_op.mixture(g, given, experts, shared, moe, config.norm_eps, outs[0])

    def _experts(self, name: str) -> kernel_op.KernelExperts:
        return kernel_op.KernelExperts(*self.content.experts(*_names(name)), self.content.activation, name)

    def _dense(self, gate_up: Names, down: Names) -> kernel_op.KernelExperts:
        buffer, shape, label = self.content.feed_forward(gate_up, down)
        return kernel_op.KernelExperts(buffer, shape, self.content.activation, label)

    def _fits(self, names: Names) -> bool:
        return names[0] in self.content.int4 and bank.fits(*self.content.shape(names))


FORMS: dict[str, type[Stock]] = {"sparse": Stock, "kernel": Kernel, "dense": Dense}
assert tuple(FORMS) == litert.FORMS  # which can be asked without importing what lowers


def _names(experts: str) -> tuple[str, str]:
    return f"{experts}.gate_up_proj", f"{experts}.down_proj"
