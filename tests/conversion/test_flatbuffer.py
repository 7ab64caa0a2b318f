"""The .tflite builder: what is written is what is read, and the stock runtime agrees."""

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conversion.int4 import Int4, unpack_nibbles
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
    stored = g.t.tensors[tensor]
    packed = np.asarray(g.model.t.buffers[stored.buffer].data, np.uint8).reshape(48, -1)
    scales = g.array(stored.quantization.details.scales)
    assert np.array_equal(unpack_nibbles(packed), weight.codes)
    assert np.array_equal(scales.view(np.uint16), weight.scales.view(np.uint16))


@pytest.mark.parametrize("behind_root", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_the_runtime_multiplies_by_the_stored_weights(tmp_path, behind_root, group):
    weight = int4(1, 40, 128, group)
    linear(weight).write(tmp_path / "m.tflite", behind_root=behind_root)
    # Rows of whole numbers from -128 to 127 are their own INT8 codes, so the product is exact.
    x = np.random.default_rng(1).integers(-128, 128, (2, 128)).astype(np.float32)
    x[:, :2] = [-128, 127]
    np.testing.assert_allclose(run(tmp_path / "m.tflite", x=x), x @ weight.dequantize().T, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_chain_hands_its_value_through_the_branches_that_are_taken(tmp_path, count):
    """Its two tensors are written again and again; what a delegate does before and after sees one value each."""
    model = Model()
    g = model.graph("main")
    x, flags = g.input((1, 64), "float32", "x"), g.input((count,), "bool", "flags")
    row, conds = g.like(x), g.add("UNPACK", [flags], *[((), "bool")] * count, num=count, axis=0)
    branches = []
    for i in range(count):
        branch = model.graph(f"branch_{i}")
        total, step = branch.input(*row), branch.input(*row)
        double = branch.add("ADD", [total, total], row)
        branch.outputs = [
            branch.add("ADD", [double, branch.add("MUL", [step, branch.const(np.float32(i))], row)], row)
        ]
        branches.append(branch)
    skip = model.graph("skip")
    skip.outputs = [skip.input(*row), skip.input(*row)][:1]
    start = g.add("ADD", [x, x], row)
    end = g.chain(conds if count > 1 else [conds], branches, skip, [start, x], row)
    g.outputs = [g.add("MUL", [end, start], row)]
    model.signature("run", g, {"x": x, "flags": flags}, {"y": g.outputs[0]})
    model.write(tmp_path / "m.tflite")
    x = np.arange(64, dtype=np.float32)[None]
    for taken in np.ndindex((2,) * count):
        value = 2 * x
        for i in np.flatnonzero(taken):
            value = 2 * value + i * x
        assert np.array_equal(run(tmp_path / "m.tflite", x=x, flags=np.array(taken, bool)), value * 2 * x)


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


def test_equal_constants_of_a_graph_are_one_tensor():
    g = Model().graph("main")
    first = g.const([1, 2], "first")
    assert g.const(np.array([1, 2], np.int32)) == first
    others = [
        g.const([2, 1]),
        g.const(np.array([[1, 2]], np.int32)),
        g.const(np.array([1, 2], np.int32).view(np.float32)),
    ]
    assert len({first, *others}) == 4 == len(g.t.tensors)


def test_a_weight_that_is_read_on_writing_gives_the_same_bytes(tmp_path):
    weight, order = int4(6, 64, 32), []

    def read(what: str, value: np.ndarray) -> np.ndarray:
        order.append(what)
        return value

    for name, store in (
        ("now", lambda model: model.store(weight)),
        (
            "later",
            lambda model: model.store_later(
                (64, 32), 32, lambda: read("codes", weight.packed), lambda: read("scales", weight.scales)
            ),
        ),
    ):
        model = Model()
        g = model.graph("main")
        x = g.input((2, 32), "float32", "x")
        g.outputs = [g.fully_connected(x, g.int4(store(model), "w"))]
        model.signature("run", g, {"x": x}, {"y": g.outputs[0]})
        assert order == []
        model.write(tmp_path / name, behind_root=True)
    assert (tmp_path / "now").read_bytes() == (tmp_path / "later").read_bytes()
    assert order == ["codes", "scales"]


def test_a_weight_of_another_size_than_promised_leaves_no_file(tmp_path):
    model = Model()
    model.store_later((64, 32), 32, lambda: np.zeros(7, np.uint8), lambda: np.zeros((64, 1), np.float16))
    with pytest.raises(ValueError, match="1024 bytes was given 7"):
        model.write(tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_a_graph_is_stamped_with_other_tensors_in_another_file(tmp_path):
    """y = -(x @ w.T * s): every stamp brings the constant along and takes a scale of its own."""
    part, weight = Model(), int4(5, 32, 32)
    p = part.graph("part")
    x, s = p.input((2, 32), "float32", "x"), p.input((32,), "float32", "s")
    product = p.tensor((2, 32), "float32")
    p.add("CUSTOM", [x], product)
    p.ops[0].opcodeIndex = part.opcode("CUSTOM", custom="marker")
    scaled = p.add("MUL", [product, s], p.like(product))
    p.outputs = [p.add("MUL", [scaled, p.const(np.float32(-1))], p.like(scaled))]
    part.write(tmp_path / "part.tflite")
    source, model = Model.read(tmp_path / "part.tflite").graphs[0], Model()
    g = model.graph("main")
    y = given = g.input((2, 32), "float32", "x")
    for scale in (0.5, 0.25):
        known = {x: y, s: g.const(np.full(32, scale, np.float32))}
        for op in source.ops:
            if source.model.t.operatorCodes[op.opcodeIndex].customCode:
                known[int(op.outputs[0])] = g.fully_connected(known[x], g.int4(weight))
            else:
                g.copy(op, source, known, "stamp")
        y = known[source.outputs[0]]
    g.outputs = [y]
    model.signature("run", g, {"x": given}, {"y": y})
    model.write(tmp_path / "m.tflite")
    x = np.random.default_rng(5).integers(-64, 64, (2, 32)).astype(np.float32)
    x[:, :2] = [-64, 63.5]
    want = np.float32(0.5) * x @ weight.dequantize().T
    got = run(tmp_path / "m.tflite", x=x)
    # The second product rounds its input to INT8.
    want = np.float32(0.25) * want @ weight.dequantize().T
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    assert {t.name.partition("/")[0] for t in model.graphs[0].t.tensors if "/" in t.name} == {"stamp"}
