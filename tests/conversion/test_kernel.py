"""The kernel against the definition, its paths against each other, and the runtimes that take it."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.cpu_options import CpuOptions
from ai_edge_litert.hardware_accelerator import HardwareAccelerator
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.options import Options
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion import readback
from conversion.int4 import Int4
from conversion.kernel import build, register
from conversion.litert.bank import expert_bytes, matrix_bytes
from conversion.litert.bank import pack_experts as pack
from conversion.litert.experts import feed_forward
from conversion.litert.flatbuffer import Graph, Model
from conversion.litert.kernel_op import ACTIVATIONS, KernelExperts
from moe_jax.errors import UserError
from tests.conversion import test_experts as stock
from tests.conversion.test_experts import Bank, int4

built = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")
ABSENT = 2  # the status for a path of another processor
X86, ARM = ("avx2", "avx512vnni"), ("neon_dotprod", "neon_i8mm")
SHAPES = [(1, 64, 32, 5, 2), (37, 64, 96, 5, 2), (1, 768, 384, 8, 4), (50, 256, 64, 3, 3)]  # T, D, F, E, K


def bank_of(rng: np.random.Generator, experts: int, width: int = 64, hidden: int = 32) -> Bank:
    return int4(rng, experts, 2 * hidden, width), int4(rng, experts, width, hidden)


def batch_of(rng: np.random.Generator, tokens: int, choices: int, experts: int, width: int = 64):
    _, ids, weights = stock.batch_of(rng, tokens, choices, experts)
    return rng.standard_normal((tokens, width), np.float32) / 4, ids, weights


def options(bank: Bank, choices: int, activation: str = "silu") -> bytes:
    experts, width, hidden = bank[1].codes.shape
    return struct.pack("<5I", experts, choices, width, hidden, ACTIVATIONS.index(activation))


def run(path: str, threads: int, bank: Bank, x, ids, weights, activation: str = "silu") -> tuple[int, np.ndarray]:
    """What the bare function returned, and y."""
    packed, y = pack(*bank), np.full_like(x, np.nan)
    arrays = (x, ids, weights, packed, y)
    call = struct.pack("<i4x5Q", len(x), *(a.ctypes.data for a in arrays))
    function = ctypes.CDLL(str(build.library())).moe_jax_experts
    status = function(path.encode(), threads, options(bank, ids.shape[1], activation), call)
    return status, y


def model_of(bank: Bank, calls: dict[str, int], choices: int) -> Model:
    """One layer with a signature per entry of `calls` (name to tokens)."""
    model = Model()
    experts = KernelExperts(model.buffer(pack(*bank)), bank[1].codes.shape, "silu")
    for name, tokens in calls.items():
        signature_of(model, name, tokens, bank[1].codes.shape[1], choices, experts.expand)
    return model


def signature_of(
    model: Model, name: str, tokens: int, width: int, choices: int, expand: Callable[..., int]
) -> None:
    g = model.graph(name)
    x = g.input((tokens, width), "float32", "x")
    ids = g.input((tokens, choices), "int32", "ids")
    weights = g.input((tokens, choices), "float32", "weights")
    g.outputs = [expand(g, x, ids, weights)]
    model.signature(name, g, {"x": x, "ids": ids, "weights": weights}, {"y": g.outputs[0]})


def load(path: Path, threads: int = 1) -> Interpreter:
    return Interpreter(str(path), num_threads=threads, experimental_delegates=[register.delegate()])


def interpreter_of(model: Model, path: Path) -> Interpreter:
    model.write(path)
    return load(path)


def unpack_experts(packed: np.ndarray, width: int, hidden: int) -> tuple[Int4, Int4]:
    """gate_up [E, 2F, D] and down [E, D, F] of a bank, bit for bit; scales are one per 32 inputs."""
    packed = packed.reshape(-1, expert_bytes(width, hidden))
    cut = matrix_bytes(2 * hidden, width)
    return unpack(packed[:, :cut], 2 * hidden, width), unpack(packed[:, cut:], width, hidden)


def unpack(packed: np.ndarray, rows: int, inputs: int) -> Int4:
    """Weights [E, rows, inputs] of [E, bytes of one]."""
    experts, groups, blocks = len(packed), rows // 16, inputs // 32
    packed = packed.reshape(experts, groups, matrix_bytes(16, inputs))[..., 64:]
    halves, pairs = np.split(packed, [blocks * 32], axis=2)
    halves = np.ascontiguousarray(halves).view(np.uint16).reshape(experts, groups, blocks, 16).swapaxes(2, 3)
    scales = (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float16)
    pairs = np.ascontiguousarray(pairs).reshape(experts, groups, blocks, 4, 16, 4)
    low, high = (pairs << 4).view(np.int8) >> 4, pairs.view(np.int8) >> 4
    codes = np.stack([low, high], axis=-2).transpose(0, 1, 4, 2, 3, 5, 6)  # group, row, block, run, nibble, place
    return Int4(codes.reshape(experts, rows, inputs), scales.reshape(experts, rows, blocks))


@pytest.mark.parametrize("group", [32, 64])
def test_a_bank_gives_back_codes_and_scales_bit_for_bit(group):
    rng = np.random.default_rng(group)
    scales = [2.0 ** rng.integers(-9, 0, s) for s in ((3, 128, 64 // group), (3, 64, 64 // group))]
    codes = [rng.integers(-8, 8, s, np.int8) for s in ((3, 128, 64), (3, 64, 64))]
    weights = [Int4(c, s.astype(np.float16)) for c, s in zip(codes, scales, strict=True)]
    for found, weight in zip(unpack_experts(pack(*weights), 64, 64), weights, strict=True):
        assert np.array_equal(found.codes, weight.codes)
        assert np.array_equal(found.scales, np.repeat(weight.scales, group // 32, axis=-1))


def test_groups_of_64_are_read_back_as_trained(tmp_path):
    rng = np.random.default_rng(64)
    matrices = [
        Int4(rng.integers(-8, 8, shape, np.int8), rng.choice([0.25, 0.375, 2.0**-14], (*shape[:2], 1)))
        for shape in ((3, 128, 64), (3, 64, 64))
    ]
    model = Model()
    experts = KernelExperts(model.buffer(pack(*matrices)), (3, 64, 64), "silu", "ffn")
    signature_of(model, "decode", 1, 64, 2, experts.expand)
    model.write(tmp_path / "m.tflite")
    expected = {f"ffn.{n}_proj": (m.codes, m.scales) for n, m in zip(("gate_up", "down"), matrices, strict=True)}
    found = readback.compare(memoryview((tmp_path / "m.tflite").read_bytes()), expected)
    assert (found.codes_checked, found.scales_checked, found.reports) == (3 * 192 * 64, 3 * 192, [])
    for wrong in (struct.pack("<5I", 4, 2, 64, 64, 0), struct.pack("<5I", 3, 2, 1 << 31, 64, 0), b"short"):
        model.graphs[0].ops[0].customOptions = np.frombuffer(wrong, np.uint8)
        model.write(tmp_path / "m.tflite")
        with pytest.raises(UserError, match=r"the \.tflite is damaged \("):
            readback.compare(memoryview((tmp_path / "m.tflite").read_bytes()), expected)


def test_widths_that_the_kernel_cannot_take_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"\(2, 96, 64\)"):
        pack(int4(rng, 2, 96, 64), int4(rng, 2, 64, 32))


@built
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_equals_the_definition_and_all_paths_and_threads_give_the_same_bits(shape, activation):
    tokens, width, hidden, experts, choices = shape
    rng = np.random.default_rng(tokens)
    bank = bank_of(rng, experts, width, hidden)
    batch = batch_of(rng, tokens, choices, experts, width)
    _, y = run("portable", 1, bank, *batch, activation)
    stock.assert_same(y, stock.reference(*batch, bank, activation))
    for path in X86 + ARM:
        for threads in (1, 2, 5):
            status, found = run(path, threads, bank, *batch, activation)
            assert status == ABSENT or np.array_equal(found, y), (path, threads)


@built
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_no_routing_loses_a_token(data):
    """Any ids: all on one expert, empty experts, an expert chosen twice by a token."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    allowed = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6)), np.int32)
    tokens, threads = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 3))
    bank = bank_of(rng, 6)
    x, _, weights = batch_of(rng, tokens, 3, 6)
    ids = rng.choice(allowed, (tokens, 3)).astype(np.int32)
    _, y = run("portable", threads, bank, x, ids, weights)
    stock.assert_same(y, stock.reference(x, ids, weights, bank))


@built
@pytest.mark.parametrize("wrong", [-1, 6])
def test_an_id_that_is_no_expert_is_an_error(tmp_path, wrong):
    rng = np.random.default_rng(0)
    bank, (x, ids, weights) = bank_of(rng, 6), batch_of(rng, 4, 2, 6)
    ids[2, 1] = wrong
    assert run("portable", 1, bank, x, ids, weights)[0] == 1
    runner = interpreter_of(model_of(bank, {"layer": 4}, 2), tmp_path / "m.tflite").get_signature_runner("layer")
    with pytest.raises(RuntimeError, match="id is out of range"):
        runner(x=x, ids=ids, weights=weights)


@built
def test_a_bank_of_another_size_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    model = model_of(bank_of(rng, 6), {"layer": 4}, 2)
    model.graphs[0].ops[0].customOptions = np.frombuffer(options(bank_of(rng, 7), 2), np.uint8)
    with pytest.raises(RuntimeError, match="bank has another size"):
        interpreter_of(model, tmp_path / "m.tflite").allocate_tensors()


def stock_of(model: Model, bank: Bank) -> Callable[..., int]:
    """The stock ops for a token that chooses its one expert, number 0, with weight 1."""
    gate_up, down = (model.store(Int4(w.codes[0], w.scales[0])) for w in bank)
    return lambda g, x, *_: feed_forward(g, x, (gate_up, down), "silu")


def both(tmp_path: Path, bank: Bank, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first expert of `bank` on x, by the kernel and by the stock runtime."""
    # The stock graph comes first: a first graph that the kernel takes whole makes Interpreter skip XNNPACK.
    model, signatures = Model(), []
    kernel = KernelExperts(model.buffer(pack(*bank)), bank[1].codes.shape, "silu").expand
    for name, expand in (("stock", stock_of(model, bank)), ("kernel", kernel)):
        signature_of(model, name, len(x), x.shape[1], 1, expand)
    interpreter = interpreter_of(model, tmp_path / "m.tflite")
    feed = {"x": x, "ids": np.zeros((len(x), 1), np.int32), "weights": np.ones((len(x), 1), np.float32)}
    for name in ("kernel", "stock"):
        runner = interpreter.get_signature_runner(name)
        signatures.append(runner(**{k: feed[k] for k in runner.get_input_details()})["y"])
    return signatures[0], signatures[1]


def has(path: str) -> bool:
    rng = np.random.default_rng(0)
    return run(path, 1, bank_of(rng, 2), *batch_of(rng, 1, 1, 2))[0] != ABSENT


@built
@pytest.mark.parametrize("tokens", [1, 13])
def test_products_have_the_bits_of_the_stock_runtime(tmp_path, tokens):
    """Gates so large that their sigmoid is one leave only the roundings and the two products to compare."""
    rng = np.random.default_rng(tokens)
    gate_up, down = bank_of(rng, 2, 768, 384)
    gate_up.codes[:, :384] = np.abs(gate_up.codes[:, :384] // 2) + 1
    kernel, ops = both(tmp_path, (gate_up, down), rng.uniform(1, 2, (tokens, 768)).astype(np.float32))
    if has("avx512vnni"):
        assert np.array_equal(kernel, ops)
    # Where XNNPACK keeps rows signed, the start of each sum is rounded another way.
    np.testing.assert_allclose(kernel, ops, rtol=0, atol=1e-6 * np.abs(ops).max())


@built
@pytest.mark.parametrize("tokens", [1, 13])
def test_a_layer_differs_from_the_stock_runtime_by_its_sigmoid_only(tmp_path, tokens):
    """By units in the last place, but for hidden values that these tip over to the next INT8 code."""
    rng = np.random.default_rng(tokens)
    bank = bank_of(rng, 2, 768, 384)
    kernel, ops = both(tmp_path, bank, rng.standard_normal((tokens, 768)).astype(np.float32) / 8)
    stock.assert_same(kernel, ops)
    assert np.median(np.abs(kernel - ops)) <= 1e-6 * np.abs(ops).max()


@built
def test_signatures_share_one_bank_that_is_used_where_it_is_mapped(tmp_path):
    rng = np.random.default_rng(5)
    bank = bank_of(rng, 60, 768, 384)
    model = model_of(bank, {"decode": 1, "prefill": 60}, 4)
    x, ids, weights = batch_of(rng, 60, 4, 60, 768)
    model.write(tmp_path / "m.tflite")
    held = _kilobytes("RssAnon")
    interpreter = load(tmp_path / "m.tflite", threads=2)
    prefill, decode = (interpreter.get_signature_runner(n) for n in ("prefill", "decode"))
    together = prefill(x=x, ids=ids, weights=weights)["y"]
    each = [decode(x=x[t : t + 1], ids=ids[t : t + 1], weights=weights[t : t + 1])["y"] for t in range(60)]
    assert np.array_equal(together, np.concatenate(each))
    assert _kilobytes("RssAnon") - held < 10_000  # the bank has 30 MB, and every expert was asked for


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@built
def test_experts_that_are_not_chosen_are_not_read(tmp_path):
    rng = np.random.default_rng(3)
    bank, other = bank_of(rng, 16), bank_of(rng, 16)
    chosen = [2, 3, 11, 15]
    for old, new in zip(bank, other, strict=True):
        new.codes[chosen], new.scales[chosen] = old.codes[chosen], old.scales[chosen]
    x, _, weights = batch_of(rng, 1, 4, 16)
    ids = np.array([chosen], np.int32)
    (_, y), (_, same) = (run("portable", 1, b, x, ids, weights) for b in (bank, other))
    assert np.array_equal(y, same)


@built
def test_an_op_between_stock_ops_runs_in_a_compiled_model(tmp_path):
    rng = np.random.default_rng(7)
    bank, batch = bank_of(rng, 6), batch_of(rng, 20, 2, 6)
    model = Model()
    experts = KernelExperts(model.buffer(pack(*bank)), bank[1].codes.shape, "silu")

    def twice(g: Graph, x: int, ids: int, weights: int) -> int:
        doubled = g.add("ADD", [x, x], g.like(x))
        return g.add(
            "ADD", [experts.expand(g, experts.expand(g, doubled, ids, weights), ids, weights), x], g.like(x)
        )

    signature_of(model, "layer", 20, 64, 2, twice)
    model.write(tmp_path / "m.tflite")
    assert register.needed((tmp_path / "m.tflite").read_bytes())
    cpu = Options(hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=2))
    compiled = CompiledModel.from_file(str(tmp_path / "m.tflite"), options=cpu, environment=register.environment())
    inputs, outputs = compiled.create_input_buffers(0), compiled.create_output_buffers(0)
    for array, buffer in zip(batch, inputs, strict=True):
        buffer.write(array)
    compiled.run_by_index(0, inputs, outputs)
    x, ids, weights = batch
    once = stock.reference(2 * x, ids, weights, bank)
    expected = stock.reference(once, ids, weights, bank) + x
    stock.assert_same(outputs[0].read(x.size, np.float32).reshape(x.shape), expected)


def test_a_stock_file_needs_no_kernel(tmp_path):
    model, bank = Model(), bank_of(np.random.default_rng(0), 2)
    signature_of(model, "stock", 1, 64, 1, stock_of(model, bank))
    model.write(tmp_path / "m.tflite")
    assert not register.needed((tmp_path / "m.tflite").read_bytes())


def test_no_compiler_is_one_sentence(monkeypatch):
    build.library.cache_clear()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        build.library()


CROSS = ("cmake", "ninja", "aarch64-linux-gnu-g++", "qemu-aarch64")


@pytest.mark.skipif(not all(map(shutil.which, CROSS)), reason=f"one of {', '.join(CROSS)} is missing")
def test_arm_paths_give_the_bits_of_the_portable_one_under_an_emulator(tmp_path):
    """Built by the preset, run as a program on an emulated processor with and without i8mm and dot products."""
    source = Path(build.__file__).parent
    for command in (
        ["-S", source, "--preset", "linux-arm64", "-B", tmp_path, "-G", "Ninja"],
        ["--build", tmp_path],
    ):
        target = ["--target", "layer", "-j", "1"] if command[0] == "--build" else []
        subprocess.run(["cmake", *map(str, command), *target], check=True, capture_output=True, cwd=source)
    for tokens, width, hidden, experts, choices in SHAPES:
        rng = np.random.default_rng(tokens)
        bank, batch = bank_of(rng, experts, width, hidden), batch_of(rng, tokens, choices, experts, width)
        parts = (options(bank, choices), struct.pack("<i", tokens), *batch, pack(*bank))
        (tmp_path / "in").write_bytes(b"".join(bytes(part) for part in parts))
        found = {}
        for processor, path in {"cortex-a72": "portable", "neoverse-n1": ARM[0], "max": ARM[1]}.items():
            layer = [tmp_path / "layer", "best", "2", tmp_path / "in", tmp_path / "out"]
            done = subprocess.run(["qemu-aarch64", "-cpu", processor, *layer], check=True, capture_output=True)
            assert done.stdout.decode().strip() == path
            found[path] = np.fromfile(tmp_path / "out", np.float32).reshape(tokens, width)
        stock.assert_same(found["portable"], stock.reference(*batch, bank))
        assert all(np.array_equal(y, found["portable"]) for y in found.values())
