"""Arithmetic without parameters, each fast form beside a slow reference that tests compare it with.

`fake_quant.py` defines the quantisation grid for the whole project: a change there changes what is trained
and what is deployed.
"""
