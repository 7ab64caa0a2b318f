"""Where arrays live, and the code that runs per device.

`mesh.py` names the axes and `rules.py` is the only file that ties a parameter's logical axis to one of them;
`product.py`, `dispatch.py`, `splash.py` and `vocabulary.py` hold what runs inside shard_map: products with cut
weights, the transport of tokens to experts, attention on TPU, and both ends of the model. Change a rule here and
the model code stays as it is.
"""
