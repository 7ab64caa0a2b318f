"""Bundles in LiteRT-LM's Arm build on emulated processors (`make arm`)."""
