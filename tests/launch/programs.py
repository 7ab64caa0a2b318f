"""Small sharded programs whose costs can be counted by hand, compiled for TPUs that are not there.

`python -m tests.launch.programs` writes their texts anew to tests/launch/data (libtpu is needed); with a name as
argument it prints that one.
"""

from __future__ import annotations

import gzip
import os
import re
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
NAMES = ("products", "overlap", "experts", "attention")


def saved(name: str) -> str:
    """The text of a program as the compiler once gave it."""
    return gzip.decompress((DATA / f"{name}.hlo.gz").read_bytes()).decode()


def step(body: str, more: str = "", partitions: int = 8) -> str:
    """A module around the lines of ENTRY and further computations."""
    lines = re.sub(r"^(?=%|ROOT)", "  ", body.strip(), flags=re.MULTILINE)
    return (
        f"HloModule m, num_partitions={partitions}\n\n{more.strip()}\n\nENTRY %main () -> f32[] {{\n{lines}\n}}\n"
    )


def compile_text(name: str) -> str:
    """A program's text without source paths and kernel code, or the compiler's message if it does not fit."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.pallas.ops.tpu.megablox import gmm
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    shape, devices = ("v5e:4x4", 16) if name == "overlap" else ("v5e:2x2", 4)
    if name in ("attention", "too_big"):
        devices = 1
    chips = topologies.get_topology_desc(platform="tpu", topology_name=shape).devices
    mesh = Mesh(np.array(chips[:devices]), ("fsdp",))

    def gathered(w):
        return jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    def total(f):
        return lambda *args: f(*args).astype(jnp.float32).sum()

    def products(x, w_6):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ gathered(w)), None), x, w_6)[0]

    def overlap(up_8, down_8, x):
        def layer(x, w):
            return x + jnp.tanh(jnp.tanh(x @ gathered(w[0])) @ gathered(w[1])), None

        return jax.lax.scan(jax.checkpoint(layer), x, (up_8, down_8))[0]

    def experts(w_3, x, sizes):
        def body(w_3, x, sizes):
            w_3 = jax.lax.all_gather(w_3, "fsdp", axis=2, tiled=True)
            tile = (512, 256, 256)
            return jax.lax.scan(lambda x, w: (gmm(x, w, sizes, jnp.bfloat16, tile), None), x, w_3)[0]

        specs = (P(None, None, "fsdp"), P("fsdp"), P())
        return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("fsdp"), check_vma=False)(w_3, x, sizes)

    def attention(q, k, v):
        blocks = splash.BlockSizes(
            block_q=512, block_kv=512, block_kv_compute=512,
            block_q_dkv=512, block_kv_dkv=512, block_kv_dkv_compute=512,
            block_q_dq=512, block_kv_dq=512,
        )  # fmt: skip
        mask = masks.MultiHeadMask([masks.CausalMask((2048, 2048))] * 4)
        kernel = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
        return jax.vmap(kernel)(q, k, v)

    def too_big(x):
        return x + 1

    heads = ((2, 4, 2048, 128), P())
    function, arguments = {
        "products": (products, [((8192, 1024), P("fsdp")), ((6, 1024, 1024), P(None, "fsdp"))]),
        "overlap": (
            jax.grad(total(overlap), (0, 1)),
            [
                ((8, 2048, 8192), P(None, "fsdp")),
                ((8, 8192, 2048), P(None, None, "fsdp")),
                ((131072, 2048), P("fsdp")),
            ],
        ),
        "experts": (
            jax.grad(total(experts)),
            [((3, 8, 256, 256), P(None, None, "fsdp")), ((8192, 256), P("fsdp")), ((8,), P())],
        ),
        "attention": (jax.grad(total(attention), (0, 1, 2)), [heads, heads, heads]),
        "too_big": (too_big, [((131072, 65536), P())]),
    }[name]
    structs = [
        jax.ShapeDtypeStruct(dims, jnp.int32 if dims == (8,) else jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for dims, spec in arguments
    ]
    try:
        text = jax.jit(function).trace(*structs).lower(lowering_platforms=("tpu",)).compile().as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    start = re.search(r"^(%|ENTRY)", text, re.MULTILINE)
    assert start is not None
    return text[: text.index("\n\n") + 2] + re.sub(r'"body":"[^"]*"', '"body":""', text[start.start() :])


if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if len(sys.argv) > 1:
        print(compile_text(sys.argv[1]))
    else:
        for program in NAMES:
            packed = gzip.compress(compile_text(program).encode(), mtime=0)
            (DATA / f"{program}.hlo.gz").write_bytes(packed)
