"""Causal attention on TPU: the Splash kernels per device, over batches, heads and a cut sequence.

Legend: B batch, S queries, C keys (the whole sequence), N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    QKVLayout,
    SegmentIds,
    make_splash_mha,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.chips import LANES
from moe_jax.parallel.rules import BATCH_AXES

BLOCK = 512  # small enough to skip most of the causal triangle, large enough to fill the MXU


def _block(length: int) -> int:
    """The largest size up to BLOCK that divides a length."""
    return next((size for size in range(BLOCK, 0, -LANES) if length % size == 0), length)


def _block_sizes(queries: int, keys: int) -> BlockSizes:
    q, kv = _block(queries), _block(keys)
    return BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
        q_layout=QKVLayout.SEQ_MINOR, k_layout=QKVLayout.SEQ_MINOR, v_layout=QKVLayout.SEQ_MINOR,
    )  # fmt: skip


def splash_attention(
    q_BNHS: jax.Array,
    k_BGHS: jax.Array,
    v_BGHS: jax.Array,
    segment_ids_BS: jax.Array,
    mesh: Mesh,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention within each segment, [B, N, S, H]; queries come scaled.

    Causality goes by place in the row, which within a document is the order of positions. Queries are cut
    over `context`, keys and values are gathered over it: a device works on its own rows of the triangle.
    The sequence must be a multiple of LANES per device.
    """
    length, shards = q_BNHS.shape[3], mesh.shape["context"]
    heads = q_BNHS.shape[1] // mesh.shape["tensor"]
    with jax.ensure_compile_time_eval():
        kernel = make_splash_mha(
            MultiHeadMask([CausalMask((length, length))] * heads),
            block_sizes=_block_sizes(length // shards, length),
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name="attention",
            interpret=interpret,
        )
    by_query = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, "context")))

    def body(kernel, q_BNHS, k_BGHC, v_BGHC, query_segments_BS, key_segments_BC):
        segments = SegmentIds(query_segments_BS, key_segments_BC)
        # The kernels' interface is [.., S, H], their layout is ours: the swaps cancel.
        q, k, v = (a.swapaxes(2, 3) for a in (q_BNHS, k_BGHC, v_BGHC))
        return jax.vmap(kernel)(q, k, v, segments)

    queries, keys = PartitionSpec(BATCH_AXES, "tensor", None, "context"), PartitionSpec(BATCH_AXES, "tensor")
    by_token, by_row = PartitionSpec(BATCH_AXES, "context"), PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(by_query, queries, keys, keys, by_token, by_row),
        out_specs=PartitionSpec(BATCH_AXES, "tensor", "context"),
        check_vma=False,  # the kernels have no replication types; the output is cut like the queries
    )(kernel, q_BNHS, k_BGHS, v_BGHS, segment_ids_BS, segment_ids_BS)
