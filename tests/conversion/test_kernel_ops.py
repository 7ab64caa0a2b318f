"""The kernel's ops beside the experts': each against its definition, all paths and numbers of threads alike."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import readback
from conversion.int4 import Int4
from conversion.kernel import build
from conversion.litert import bank, kernel_op
from conversion.litert.flatbuffer import Graph, Model
from moe_jax.errors import UserError
from moe_jax.ops import fake_quant
from tests.conversion.test_experts import int4
from tests.conversion.test_kernel import ABSENT, ARM, X86, built, interpreter_of

pytestmark = built
PATHS = ("portable", *X86, *ARM)


def function(name: str) -> Callable[..., int]:
    return getattr(ctypes.CDLL(str(build.library())), f"moe_jax_{name}")


def run_op(tmp_path: Path, arrays: dict[str, np.ndarray], append: Callable[..., int | tuple[int, ...]]) -> list:
    """The outputs of a graph whose inputs are `arrays` and whose outputs `append(g, **inputs)` gives."""
    model = Model()
    g = model.graph("op")
    inputs = {name: g.input(array.shape, str(array.dtype), name) for name, array in arrays.items()}
    made = append(g, **inputs)
    g.outputs = list(made) if isinstance(made, tuple) else [made]
    model.signature("op", g, inputs, {f"y{i}": out for i, out in enumerate(g.outputs)})
    found = interpreter_of(model, tmp_path / "m.tflite").get_signature_runner("op")(**arrays)
    return [found[f"y{i}"] for i in range(len(g.outputs))]


def rounded(x: np.ndarray) -> np.ndarray:
    codes, scale, zero = fake_quant.quantize_rows_int8(x)
    return (codes.astype(np.float32) - zero) * scale


# Products and lookups


def product_of(path: str, threads: int, weight: Int4, x: np.ndarray) -> tuple[int, np.ndarray]:
    outputs, inputs = weight.codes.shape
    packed, y = bank.pack(weight), np.full((len(x), outputs), np.nan, np.float32)
    places = (ctypes.c_void_p(a.ctypes.data) for a in (x, packed, y))
    options = struct.pack("<2I", outputs, inputs)
    return function("linear")(path.encode(), threads, options, len(x), *places), y


@pytest.mark.parametrize(
    "shape", [(1, 16, 32), (1, 768, 768), (1, 32, 4160), (37, 48, 64), (130, 1040, 96)], ids=str
)
def test_a_product_equals_the_definition_and_all_paths_and_threads_give_the_same_bits(shape):
    tokens, outputs, inputs = shape
    rng = np.random.default_rng(outputs)
    weight, x = int4(rng, outputs, inputs), rng.standard_normal((tokens, inputs), np.float32)
    _, first = product_of("portable", 1, weight, x)
    for path in PATHS:
        for threads in (1, 2, 5):
            status, y = product_of(path, threads, weight, x)
            assert status == ABSENT or np.array_equal(y, first), (path, threads)
    np.testing.assert_allclose(first, rounded(x) @ weight.dequantize().T, rtol=0, atol=2e-5 * inputs**0.5)


@pytest.mark.parametrize("tokens", [1, 13])
def test_a_product_has_the_bits_of_the_stock_runtime(tmp_path, tokens):
    """On x86 with AVX-512 VNNI; elsewhere XNNPACK may round the start of a sum another way."""
    rng = np.random.default_rng(tokens)
    weight, x = int4(rng, 768, 384), rng.standard_normal((tokens, 384), np.float32)

    def both(g: Graph, x: int) -> tuple[int, int]:
        packed = g.model.buffer(bank.pack(weight))
        return g.fully_connected(x, g.int4(weight)), kernel_op.linear(g, x, packed, (768, 384), "w")

    stock, kernel = run_op(tmp_path, {"x": x}, both)
    if product_of("avx512vnni", 1, weight, x)[0] != ABSENT:
        assert np.array_equal(stock, kernel)
    np.testing.assert_allclose(kernel, stock, rtol=0, atol=1e-6 * np.abs(stock).max())


def test_a_lookup_gives_the_rows_bit_for_bit_and_refuses_others(tmp_path):
    rng = np.random.default_rng(1)
    weight, ids = int4(rng, 48, 64), np.array([0, 47, 15, 16, 15], np.int32)

    def look_up(g: Graph, ids: int) -> int:
        return kernel_op.embedding(g, ids, g.model.buffer(bank.pack(weight)), (48, 64), "w")

    assert np.array_equal(run_op(tmp_path, {"ids": ids}, look_up)[0], weight.dequantize()[ids])
    for wrong in (-1, 48):
        with pytest.raises(RuntimeError, match="id is out of range"):
            run_op(tmp_path, {"ids": np.array([3, wrong], np.int32)}, look_up)


def test_a_weight_of_another_size_is_refused(tmp_path):
    packed = bank.pack(int4(np.random.default_rng(0), 32, 64))

    def multiply(g: Graph, x: int) -> int:
        y = kernel_op.linear(g, x, g.model.buffer(packed), (32, 64), "w")
        g.ops[0].customOptions = np.frombuffer(struct.pack("<2I", 16, 64), np.uint8)
        return y

    with pytest.raises(RuntimeError, match="weight has another size"):
        run_op(tmp_path, {"x": np.zeros((1, 64), np.float32)}, multiply)


@pytest.mark.parametrize("words", [1, 3])
def test_an_op_with_more_or_fewer_options_than_its_kind_has_is_none_of_the_kernels(tmp_path, words):
    packed = bank.pack(int4(np.random.default_rng(0), 32, 64))

    def multiply(g: Graph, x: int) -> int:
        y = kernel_op.linear(g, x, g.model.buffer(packed), (32, 64), "w")
        g.ops[0].customOptions = np.array([32, 64, 0][:words], np.uint32).view(np.uint8)
        return y

    with pytest.raises(RuntimeError, match=r"unresolved custom op: moe_jax\.linear"):
        run_op(tmp_path, {"x": np.zeros((1, 64), np.float32)}, multiply)


def test_fused_rows_are_read_back_under_their_names(tmp_path):
    rng = np.random.default_rng(2)
    q, k = int4(rng, 32, 64), int4(rng, 16, 64)
    fused = Int4(np.concatenate([q.codes, k.codes]), np.concatenate([q.scales, k.scales]))
    model = Model()
    g = model.graph("op")
    x = g.input((1, 64), "float32", "x")
    g.outputs = [kernel_op.linear(g, x, model.buffer(bank.pack(fused)), (48, 64), "q+k")]
    model.write(tmp_path / "m.tflite")
    raw = memoryview((tmp_path / "m.tflite").read_bytes())
    expected = {"q": (q.codes, q.scales), "k": (k.codes, k.scales)}
    found = readback.compare(raw, expected)
    assert (found.codes_checked, found.mismatches) == (48 * 64, 0)
    k.codes[3, 5] ^= 1
    assert readback.compare(raw, expected).reports[0] == "k: 1 of 1024 codes differ"
    g.ops[0].customOptions = np.frombuffer(struct.pack("<2I", 64, 64), np.uint8)
    model.write(tmp_path / "m.tflite")
    with pytest.raises(UserError, match=r"the \.tflite is damaged \(.*q\+k: "):
        readback.compare(memoryview((tmp_path / "m.tflite").read_bytes()), expected)


# Attention


def attention_of(path: str, threads: int, used: int, q, k, v, mask) -> tuple[int, np.ndarray]:
    groups, rows, width = q.shape
    out = np.full_like(q, np.nan)
    places = (a.ctypes.data for a in (q, k, v, mask, out))
    call = struct.pack("<5i4x5Q", groups, rows, width, k.shape[1], used, *places)
    return function("attention")(path.encode(), threads, call), out


def attended(used: int, q, k, v, mask) -> np.ndarray:
    q, k, v = (a.astype(np.float64) for a in (q, k[:, :used], v[:, :used]))
    scores = q @ k.swapaxes(1, 2) + mask[:used]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_attention_equals_the_definition_whatever_is_in_use(data):
    """Any number of positions and heads; what is masked, or beyond `used`, does not count."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    groups, heads = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    length, width = draw(st.integers(1, 700)), draw(st.sampled_from([16, 48, 64, 80]))
    used = draw(st.integers(1, length))
    q = rng.standard_normal((groups, heads, width), np.float32)
    k, v = rng.standard_normal((2, groups, length, width), np.float32)
    mask = np.where(rng.random(length) < 0.3, -1e30, 0).astype(np.float32)
    mask[rng.integers(used)] = 0
    wanted = attended(used, q, k, v, mask)
    k[:, used:], v[:, used:] = np.nan, np.nan
    _, first = attention_of("portable", 1, used, q, k, v, mask)
    for path in PATHS:
        for threads in (1, 3):
            status, found = attention_of(path, threads, used, q, k, v, mask)
            assert status == ABSENT or np.array_equal(found, first), (path, threads)
    np.testing.assert_allclose(first, wanted, rtol=0, atol=3e-5)


def test_one_sharp_score_among_many_is_all_that_counts():
    q, k = np.zeros((1, 1, 16), np.float32), np.zeros((1, 1000, 16), np.float32)
    v = np.arange(16_000, dtype=np.float32).reshape(1, 1000, 16)
    q[..., 0], k[0, 700, 0] = 1, 200
    _, found = attention_of("portable", 1, 1000, q, k, v, np.zeros(1000, np.float32))
    assert np.array_equal(found[0, 0], v[0, 700])
