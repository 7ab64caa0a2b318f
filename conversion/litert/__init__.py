"""Files for the stock LiteRT runtime.

`flatbuffer.py` reads, edits and writes `.tflite` files; `experts.py` writes a sparse mixture of INT4 experts
with builtin ops only; the modules beside them lower the model and wrap it for LiteRT-LM.
"""

FORMS = ("sparse", "kernel", "dense")  # of routed experts: stock ops, `conversion.kernel`'s op, all on every token
