"""Files for the stock LiteRT runtime.

`flatbuffer.py` reads, edits and writes `.tflite` files; `experts.py` writes a sparse mixture of INT4 experts
with builtin ops only; the modules beside them lower the model and wrap it for LiteRT-LM.
"""

# Tokens of one prefill call. 512 reads S's prompts a third faster than 128 and takes 0.4 GB more: an expert's
# subgraph of each tile size has buffers of its own.
PREFILL = (16, 128, 512)
FORMS = ("sparse", "kernel", "dense")  # of routed experts: stock ops, `conversion.kernel`'s op, all on every token
