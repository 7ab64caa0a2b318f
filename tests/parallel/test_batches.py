"""Every row of a global batch is read where it is needed and nowhere else, whatever the mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from launch.fit_compile import devices_of
from launch.slices import parse_slice
from moe_jax.config import MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel import batches
from moe_jax.parallel.batches import put_batch, put_everywhere, put_votes, share_of_batch
from moe_jax.parallel.mesh import make_mesh
from tests.tiny import batch, mesh_of

MESHES = [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, expert=2), MeshConfig(fsdp=2, context=2, tensor=2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_one_process_reads_the_whole_batch_and_puts_each_row_in_its_place(sizes):
    mesh, rows = mesh_of(sizes), batch(8)
    assert share_of_batch(mesh) == (0, 1)
    for put in (put_batch, put_everywhere):
        for name, array in put(rows, mesh).items():
            np.testing.assert_array_equal(jax.device_get(array), rows[name])


def test_the_highest_vote_is_what_a_step_returns():
    mesh = mesh_of(MESHES[1])
    assert put_votes(mesh, 2).shape == (8,) and int(put_votes(mesh, 2).max()) == 2


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        (MeshConfig(fsdp=-1), 4),
        (MeshConfig(data=4, fsdp=-1), 4),
        (MeshConfig(fsdp=-1, expert=4), 4),
        (MeshConfig(fsdp=-1, context=2), 4),
        (MeshConfig(fsdp=-1, context=8), 2),
        (MeshConfig(fsdp=-1, context=16), 1),
        (MeshConfig(fsdp=-1, tensor=4, context=4), 1),
    ],
    ids=str,
)
def test_hosts_of_a_slice_share_out_the_batch(sizes, parts, monkeypatch):
    """Four hosts of a real topology, whose devices libtpu describes without a TPU."""
    mesh = make_mesh(sizes, devices_of(parse_slice("v5e:4x4"), 1))
    hosts = sorted({device.process_index for device in mesh.devices.flat})
    assert len(hosts) == 4
    shares = []
    for host in hosts:
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shares.append(share_of_batch(mesh))
    assert {count for _, count in shares} == {parts}
    assert sorted({index for index, _ in shares}) == list(range(parts))
    total, held = batches._shards(mesh)
    for host, (index, _) in zip(hosts, shares, strict=True):
        same = {other for other, (its, _) in zip(hosts, shares, strict=True) if its == index}
        assert {h for h in hosts if held[h] == held[host]} == same
    assert sorted(set().union(*held.values())) == list(range(total))


def test_rows_of_shards_that_lie_apart_go_each_to_its_own(monkeypatch):
    """A host's part of a batch holds the rows of its shards side by side."""
    monkeypatch.setattr(batches, "_shards", lambda _: (4, {0: (0, 2), 1: (1, 3)}))

    def read(shape, _, callback):
        assert shape == (8, 3)
        return {shard: callback(np.s_[2 * shard : 2 * shard + 2, 0:3])[:, 0].tolist() for shard in (0, 2)}

    monkeypatch.setattr(jax, "make_array_from_callback", read)
    part = {"tokens": np.arange(4)[:, None].repeat(3, 1)}
    assert put_batch(part, mesh_of(MeshConfig(fsdp=4))) == {"tokens": {0: [0, 1], 2: [2, 3]}}


def test_rows_that_hosts_share_in_part_are_refused(monkeypatch):
    mesh = mesh_of(MeshConfig(fsdp=4))
    monkeypatch.setattr(batches, "_shards", lambda _: (3, {0: (0, 1), 1: (1, 2)}))
    with pytest.raises(UserError, match=r"unevenly across 2 processes.*mesh.context times mesh.tensor"):
        share_of_batch(mesh)
