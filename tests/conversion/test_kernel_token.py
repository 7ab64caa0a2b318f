"""The kernel's ops for half a layer of one token, against the reference's same halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conversion import kernel, weights
from conversion.export import export_random
from conversion.litert import bank, kernel_op, lower
from conversion.litert.flatbuffer import Graph, Model
from conversion.torch_model import Seen, StaticCache, _quarter_turn, swiglu
from conversion.weights import Weights
from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.errors import UserError
from tests.conversion.conftest import CONTEXT, MOE, PREFILL, ROUTED
from tests.conversion.test_kernel import built, load
from tests.conversion.test_kernel_ops import PATHS, run_op
from tests.conversion.test_lower import LENGTH as LENGTH_OF_CALLS
from tests.conversion.test_lower import TOKENS, inputs
from tests.conversion.ties import Tied, nearest

pytestmark = built
LENGTH, CLOSE = 300, 2e-5  # of the cache; and of outputs near 1
Arrays = dict[str, np.ndarray]


def wider(**changes: Any) -> ModelConfig:
    return dataclasses.replace(MOE, moe=dataclasses.replace(ROUTED, **changes))


def routing(config: ModelConfig) -> MoEConfig:
    assert config.moe
    return config.moe


def half(config: ModelConfig, seed: int = 0) -> tuple[Weights, Arrays]:
    """Weights of a model, and a token before one of its layers with a norm that is not all ones."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, 1, config.d_model), np.float32)
    return weights.random(config), {"x": x, "norm": rng.uniform(0.5, 1.5, config.d_model).astype(np.float32)}


def on_every_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrays: Arrays, append: Callable[..., tuple[int, ...]]
) -> list[np.ndarray]:
    """The op's outputs, which are the same bits on each path that this processor has, with 1 and 3 threads."""
    first: list[np.ndarray] = []
    for path in PATHS:
        for threads in (1, 3):
            monkeypatch.setenv("MOE_JAX_KERNEL_ISA", path)
            monkeypatch.setenv("MOE_JAX_KERNEL_THREADS", str(threads))
            try:
                found = run_op(tmp_path, arrays, append)
            except RuntimeError as error:
                assert "processor lacks" in str(error) and path != "portable"
                continue
            first = first or found
            assert all(a.tobytes() == b.tobytes() for a, b in zip(found, first, strict=True)), (path, threads)
    return first


class Given(Tied):
    """The reference with the router that the op is given."""

    def __init__(self, source: Weights, router: np.ndarray | None) -> None:
        super().__init__(source)
        self.given = router

    def router(self, h: torch.Tensor, name: str) -> torch.Tensor:
        return super().router(h, name) if self.given is None else h @ torch.from_numpy(self.given).T


def without_ties(case: Callable[[int], tuple[Weights, Arrays]], wanted: Callable[[Given, Arrays], Any]) -> Any:
    """The first of some cases in which no unit in the last place turns an INT8 code into its neighbour."""
    for seed in range(50):
        source, arrays = case(seed)
        ops = Given(source, arrays.get("router"))
        found = wanted(ops, arrays)
        if not ops.met:
            return source, arrays, found
    raise AssertionError("each of 50 cases has a tie")


# Attention

NAME = "model.layers.1.self_attn"


def attention_case(position: int, config: ModelConfig = MOE, seed: int = 0) -> tuple[Weights, Arrays]:
    source, arrays = half(config, seed)
    rng, cache = np.random.default_rng(seed), (1, config.num_kv_heads, LENGTH, config.head_dim)
    angles = np.repeat(rng.uniform(0, 6, (1, 1, config.head_dim // 2)), 2, axis=2)
    arrays |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    seen = np.arange(LENGTH)[None, None, None] <= position
    arrays |= {"mask": np.where(seen, 0, -1e30).astype(np.float32)}
    arrays |= {part: rng.standard_normal(cache, np.float32) for part in "kv"}
    return source, arrays | {"start": np.array([0, 0, position, 0], np.int32)}


def append_attention(source: Weights) -> Callable[..., tuple[int, ...]]:
    config = source.config

    def append(g: Graph, **given: int) -> tuple[int, ...]:
        matrices = []
        for parts in (("q", "k", "v"), ("o",)):
            weight = source.fused(tuple(f"{NAME}.{part}_proj" for part in parts))
            matrices.append((g.model.buffer(bank.pack(weight)), weight.codes.shape, "+".join(parts)))
        outs = tuple(g.tensor(*g.like(given[name])) for name in ("x", "k", "v"))
        epsilons = config.norm_eps, config.norm_eps if config.qk_norm else 0.0
        kernel_op.self_attention(g, list(given.values()), matrices, epsilons, outs)
        return outs

    return append


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("position", [0, 1, 130, LENGTH - 1])
def test_the_attention_half_equals_the_reference(monkeypatch, tmp_path, position, qk_norm):
    config = dataclasses.replace(MOE, qk_norm=qk_norm)

    def reference(ops: Given, arrays: Arrays) -> tuple[torch.Tensor, StaticCache]:
        given = {name: torch.from_numpy(array) for name, array in arrays.items()}
        cache = StaticCache([torch.empty(0), given["k"]], [torch.empty(0), given["v"]], given["start"])
        seen = Seen(torch.from_numpy(_quarter_turn(MOE.head_dim)), given["cos"], given["sin"], given["mask"])
        return ops.self_attention(1, given["x"], given["norm"], seen, cache), cache

    source, arrays, (wanted, cache) = without_ties(lambda seed: attention_case(position, config, seed), reference)
    # What lies beyond the position is never looked at, and stays.
    arrays = {n: a.copy() for n, a in arrays.items()}
    for part in "kv":
        arrays[part][:, :, position + 1 :] = np.nan
    y, *caches = on_every_path(monkeypatch, tmp_path, arrays, append_attention(source))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=CLOSE)
    for found, reference, before in zip(caches, (cache.k[1], cache.v[1]), (arrays["k"], arrays["v"]), strict=True):
        np.testing.assert_allclose(found[:, :, position], reference[:, :, position], rtol=0, atol=CLOSE)
        others = np.arange(LENGTH) != position
        assert np.array_equal(found[:, :, others], before[:, :, others], equal_nan=True)


@pytest.mark.parametrize("position", [-1, LENGTH])
def test_a_position_outside_the_cache_is_refused(tmp_path, position):
    source, arrays = attention_case(0)
    arrays["start"][2] = position
    with pytest.raises(RuntimeError, match="not within the cache"):
        run_op(tmp_path, arrays, append_attention(source))


# Experts

FEED_FORWARD = "model.layers.0.feed_forward"


def mixture_case(config: ModelConfig, seed: int = 0) -> tuple[Weights, Arrays]:
    source, arrays = half(config, seed)
    bias = np.random.default_rng(seed).uniform(-0.1, 0.1, routing(config).num_experts).astype(np.float32)
    return source, arrays | {"router": source.float(f"{FEED_FORWARD}.router.weight"), "bias": bias}


def append_mixture(source: Weights) -> Callable[..., tuple[int, ...]]:
    config, moe = source.config, routing(source.config)

    def append(g: Graph, x: int, norm: int, router: int, bias: int) -> tuple[int, ...]:
        matrices = (source.int4(f"{FEED_FORWARD}.experts.{name}_proj") for name in ("gate_up", "down"))
        buffer, shape = g.model.buffer(bank.pack_experts(*matrices)), (moe.num_experts, 64, moe.expert_width)
        routed, shared = kernel_op.KernelExperts(buffer, shape, config.activation), None
        if moe.shared_expert_width:
            gate_up, down = swiglu(f"{FEED_FORWARD}.shared_expert")
            parts = [bank.pack(source.fused(names)) for names in (gate_up, (down,))]
            buffer, shape = g.model.buffer(np.concatenate(parts, axis=1)), (1, 64, moe.shared_expert_width)
            shared = kernel_op.KernelExperts(buffer, shape, config.activation, "shared")
        out = g.tensor(*g.like(x))
        kernel_op.mixture(g, (x, norm, router, bias), routed, shared, moe, config.norm_eps, out)
        return (out,)

    return append


def mixed(ops: Given, arrays: Arrays) -> torch.Tensor:
    x, norm, bias = (torch.from_numpy(arrays[name]) for name in ("x", "norm", "bias"))
    return ops.mixture(0, x, norm, bias)


@pytest.mark.parametrize(
    "config",
    [
        MOE,
        dataclasses.replace(MOE, activation="gelu_tanh"),
        wider(shared_expert_width=0),
        wider(num_experts=1, num_experts_per_tok=1),
        wider(num_experts=60, num_experts_per_tok=7, expert_width=96, shared_expert_width=32),
        wider(score_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.5),
    ],
    ids=["moe", "gelu", "none shared", "one", "many", "softmax"],
)
def test_the_expert_half_equals_the_reference(monkeypatch, tmp_path, config):
    source, arrays, wanted = without_ties(lambda seed: mixture_case(config, seed), mixed)
    (y,) = on_every_path(monkeypatch, tmp_path, arrays, append_mixture(source))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=CLOSE)


def test_equal_scores_choose_the_lower_number(tmp_path):
    def even(seed: int) -> tuple[Weights, Arrays]:
        source, arrays = mixture_case(MOE, seed)
        return source, arrays | {name: np.zeros_like(arrays[name]) for name in ("router", "bias")}

    source, arrays, wanted = without_ties(even, mixed)
    (y,) = run_op(tmp_path, arrays, append_mixture(source))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=CLOSE)


def test_what_does_not_fit_its_options_is_refused(tmp_path):
    source, arrays = mixture_case(MOE)

    def resized(place: int, value: int) -> Callable[..., tuple[int, ...]]:
        def append(g: Graph, **given: int) -> tuple[int, ...]:
            outs = append_mixture(source)(g, **given)
            options = np.frombuffer(bytes(g.ops[-1].customOptions), np.uint32).copy()
            options[place] = value
            g.ops[-1].customOptions = options.view(np.uint8)
            return outs

        return append

    for place, value, message in [
        (0, 6, "bank has another size"),
        (1, 6, "no more choices"),
        (2, 96, "bank has another size"),
        (3, 48, "multiples of 32"),
        (8, 0, "must be there"),
        (8, 32, "bank has another size"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run_op(tmp_path, arrays, resized(place, value))


# Whole models


def test_more_experts_than_the_kernel_has_room_for_are_refused_before_any_work(tmp_path):
    for experts, choices in ((1025, 2), (70, 65)):
        moe = dataclasses.replace(ROUTED, num_experts=experts, num_experts_per_tok=choices)
        with pytest.raises(
            UserError, match=f"no room for {choices} of {experts} experts .it has for 64 of 1024.; take"
        ):
            export_random(dataclasses.replace(MOE, moe=moe), tmp_path / "m.litertlm", experts="kernel", context=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("fits", "bias"), [(True, True), (False, True), (True, False)])
def test_a_model_gives_the_references_likelihoods_and_what_does_not_fit_keeps_stock_ops(tmp_path, fits, bias):
    """24 is no multiple of the kernel's lanes; without a bias the kernel is given a constant."""
    moe = dataclasses.replace(ROUTED, use_expert_bias=bias)
    config = dataclasses.replace(MOE, head_dim=16 if fits else 24, moe=moe)
    source = weights.random(config)
    lower.export_tflite(source, tmp_path / "m.tflite", CONTEXT, PREFILL, experts="kernel")
    model = Model.read(tmp_path / "m.tflite")
    found = {code.customCode.decode() for code in model.t.operatorCodes if code.customCode}
    assert fits == (kernel.SELF_ATTENTION in found) and kernel.MIXTURE in found
    runtime = load(tmp_path / "m.tflite").get_signature_runner("decode")
    kinds = lower.inputs(config, 1, LENGTH_OF_CALLS)
    cache = {name: np.zeros(*kind) for name, kind in kinds.items() if name.startswith("kv_cache")}
    got = []
    for position, following in enumerate(TOKENS[0, 1:]):
        cache = runtime(**inputs(position, TOKENS[:, position : position + 1]), **cache)
        logits = torch.from_numpy(cache.pop("logits")[0, 0])
        got.append(float(torch.log_softmax(logits, -1)[following]))
    wanted, _ = nearest(source, TOKENS[0].tolist(), np.array(got), 1e-5)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
