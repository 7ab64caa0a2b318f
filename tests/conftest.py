"""Eight fake CPU devices for every test, set before JAX starts; single-device tests name the one they use."""

import os

from hypothesis import settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# The first example of a property compiles; its time says nothing.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")
