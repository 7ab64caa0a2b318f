"""ExecuTorch files (.pte) for its stock runtime, in which the routed experts are one op that came for MobileMoE.

`program` is the model in the ops of that runtime, `packing` the layout its experts' op reads, `lower` writes the
file and `readback` compares what is in it. An extra: `requirements/executorch.txt`.
"""
