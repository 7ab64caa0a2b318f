"""One of two processes that save, restore and fail together: `sharded.py RUN`; prints a line of JSON a finding.

They save two states, restore them on another mesh with a byte of the second one flipped, and save once more with
process 1 out of room, from which process 0 has to be ended by whoever started both.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moe_jax.config import CheckpointConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel import processes
from moe_jax.parallel.mesh import make_mesh
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.state import TrainState, abstract_state, init_state
from moe_jax.train.stored import flatten
from tests.tiny import quick, run_config

SAVED, RESTORED = MeshConfig(fsdp=4), MeshConfig(data=2, expert=2)


def filled(state: TrainState, seed: int) -> TrainState:
    """The state with moments that are not zero."""

    def fill(opt_state):
        leaves, structure = jax.tree.flatten(opt_state)
        waves = [jnp.sin(jnp.arange(leaf.size) + seed + index) for index, leaf in enumerate(leaves)]
        shaped = [(9 * w).reshape(leaf.shape).astype(leaf.dtype) for w, leaf in zip(waves, leaves, strict=True)]
        return jax.tree.unflatten(structure, shaped)

    where = jax.tree.map(lambda leaf: leaf.sharding, state.opt_state)
    return replace(state, opt_state=quick(fill, out_shardings=where)(state.opt_state))


def digests(state: TrainState) -> dict[str, str]:
    """SHA-256 of each whole leaf."""
    whole = {
        name: leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        for name, leaf in flatten(state).items()
    }
    return {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in whole.items()}


def tell(**finding: object) -> None:
    print(json.dumps(finding), flush=True)


def main(run: Path) -> None:
    processes.start()
    cfg = run_config(mesh=SAVED)
    mesh = make_mesh(cfg.mesh)
    checkpoints = Checkpoints(run, CheckpointConfig(keep=2))
    for step in (1, 2):
        state = filled(init_state(replace(cfg, seed=step), mesh), step)
        checkpoints.save(step, state, {"format_of": "test"})
        tell(saved=step, digests=digests(state))
    checkpoints.wait()
    tell(completed=checkpoints.completed)
    damaged = max((run / "checkpoints/2/model/ocdbt.process_1").rglob("*"), key=lambda path: path.stat().st_size)
    if processes.is_first():
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    processes.barrier("damaged")
    checkpoints = Checkpoints(run, CheckpointConfig(keep=2))
    abstract = abstract_state(cfg, make_mesh(RESTORED))
    found = checkpoints.restore_latest(abstract)
    assert found is not None
    tell(restored=found[2], set_aside=checkpoints.set_aside, digests=digests(found[0]))
    if jax.process_index() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        checkpoints.save(3, found[0], {})
        checkpoints.wait()
    except UserError as error:
        tell(failed=str(error))
        os._exit(2)  # an orderly end waits for the other process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
