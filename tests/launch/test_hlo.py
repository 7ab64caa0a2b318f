"""Costs read from HLO text equal those counted by hand, on texts that a TPU compiler gave and on ones made up."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from launch.hlo import Collective, Kernel, costliest, read_program, replica_groups
from launch.hlo_memory import read_out_of_memory
from tests.launch.programs import NAMES, saved, step

KiB, MiB, GiB = 2**10, 2**20, 2**30


def loop(condition: str, update: str, work: str) -> str:
    """A module whose while loop starts its counter at 2."""
    more = f"""
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %p = (s32[], f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,128]{{1,0:T(8,128)}} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %two = s32[] constant(2)
  %next = s32[] {update}
  {work}
  ROOT %t = (s32[], f32[8,128]{{1,0:T(8,128)}}) tuple(%next, %y)
}}

%cond (p.1: (s32[], f32[8,128])) -> pred[] {{
  %p.1 = (s32[], f32[8,128]{{1,0:T(8,128)}}) parameter(0)
  %j = s32[] get-tuple-element(%p.1), index=0
  %limit = s32[] constant(12)
  %decoy = s32[] constant(1000)
  ROOT %lt = pred[] {condition}
}}"""
    return step(
        """%start = s32[] constant(2)
%copied = s32[] copy(%start)
%a = f32[8,128]{1,0:T(8,128)} parameter(0)
%init = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%copied, %a)
ROOT %w = (s32[], f32[8,128]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body""",
        more,
    )


LESS = "compare(%j, %limit), direction=LT"
TEN = '%y = f32[8,128]{1,0:T(8,128)} add(%x, %x), backend_config={"estimated_cycles":"10"}'


# ---- compiled programs --------------------------------------------------------------------------


def test_a_scan_of_products_costs_what_its_shapes_say():
    program = read_program(saved("products"))
    assert program.devices == 4
    assert program.flops == program.issued_flops == 6 * 2 * 2048 * 1024 * 1024
    assert program.collectives == (Collective("all-gather", 4, 1, count=6, bytes=6 * 2 * MiB),)
    assert program.kernels == {} and program.unknown_loops == ()
    # Activations stay in VMEM between the layers: x is read once, each shard of w once, the result written once.
    assert program.hbm_bytes == 2 * (2048 * 1024 + 6 * 256 * 1024 + 2048 * 1024)
    assert program.estimated_cycles == 6 * (5206 + 46176 + 38748)
    assert [(b.bytes, b.shape, b.op_name) for b in program.largest[:3]] == [
        (4 * MiB, "bf16[2048,1024]", "x"),
        (4 * MiB, "bf16[2048,1024]", "copy-done"),
        (3 * MiB, "bf16[6,256,1024]", "w_6"),
    ]


def test_a_gather_that_runs_beside_several_fusions_counts_once():
    program = read_program(saved("overlap"))
    weights = 2 * 2048 * 8192
    # Two weights gathered forward and two backward, a gradient pair reduced, in each of 8 layers.
    assert program.collectives == (
        Collective("all-gather", 16, 1, count=32, bytes=32 * weights),
        Collective("all-reduce", 16, 1, count=8, bytes=16 * weights),
    )
    # Two products forward, two recomputed, four for the gradients.
    assert program.flops == 8 * 8 * 2 * 8192 * 2048 * 8192


def test_grouped_products_count_rows_and_one_tile_more_per_boundary():
    program = read_program(saved("experts"))
    product = 2 * 2048 * 256 * 256
    # 4 row tiles; 7 boundaries between 8 groups may each cut one.
    assert program.kernels == {
        "gmm": Kernel(6, 6 * product, 6 * product * 11 / 4),
        "tgmm": Kernel(3, 3 * product, 3 * product * 11 / 4),
    }
    assert {(c.kind, c.count, c.bytes) for c in program.collectives} == {
        ("all-gather", 1, 3 * MiB),
        ("reduce-scatter", 1, 3 * MiB),
    }


def test_splash_attention_counts_the_blocks_at_and_below_the_diagonal():
    kernels = read_program(saved("attention")).kernels
    score = 2 * 2 * 4 * 128  # FLOPs of one product per (query, key), batch and heads included
    for name, products in (("splash_mha_fwd", 2), ("splash_mha_dq", 3), ("splash_mha_dkv", 4)):
        assert kernels[name].count == 1
        assert kernels[name].flops == products * score * 2048 * 2049 / 2
        assert kernels[name].issued_flops == products * score * 10 * 512 * 512  # 1 + 2 + 3 + 4 blocks
    assert len(kernels) == 3


def test_splash_attention_is_read_with_the_sequence_last_and_with_cut_queries():
    call = r"""%m = s8[1,1,2] parameter(0)
%q = bf16[2,4,QUERY] parameter(1)
%k = bf16[2,4,KEYS] parameter(2)
ROOT %splash_mqa_fwd.1 = bf16[2,4,512,64] custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", x={
"xprof_metadata":"{\"block_q\": 512, \"block_kv\": 256, \"q_layout\": 2, \"k_layout\": LAYOUT}"
}, metadata={op_name="attend"}"""
    each = 2 * 2 * 8 * 64
    whole = call.replace("QUERY", "64,512").replace("KEYS", "64,512").replace("LAYOUT", "2")
    kernel = read_program(step(whole)).kernels
    assert kernel == {"splash_mqa_fwd": Kernel(1, each * 512 * 513 / 2, each * 512 * 512)}
    # The last 512 of 1024 queries see the keys before them whole.
    cut = call.replace("QUERY", "64,512").replace("KEYS", "1024,64").replace("LAYOUT", "1")
    kernel = read_program(step(cut)).kernels
    assert kernel == {"splash_mqa_fwd": Kernel(1, each * (512 * 512 + 512 * 513 / 2), each * 512 * 1024)}


def test_a_backward_kernel_that_makes_the_gradient_of_the_queries_too_has_a_product_more():
    call = r"""%q = bf16[2,4,512,64] parameter(0)
ROOT %splash_mha_dkv.1 = (MORE, bf16[2,4,512,64], bf16[2,4,512,64]) custom-call(%q, %q, %q, %q), \
custom_call_target="tpu_custom_call", x={
"xprof_metadata":"{\"block_q_dkv\": 256, \"block_kv_dkv\": 256, \"q_layout\": 1, \"k_layout\": 1}"
}, metadata={op_name="attend"}"""
    each, needed, issued = 2 * 2 * 4 * 64, 512 * 513 / 2, 3 * 256 * 256
    for more, products in (("bf16[2,4,512]", 4), ("bf16[2,2,4,512,64]", 5)):
        kernel = Kernel(1, products * each * needed, products * each * issued)
        text = step(call.replace("MORE", more).replace("\\\n", ""))
        assert read_program(text).kernels == {"splash_mha_dkv": kernel}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("name", [*NAMES, "too_big"])
def test_the_compiler_still_writes_what_is_read_here(name):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", "tests.launch.programs", name]
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    if name == "too_big":
        short = read_out_of_memory(text)
        assert short is not None and short.needed == 32 * GiB and short.available < 16 * GiB
        return
    new, old = read_program(text), read_program(saved(name))
    assert (new.flops, new.kernels, new.collectives) == (old.flops, old.kernels, old.collectives)


# ---- loops and branches -------------------------------------------------------------------------


def test_a_loop_runs_from_its_start_to_the_constant_it_compares_with():
    one_by_one = read_program(loop(LESS, "add(%i, %one)", TEN))
    assert one_by_one.hbm_bytes == 10 * 3 * 4 * KiB
    by_twos = read_program(loop(LESS, "add(%i, %two)", TEN))
    assert by_twos.hbm_bytes == 5 * 3 * 4 * KiB
    assert one_by_one.estimated_cycles == by_twos.estimated_cycles == 12 * 10


def test_a_trip_count_that_the_compiler_notes_is_taken():
    text = loop("compare(%j, %j), direction=NE", "add(%i, %one)", TEN)
    unknown = read_program(text)
    assert unknown.unknown_loops == ("w",) and unknown.estimated_cycles == 10
    known = read_program(text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'))
    assert known.unknown_loops == () and known.estimated_cycles == 70 and known.hbm_bytes == 7 * 12 * KiB


def test_of_a_conditional_the_costliest_branch_counts():
    branches = "\n\n".join(
        f'%b{n} (q{n}: f32[]) -> f32[] {{\n  ROOT %q{n} = f32[] parameter(0), x={{"estimated_cycles":"{n}"}}\n}}'
        for n in (3, 8, 5)
    )
    body = "%i = s32[] parameter(0)\n%x = f32[] parameter(1)\nROOT %c = f32[] conditional(%i, %x, %x, %x), {}"
    several = step(body.format("branch_computations={%b3, %b8, %b5}"), branches)
    assert read_program(several).estimated_cycles == 8
    two = step(body.format("true_computation=%b3, false_computation=%b5"), branches)
    assert read_program(two).estimated_cycles == 5


def test_a_loop_in_a_branch_costs_as_often_as_it_runs():
    branches = """
%once (q: f32[]) -> f32[] {
  ROOT %q = f32[] parameter(0), x={"estimated_cycles":"30"}
}

%body (p: (f32[])) -> (f32[]) {
  %p = (f32[]) parameter(0)
  %x = f32[] get-tuple-element(%p), index=0
  %y = f32[] add(%x, %x), x={"estimated_cycles":"10"}
  ROOT %t = (f32[]) tuple(%y)
}

%cond (p.1: (f32[])) -> pred[] {
  ROOT %p.1 = (f32[]) parameter(0)
}

%often (r: f32[]) -> f32[] {
  %r = f32[] parameter(0)
  %init = (f32[]) tuple(%r)
  %w = (f32[]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %z = f32[] get-tuple-element(%w), index=0
}"""
    body = """%i = pred[] parameter(0)
%x.1 = f32[] parameter(1)
ROOT %c = f32[] conditional(%i, %x.1, %x.1), true_computation=%once, false_computation=%often"""
    assert read_program(step(body, branches)).estimated_cycles == 7 * 10


def test_the_costliest_names_come_first_and_add_up():
    rows = costliest(saved("products"))
    assert [cycles for _, cycles, _ in rows] == [6 * 46176, 6 * 38748, 6 * 5206]
    assert rows[1][::2] == ("jit(products)/while/body/closed_call/dot_general", 6)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read_program("RESOURCE_EXHAUSTED")


# ---- products -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "adds"),
    [
        ("8,16", "16,32", "8,32", "dot, lhs_contracting_dims={1}, rhs_contracting_dims={0}", 8 * 16 * 32),
        # A batch as a dilated window: each of 2 x 2 positions meets one element, not 2 x 2.
        (
            "2,512,2,64,1", "2,512,2,4,64", "2,2,512,512,4",
            "convolution, window={size=2x2x4 pad=0_0x0_0x3_3 lhs_dilate=2x2x1 rhs_reversal=0x0x1}, "
            "dim_labels=0b1f2_0o12i->01bf2", 2 * 2 * 4 * 512 * 512 * 64,
        ),
        # A batch that is summed over: the window covers it.
        (
            "8,128,16", "8,128,32", "16,32,1", "convolution, window={size=8}, dim_labels=0fb_0io->bf0",
            8 * 128 * 16 * 32,
        ),
        # An image: 9 taps but at the border.
        (
            "1,4,4,3", "3,3,3,5", "1,4,4,5",
            "convolution, window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 10 * 10 * 3 * 5,
        ),
        # Three taps two apart: the outer ones miss two of eight places each.
        (
            "1,8,4", "3,4,5", "1,8,5",
            "convolution, window={size=3 pad=2_2 rhs_dilate=2}, dim_labels=b0f_0io->b0f", (6 + 8 + 6) * 4 * 5,
        ),
        # Each of eight batches makes one feature of its own.
        (
            "8,16,4", "16,4,8", "1,1,8",
            "convolution, window={size=16}, dim_labels=b0f_0io->b0f, batch_group_count=8", 8 * 16 * 4,
        ),
    ],
    ids=["dot", "batch", "summed batch", "image", "taps apart", "batch groups"],
)  # fmt: skip
def test_products_are_counted_from_their_shapes(lhs, rhs, out, attributes, adds):
    opcode, _, rest = attributes.partition(", ")
    operands = f"%l = bf16[{lhs}] parameter(0)\n%r = bf16[{rhs}] parameter(1)\n"
    text = operands + f"ROOT %o = f32[{out}] {opcode}(%l, %r), {rest}"
    assert read_program(step(text)).flops == 2 * adds
    precise = read_program(step(text + ", operand_precision={highest,highest}"))
    assert (precise.flops, precise.issued_flops) == (2 * adds, 6 * 2 * adds)


def test_a_kernel_without_a_formula_says_so_or_gives_its_own_estimate():
    call = "%a = f32[8,128] parameter(0)\nROOT %mine.3 = f32[8,128] custom-call(%a), "
    call += 'custom_call_target="tpu_custom_call"'
    assert read_program(step(call)).kernels == {"mine": Kernel(1, None, None)}
    estimated = call + ', backend_config={"cost_estimate":{"flops":"77","bytes_accessed":"9"}}'
    program = read_program(step(estimated))
    assert program.kernels == {"mine": Kernel(1, 77.0, 77.0)} and program.hbm_bytes == 2 * 4 * KiB


# ---- collectives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_spelling_of_replica_groups_is_read(attributes, groups):
    assert replica_groups(", channel_id=1, " + attributes, 4) == groups


def test_start_and_done_are_one_collective_and_wrapped_ones_count():
    wrapped = """
%wrapped (p: f32[2,128]) -> f32[16,128] {
  %p = f32[2,128] parameter(0)
  ROOT %g = f32[16,128] all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
}

%all-reduce-scatter (q: f32[16,128]) -> f32[2,128] {
  %q = f32[16,128] parameter(0)
  %r = f32[16,128] all-reduce(%q), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = f32[2,128] slice(%r), slice={[0:2], [0:128]}
}"""
    body = """%a = f32[2,128] parameter(0)
%ps = (f32[2,128], f32[2,128], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}
%pd = f32[2,128] collective-permute-done(%ps)
%as = ((f32[2,128]), f32[16,128], u32[]) async-start(%pd), calls=%wrapped
%ad = f32[16,128] async-done(%as), calls=%wrapped
ROOT %f = f32[2,128] fusion(%ad), kind=kCustom, calls=%all-reduce-scatter"""
    assert read_program(step(body, wrapped)).collectives == (
        Collective("all-gather", 8, 1, 1, 8 * KiB),
        Collective("collective-permute", 2, 1, 1, KiB),
        Collective("reduce-scatter", 8, 1, 1, 8 * KiB),
    )


def test_what_sparse_cores_run_counts_and_hides_nothing_behind_it():
    """tpu7x hands them gathers and collectives: a call in a call, each with a thread's name at its end."""
    table, ids, rows = (
        "bf16[4096,128]{1,0:T(8,128)(2,1)}",
        "s32[1024]{0:T(1024)}",
        "bf16[1024,128]{1,0:T(8,128)(2,1)}",
    )
    more = f"""
%fused (t: bf16[4096,128], n: s32[1024]) -> bf16[1024,128] {{
  %t = {table} parameter(0)
  %n = {ids} parameter(1)
  ROOT %g = {rows} gather(%t, %n), offset_dims={{1}}, slice_sizes={{1,128}}
}}, execution_thread="sparsecore"

%inner (t.1: bf16[4096,128], n.1: s32[1024], x.1: f32[2,128]) -> bf16[1024,128] {{
  %t.1 = {table} parameter(0)
  %n.1 = {ids} parameter(1)
  %x.1 = f32[2,128] parameter(2)
  %all = f32[16,128] all-gather(%x.1), replica_groups={{{{0,1,2,3,4,5,6,7}}}}
  ROOT %f = {rows} fusion(%t.1, %n.1), kind=kCustom, calls=%fused
}}, execution_thread="sparsecore"

%outer (t.2: bf16[4096,128], n.2: s32[1024], x.2: f32[2,128]) -> bf16[1024,128] {{
  %t.2 = {table} parameter(0)
  %n.2 = {ids} parameter(1)
  %x.2 = f32[2,128] parameter(2)
  %s.2 = (({table}, {ids}, f32[2,128]), {rows}, u32[]) call-start(%t.2, %n.2, %x.2), to_apply=%inner
  ROOT %d.2 = {rows} call-done(%s.2)
}}, execution_thread="sparsecore"

%double (r: bf16[1024,128]) -> bf16[1024,128] {{
  %r = {rows} parameter(0)
  ROOT %sum = {rows} add(%r, %r)
}}"""
    program = read_program(
        step(
            f"""%t.3 = {table} parameter(0)
%n.3 = {ids} parameter(1)
%x.3 = f32[2,128]{{1,0}} parameter(2)
%s.3 = (({table}, {ids}, f32[2,128]), {rows}, u32[]) call-start(%t.3, %n.3, %x.3), to_apply=%outer
%d.3 = {rows} call-done(%s.3)
ROOT %y = {rows} fusion(%d.3), kind=kLoop, calls=%double""",
            more,
        )
    )
    assert program.collectives == (Collective("all-gather", 8, 1, count=1, bytes=8 * KiB),)
    gathered = 4 * KiB + 2 * 256 * KiB  # the indices, the rows that they name, the rows side by side
    assert program.hbm_bytes == gathered + (1 + 8) * KiB + 2 * 256 * KiB


def test_groups_that_leave_a_slice_are_told_apart():
    text = step(
        """%a = f32[2,128] parameter(0)
%near = f32[2,128] all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
ROOT %far = f32[2,128] all-reduce(%near), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"""
    )
    found = {(c.group, c.slices) for c in read_program(text, devices_per_slice=4).collectives}
    assert found == {(4, 1), (2, 2)}
    assert {c.slices for c in read_program(text).collectives} == {1}
