"""A process whose second save meets a full disk and that prints the error: `full_disk.py CONFIG RUN`.

A limit on file size fails the same write calls as a full disk, and needs no disk to fill.
"""

import resource
import signal
import sys
import time

import configs
from moe_jax.errors import UserError
from moe_jax.overrides import to_dict
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.state import init_state

cfg = configs.load(sys.argv[1])
state, checkpoints = init_state(cfg, single_device_mesh()), Checkpoints(sys.argv[2])
stored = {"config": to_dict(cfg), "data": {}}
checkpoints.save(1, state, stored)
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, instead of ending the process
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoints.save(2, state, stored)
    while True:  # as the step loop does
        checkpoints.check()
        time.sleep(0.01)
except UserError as error:
    print(error)
