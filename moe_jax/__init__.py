"""Training of MobileMoE in JAX: configs -> data -> model -> step -> trainer -> checkpoint.

Imports neither PyTorch nor LiteRT; `conversion` takes over from the checkpoint.
"""
