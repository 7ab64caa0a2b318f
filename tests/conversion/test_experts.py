"""Sparse experts on the stock runtime against NumPy, always through XNNPACK (AUTO), never BUILTIN_REF."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion.int4 import Int4
from conversion.litert.experts import Experts
from conversion.litert.flatbuffer import Model
from conversion.litert.prefill import tiling
from conversion.litert.routed import expand
from moe_jax.ops.fake_quant import quantize_rows_int8

D, F = 64, 32
Bank = tuple[Int4, Int4]  # gate_up [E, 2F, D], down [E, D, F]
Layer = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def int4(rng: np.random.Generator, *shape: int) -> Int4:
    """Random codes; the scales are powers of two, which bf16 and fp16 hold exactly."""
    scales = 2.0 ** rng.integers(-6, -3, (*shape[:-1], shape[-1] // 32))
    return Int4(rng.integers(-8, 8, shape, np.int8), scales.astype(np.float16))


def bank_of(rng: np.random.Generator, experts: int) -> Bank:
    return int4(rng, experts, 2 * F, D), int4(rng, experts, D, F)


def model_of(bank: Bank, calls: dict[str, int], choices: int, activation: str = "silu") -> Model:
    """One layer with a signature per entry of `calls` (name to tokens)."""
    model = Model()
    experts = Experts(model, *bank, activation)
    for name, tokens in calls.items():
        g = model.graph(name)
        x = g.input((tokens, D), "float32", "x")
        ids = g.input((tokens, choices), "int32", "ids")
        w = g.input((tokens, choices), "float32", "weights")
        y = g.tensor((tokens, D), "float32", "y")
        expand(g, experts, x, ids, w, y)
        g.outputs = [y]
        model.signature(name, g, {"x": x, "ids": ids, "weights": w}, {"y": y})
    return model


def load(model: Model, path: Path, name: str = "layer") -> Layer:
    model.write(path)
    runner = Interpreter(str(path), num_threads=1).get_signature_runner(name)
    return lambda x, ids, w: runner(x=x, ids=ids, weights=w)["y"]


def product(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T with the INT8 rows that the runtime makes of x."""
    codes, scale, zero = quantize_rows_int8(x)
    return ((codes.astype(np.float32) - zero) * scale) @ w.T


def reference(x: np.ndarray, ids: np.ndarray, w: np.ndarray, bank: Bank, activation: str = "silu") -> np.ndarray:
    """The definition: expert after expert, on every token."""
    gate_up, down = (m.dequantize() for m in bank)
    y = np.zeros_like(x)
    for e in np.unique(ids):
        gate, up = np.split(product(x, gate_up[e]), 2, axis=1)
        if activation == "silu":
            gate = gate / (1 + np.exp(-gate))
        else:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        y += np.where(ids == e, w, 0).sum(-1, keepdims=True) * product(gate * up, down[e])
    return y


def batch_of(rng: np.random.Generator, tokens: int, choices: int, experts: int):
    x = rng.standard_normal((tokens, D), np.float32)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :choices].astype(np.int32)
    return x, ids, rng.uniform(0.1, 1, (tokens, choices)).astype(np.float32)


def assert_same(y: np.ndarray, expected: np.ndarray) -> None:
    # The hidden row's INT8 codes may round the other way here and there: one step in 255 of an input.
    assert np.abs(y - expected).max() <= 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("experts", "choices"), [(2, 1), (2, 2), (5, 2), (16, 4), (60, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 16, 37])
def test_layer_equals_the_definition(tmp_path, experts, choices, tokens):
    rng = np.random.default_rng(experts * 100 + tokens)
    bank = bank_of(rng, experts)
    layer = load(model_of(bank, {"layer": tokens}, choices), tmp_path / "m.tflite")
    for _ in range(2):
        batch = batch_of(rng, tokens, choices, experts)
        assert_same(layer(*batch), reference(*batch, bank))


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "tiles"),
    [(128, 4, 60, (8, 8, 8)), (512, 4, 60, (32, 8, 8, 8, 8)), (600, 2, 16, (64,) + 7 * (8,))],
)
def test_a_prefill_of_full_size_equals_the_definition(tmp_path, tokens, choices, experts, tiles):
    assert tiling(tokens, choices, experts) == tiles
    rng = np.random.default_rng(tokens)
    bank, batch = bank_of(rng, experts), batch_of(rng, tokens, choices, experts)
    layer = load(model_of(bank, {"layer": tokens}, choices), tmp_path / "m.tflite")
    assert_same(layer(*batch), reference(*batch, bank))


@pytest.mark.parametrize(("tokens", "most"), [(16, 3), (128, 2), (512, 2)])
def test_a_tile_costs_no_more_than_its_flag_its_value_and_a_single_row(tokens, most):
    """LiteRT takes a time to load that grows with the square of a graph's tensors."""
    rng = np.random.default_rng(0)
    graph = model_of(bank_of(rng, 60), {"layer": tokens}, 4).graphs[0]
    constants = sum(t.buffer != 0 for t in graph.t.tensors)  # layers share them
    tiles = 60 * len(tiling(tokens, 4, 60))
    assert len(graph.t.tensors) - constants < most * tiles + 80


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_gelu_layer_equals_the_definition(tmp_path, tokens):
    rng = np.random.default_rng(tokens)
    bank = bank_of(rng, 5)
    batch = batch_of(rng, tokens, 2, 5)
    layer = load(model_of(bank, {"layer": tokens}, 2, "gelu_tanh"), tmp_path / "m.tflite")
    assert_same(layer(*batch), reference(*batch, bank, "gelu_tanh"))


@pytest.fixture(scope="module", params=[2, 37])
def layer_of_six(request, tmp_path_factory):
    bank = bank_of(np.random.default_rng(6), 6)
    path = tmp_path_factory.mktemp("layer") / "m.tflite"
    return load(model_of(bank, {"layer": request.param}, 3), path), bank, request.param


@settings(max_examples=40)
@given(st.data())
def test_no_routing_loses_a_token(layer_of_six, data):
    """Any ids: all on one expert, empty experts, an expert chosen twice by a token."""
    layer, bank, tokens = layer_of_six
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    allowed = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)), np.int32)
    ids = rng.choice(allowed, (tokens, 3)).astype(np.int32)
    x, _, w = batch_of(rng, tokens, 3, 6)
    assert_same(layer(x, ids, w), reference(x, ids, w, bank))


@pytest.mark.parametrize("expert", [0, 59])
def test_all_tokens_on_one_of_sixty_experts(tmp_path, expert):
    rng = np.random.default_rng(expert)
    bank = bank_of(rng, 60)
    layer = load(model_of(bank, {"layer": 100}, 1), tmp_path / "m.tflite")
    x, _, w = batch_of(rng, 100, 1, 60)
    ids = np.full((100, 1), expert, np.int32)
    assert_same(layer(x, ids, w), reference(x, ids, w, bank))


def test_order_of_choices_does_not_matter(layer_of_six):
    layer, _, tokens = layer_of_six
    rng = np.random.default_rng(1)
    x, ids, w = batch_of(rng, tokens, 3, 6)
    np.testing.assert_allclose(layer(x, ids, w), layer(x, ids[:, ::-1], w[:, ::-1]), rtol=1e-4, atol=1e-3)


def test_a_token_does_not_see_the_others(layer_of_six):
    layer, _, tokens = layer_of_six
    rng = np.random.default_rng(2)
    x, ids, w = batch_of(rng, tokens, 3, 6)
    before = layer(x, ids, w)
    x[0], ids[0] = 1e6, [5, 0, 3]  # moves to other experts, and to other places in their tiles
    np.testing.assert_allclose(layer(x, ids, w)[1:], before[1:], rtol=1e-4, atol=1e-3)


def test_decode_does_not_read_experts_that_were_not_chosen(tmp_path):
    rng = np.random.default_rng(3)
    bank, other = bank_of(rng, 16), bank_of(rng, 16)
    chosen = [2, 3, 11, 15]
    for old, new in zip(bank, other, strict=True):
        new.codes[chosen], new.scales[chosen] = old.codes[chosen], old.scales[chosen]
    x, _, w = batch_of(rng, 1, 4, 16)
    ids = np.array([chosen], np.int32)
    a, b = (load(model_of(m, {"layer": 1}, 4), tmp_path / "m.tflite")(x, ids, w) for m in (bank, other))
    assert np.array_equal(a, b)


@pytest.mark.parametrize("tokens", [1, 16, 60, 128, 600])
def test_only_experts_with_tokens_are_entered(tmp_path, tokens):
    """The conditions of the IFs, made the outputs: an expert runs a tile if its tokens overflow those before."""
    rng = np.random.default_rng(tokens)
    model = model_of(bank_of(rng, 16), {"layer": tokens}, 2)
    g = model.graphs[[g.t.name for g in model.graphs].index("layer")]
    code = model.opcode("IF")
    conditions = [int(op.inputs[0]) for op in g.ops if op.opcodeIndex == code]
    rows = tiling(tokens, 2, 16)
    tiles = len(rows)
    assert len(conditions) == 16 * tiles + (tokens > 1)  # and one for what is left of overfull experts
    conditions = conditions[: 16 * tiles]
    rank_1 = [g.add("RESHAPE", [c, g.const([1])], ((1,), "bool"), newShape=[1]) for c in conditions]
    y = g.add("CONCATENATION", rank_1, ((16 * tiles,), "bool"), axis=0)
    g.outputs = [y]
    model.t.signatureDefs = []
    model.signature("layer", g, dict(zip(["x", "ids", "weights"], g.inputs, strict=True)), {"y": y})
    x, ids, w = batch_of(rng, tokens, 2, 16)
    ids %= 9  # seven experts without a token, some with many
    counts = np.bincount(ids.ravel(), minlength=16)
    entered = load(model, tmp_path / "m.tflite")(x, ids, w).reshape(16, tiles)
    assert np.array_equal(entered, counts[:, None] > np.cumsum((0, *rows[:-1])))


def test_weights_lie_only_in_branches_and_once_in_the_file(tmp_path):
    calls = {"decode": 1, "prefill_16": 16, "prefill_128": 128}
    model = model_of(bank_of(np.random.default_rng(4), 16), calls, 4)
    main = {s.subgraphIndex for s in model.t.signatureDefs}
    held = {g.index: [t.buffer for i, t in enumerate(g.t.tensors) if g.like(i)[1] == "int4"] for g in model.graphs}
    assert not any(held[i] for i in main)
    assert {len(h) for h in held.values()} == {0, 2}  # no subgraph holds two experts
    assert len({b for h in held.values() for b in h}) == 16 * 2


def test_signatures_of_one_file_agree(tmp_path):
    """Calls of other lengths enter the same branches in turn, which are given the inputs of their caller."""
    rng = np.random.default_rng(5)
    model = model_of(bank_of(rng, 16), {"decode": 1, "short": 20, "long": 60}, 4)
    x, ids, w = batch_of(rng, 60, 4, 16)
    model.write(tmp_path / "m.tflite")
    interpreter = Interpreter(str(tmp_path / "m.tflite"), num_threads=2)
    decode, short, long = (interpreter.get_signature_runner(n) for n in ("decode", "short", "long"))
    parts = [slice(t, t + 20) for t in range(0, 60, 20)]
    each = np.concatenate(
        [decode(x=x[t : t + 1], ids=ids[t : t + 1], weights=w[t : t + 1])["y"] for t in range(60)]
    )
    for _ in range(2):
        np.testing.assert_allclose(long(x=x, ids=ids, weights=w)["y"], each, rtol=1e-4, atol=1e-3)
        for part in parts:
            y = short(x=x[part], ids=ids[part], weights=w[part])["y"]
            np.testing.assert_allclose(y, each[part], rtol=1e-4, atol=1e-3)


@given(st.integers(2, 4096), st.integers(1, 8), st.integers(8, 128))
def test_tiles_hold_what_most_experts_get_and_hardly_more(tokens, choices, experts):
    rows = tiling(tokens, choices, experts)
    mean = tokens * choices / experts
    most = min(mean + 4.5 * mean**0.5, tokens)
    assert most <= sum(rows) < most + min(rows)
    assert list(rows[1:]) == [rows[-1]] * len(rows[1:])  # beside the first, experts need one more subgraph at most


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="relu"):
        Experts(Model(), *bank_of(np.random.default_rng(0), 2), "relu")
