"""A bundle in LiteRT-LM's Arm build on this machine: the processor is emulated, `verify` judges the answers.

How long that takes says nothing about a phone. Only `machine.py` knows that the machine is Arm.
"""
