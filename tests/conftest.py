"""Eight fake CPU devices for every test, set before JAX starts; single-device tests name the one they use."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
