"""The yardstick with all experts computed, against the sparse form."""

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from conversion import weights
from conversion.litert.dense import DenseExperts
from conversion.litert.experts import Experts
from conversion.litert.flatbuffer import Model
from conversion.litert.routed import expand
from tests.conversion.conftest import MOE


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_all_experts_give_the_sparse_answer_up_to_int8_rounding(activation, tmp_path):
    source, answers = weights.random(MOE), []
    name = "model.layers.0.feed_forward.experts"
    gate_up, down = (source.int4(f"{name}.{part}_proj") for part in ("gate_up", "down"))
    rng = np.random.default_rng(0)
    values = {
        "x": rng.standard_normal((6, 64)).astype(np.float32),
        "ids": np.stack([rng.permutation(5)[:2] for _ in range(6)]).astype(np.int32),
        "routing": rng.random((6, 2)).astype(np.float32),
    }
    for form in (Experts, DenseExperts):
        model = Model()
        g = model.graph("main")
        names = {key: g.input(v.shape, str(v.dtype), key) for key, v in values.items()}
        out, experts = g.tensor((6, 64), "float32", "y"), form(model, gate_up, down, activation)
        if isinstance(experts, Experts):
            expand(g, experts, names["x"], names["ids"], names["routing"], out)
        else:
            experts.expand(g, names["x"], names["ids"], names["routing"], out)
        g.outputs = [out]
        model.signature("layer", g, names, {"y": out})
        model.write(tmp_path / "layer.tflite")
        runtime = Interpreter(str(tmp_path / "layer.tflite"), num_threads=1)
        answers.append(runtime.get_signature_runner("layer")(**values)["y"])
    sparse, dense = answers
    assert np.abs(sparse - dense).max() < 0.03 * np.abs(sparse).max()
