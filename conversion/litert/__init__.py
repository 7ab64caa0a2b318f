"""Files for the stock LiteRT runtime.

`flatbuffer.py` reads, edits and writes `.tflite` files; `routed.py` (on `experts.py` and `prefill.py`) and
`attention.py` write a sparse mixture of INT4 experts and attention over a cache with builtin ops only,
`kernel_op.py` the ops of `conversion.kernel`;
`forms.py` says which of them a file is made of. The modules beside them lower the model and wrap it for LiteRT-LM.
"""

# Tokens of one prefill call. 512 reads S's prompts a third faster than 128 and takes 0.4 GB more: an expert's
# subgraph of each tile size has buffers of its own.
PREFILL = (16, 128, 512)
FORMS = ("sparse", "kernel", "dense")  # stock ops, those of `conversion.kernel`, all experts on every token
