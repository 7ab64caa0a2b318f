"""Where arrays live: the mesh, the rules that put parameters on it, and the transport of tokens to experts.

`rules.py` is the only file that ties a parameter's logical axis to a mesh axis; `dispatch.py` is the only
one with code per device. Change a rule here and the model code stays as it is.
"""
