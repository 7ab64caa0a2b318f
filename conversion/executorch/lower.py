"""A .pte file of a model: its program as torch.export traces it, products delegated to XNNPACK, and metadata.

The metadata is what the LLM runner of ExecuTorch asks (`extension/llm/runner/constants.h`), so that its apps take
the file as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch.export import Dim, export

from conversion.executorch.program import Program
from conversion.weights import Weights


def export_pte(weights: Weights, path: Path, context: int, prefill: int, metadata: dict[str, Any]) -> None:
    """Write the model for texts of `context` tokens, 1 to `prefill` of them a call; `metadata` becomes methods."""
    program = Program(weights, context).eval()
    example = torch.zeros(1, min(2, prefill), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    length = {1: Dim("length", max=prefill)} if prefill > 1 else None
    with torch.no_grad():
        exported = export(program, example, dynamic_shapes=(length, None), strict=True)
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=metadata,
    )
    lowered = edge.to_executorch(
        ExecutorchBackendConfig(
            passes=[QuantFusionPass()],
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
    with path.open("wb") as file:
        lowered.write_to_file(file)
