"""Eight fake CPU devices for every test, set before JAX starts; single-device tests name the one they use."""

import os
import signal

from hypothesis import settings

# A shell starts what it puts in the background (`make test &`) with SIGINT ignored, which children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

# The first example of a property compiles; its time says nothing.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")
