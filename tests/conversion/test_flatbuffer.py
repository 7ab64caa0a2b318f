"""The .tflite builder: what is written is what is read, and the stock runtime agrees."""

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conversion.int4 import Int4
from conversion.litert.flatbuffer import Model


def int4(seed: int, rows: int, columns: int, group: int = 32) -> Int4:
    rng = np.random.default_rng(seed)
    scales = 2.0 ** rng.integers(-6, -3, (rows, columns // group))
    return Int4(rng.integers(-8, 8, (rows, columns), np.int8), scales.astype(np.float16))


def linear(weight: Int4) -> Model:
    """y = x @ w.T, for two tokens."""
    model = Model()
    g = model.graph("main")
    x = g.input((2, weight.codes.shape[1]), "float32", "x")
    g.outputs = [g.fully_connected(x, g.int4(weight, "w"))]
    model.signature("run", g, {"x": x}, {"y": g.outputs[0]})
    return model


def run(path, **inputs: np.ndarray) -> np.ndarray:
    return Interpreter(str(path), num_threads=1).get_signature_runner("run")(**inputs)["y"]


@pytest.mark.parametrize("behind_root", [False, True])
def test_codes_and_scales_are_read_back_bit_for_bit(tmp_path, behind_root):
    weight = int4(0, 48, 64)
    linear(weight).write(tmp_path / "m.tflite", behind_root=behind_root)
    g = Model.read(tmp_path / "m.tflite").graphs[0]
    (tensor,) = [i for i in range(len(g.t.tensors)) if g.like(i)[1] == "int4"]
    back = g.read_int4(tensor)
    assert np.array_equal(back.codes, weight.codes)
    assert np.array_equal(back.scales.view(np.uint16), weight.scales.view(np.uint16))


@pytest.mark.parametrize("behind_root", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_the_runtime_multiplies_by_the_stored_weights(tmp_path, behind_root, group):
    weight = int4(1, 40, 128, group)
    linear(weight).write(tmp_path / "m.tflite", behind_root=behind_root)
    # Rows of whole numbers from -128 to 127 are their own INT8 codes, so the product is exact.
    x = np.random.default_rng(1).integers(-128, 128, (2, 128)).astype(np.float32)
    x[:, :2] = [-128, 127]
    np.testing.assert_allclose(run(tmp_path / "m.tflite", x=x), x @ weight.dequantize().T, rtol=1e-5)


def test_an_int4_lookup_returns_the_stored_rows(tmp_path):
    table, model = int4(2, 100, 64), Model()
    g = model.graph("main")
    ids = g.input((3,), "int32", "ids")
    g.outputs = [g.embedding_lookup(ids, g.int4(table))]
    model.signature("run", g, {"ids": ids}, {"y": g.outputs[0]})
    model.write(tmp_path / "m.tflite")
    picked = np.array([99, 0, 7], np.int32)
    assert np.array_equal(run(tmp_path / "m.tflite", ids=picked), table.dequantize()[picked])


@pytest.mark.parametrize("behind_root", [False, True])
def test_reading_and_writing_again_changes_no_byte(tmp_path, behind_root):
    first, second = tmp_path / "a.tflite", tmp_path / "b.tflite"
    linear(int4(3, 32, 32)).write(first, behind_root=behind_root)
    model = Model.read(first)
    model.sweep()
    model.write(second, behind_root=behind_root)
    assert first.read_bytes() == second.read_bytes()


def test_a_file_can_be_written_over_the_one_it_was_read_from(tmp_path):
    path = tmp_path / "m.tflite"
    linear(int4(3, 32, 32)).write(path, behind_root=True)
    before = path.read_bytes()
    Model.read(path).write(path, behind_root=True)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "m.tflite"
    path.write_bytes(b"old")
    model = linear(int4(3, 32, 32))
    model.t.subgraphs.append("not a graph")
    with pytest.raises(AttributeError):
        model.write(path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tflite"]


@settings(max_examples=20)
@given(hnp.arrays(st.sampled_from([np.int32, np.float32, np.bool_]), hnp.array_shapes()))
def test_constants_survive(tmp_path_factory, value):
    model = Model()
    g = model.graph("main")
    tensor = g.const(value)
    path = tmp_path_factory.mktemp("c") / "m.tflite"
    model.write(path)
    back = Model.read(path).graphs[0].array(tensor)
    assert back.dtype == value.dtype
    assert back.tobytes() == value.tobytes()
    assert back.shape == value.shape


def test_equal_contents_are_stored_once():
    model, weight = Model(), int4(4, 32, 32)
    graphs = [model.graph(name) for name in "ab"]
    tensors = [g.int4(weight) for g in graphs]
    first, second = (g.t.tensors[t].buffer for g, t in zip(graphs, tensors, strict=True))
    assert first == second
    assert len(model.t.buffers) == 3  # the empty one, codes, scales


def test_surgery_puts_ops_in_the_place_of_a_marker(tmp_path):
    weight, model = int4(5, 32, 32), Model()
    g = model.graph("main")
    x = g.input((2, 32), "float32", "x")
    unused = g.const(np.arange(1000, dtype=np.float32))
    marked = g.tensor((2, 32), "float32")
    g.add("CUSTOM", [x, unused], marked)
    g.ops[0].opcodeIndex = model.opcode("CUSTOM", custom="marker")
    g.outputs = [g.add("NEG", [marked], g.like(marked))]
    model.signature("run", g, {"x": x}, {"y": g.outputs[0]})
    (op,) = g.custom_ops("marker")
    with g.replace(op):
        twice = g.add("ADD", [x, x], g.like(x))
        g.fully_connected(twice, g.int4(weight), out=int(op.outputs[0]))
    model.sweep()
    assert not g.custom_ops("marker")
    assert all(len(b.data) < 4000 for b in model.t.buffers[1:])  # the marker's constant is gone
    model.write(tmp_path / "m.tflite")
    x = np.random.default_rng(5).integers(-64, 64, (2, 32)).astype(np.float32)
    x[:, :2] = [-64, 63.5]
    np.testing.assert_allclose(run(tmp_path / "m.tflite", x=x), -2 * x @ weight.dequantize().T, rtol=1e-5)
