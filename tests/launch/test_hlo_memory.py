"""Bytes in HBM, read from HLO text and from what the compiler says of a program that is too large."""

from __future__ import annotations

from launch.hlo import read_program
from launch.hlo_memory import read_out_of_memory
from launch.hlo_text import arrays
from tests.launch.programs import step

KiB, MiB, GiB = 2**10, 2**20, 2**30


def test_an_array_takes_whole_tiles_in_memory():
    [narrow] = arrays("bf16[100,64]{1,0:T(8,128)(2,1)}")
    assert (narrow.bytes, narrow.padded_bytes) == (2 * 100 * 64, 2 * 104 * 128)
    [turned] = arrays("bf16[64,100]{0,1:T(8,128)(2,1)}")
    assert turned.padded_bytes == narrow.padded_bytes
    assert [a.in_hbm for a in arrays("(f32[8]{0}, f32[8]{0:T(128)S(1)}, /*index=2*/s32[1]{0:S(2)})")] == [
        True,
        False,
        False,
    ]


def test_a_fusion_that_works_on_a_slice_moves_the_slice_only():
    fused = """
%fused (p0: f32[64,8,128], p1: s32[], p2: f32[64,8,128]) -> f32[64,8,128] {
  %p0 = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %p2 = f32[64,8,128]{2,1,0:T(8,128)} parameter(2)
  %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p2, %p1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %u = f32[64,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %s, %p1, %zero, %zero)
}"""
    body = """%a = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
%b = f32[64,8,128]{2,1,0:T(8,128)SPACE} parameter(1)
%i = s32[]{:S(6)} parameter(2)
ROOT %f = f32[64,8,128]{2,1,0:T(8,128)} fusion(%a, %i, %b), kind=kLoop, calls=%fused"""
    assert read_program(step(body.replace("SPACE", ""), fused)).hbm_bytes == 2 * 4 * KiB
    assert read_program(step(body.replace("SPACE", "S(1)"), fused)).hbm_bytes == 4 * KiB


def test_a_copy_to_other_tiles_inside_a_fusion_moves_nothing_by_itself():
    copies = """
%copied (p: bf16[64,16,128]) -> bf16[64,16,128] {
  %p = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  ROOT %c = bf16[64,16,128]{2,1,0:T(8,128)(2,1)} copy(%p)
}
%fused (p0: bf16[64,16,128], p1: s32[], p2: bf16[64,16,128]) -> bf16[64,16,128] {
  %p0 = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %p2 = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} parameter(2)
  %r0 = bf16[64,16,128]{2,1,0:T(8,128)(2,1)} fusion(%p0), kind=kLoop, ALIAS calls=%copied
  %r2 = bf16[64,16,128]{2,1,0:T(8,128)(2,1)} fusion(%p2), kind=kLoop, ALIAS calls=%copied
  %s = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%r2, %p1, %zero, %zero), dynamic_slice_sizes={1,16,128}
  %u = bf16[64,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%r0, %s, %p1, %zero, %zero)
  ROOT %r = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} fusion(%u), kind=kLoop, ALIAS calls=%copied
}"""
    body = """%a = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} parameter(0)
%b = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} parameter(1)
%i = s32[]{:S(6)} parameter(2)
ROOT %f = bf16[64,16,128]{2,1,0:T(16,128)(2,1)} fusion(%a, %i, %b), kind=kLoop, calls=%fused"""
    in_place = copies.replace("ALIAS", "output_to_operand_aliasing={{}: (0, {})},")
    assert read_program(step(body, in_place)).hbm_bytes == 2 * 4 * KiB
    assert read_program(step(body, copies.replace("ALIAS", ""))).hbm_bytes > 64 * 4 * KiB


def test_an_update_inside_a_fusion_that_is_made_in_place_moves_what_it_writes():
    fused = """
%update (p0: f32[64,8,128], p1: f32[1,8,128], p2: s32[]) -> f32[64,8,128] {
  %p0 = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %u = f32[64,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %p1, %p2, %p2, %p2)
}
%fused (q0: f32[64,8,128], q1: f32[1,8,128], q2: s32[]) -> f32[64,8,128] {
  %q0 = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
  %q1 = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %r = f32[64,8,128]{2,1,0:T(8,128)} fusion(%q0, %q1, %q2), ALIAS, calls=%update
}""".replace("ALIAS", "output_to_operand_aliasing={{}: (0, {})}")
    body = """%a = f32[64,8,128]{2,1,0:T(8,128)} parameter(0)
%b = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)
%i = s32[]{:S(6)} parameter(2)
ROOT %f = f32[64,8,128]{2,1,0:T(8,128)} fusion(%a, %b, %i), kind=kLoop, calls=%fused"""
    assert read_program(step(body, fused)).hbm_bytes == 2 * 4 * KiB


def test_a_slice_on_its_way_to_vmem_is_read_once():
    body = """%a = f32[64,128]{1,0:T(8,128)} parameter(0)
%s = ((f32[64,128]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, s32[]) slice-start(%a), slice={[0:8], [0:128]}
ROOT %d = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%s)"""
    assert read_program(step(body)).hbm_bytes == 4 * KiB


def test_a_gather_reads_the_rows_that_its_indices_name_and_writes_them():
    body = """%a = f32[64,128]{1,0:T(8,128)} parameter(0)
%i = s32[8]{0:T(128)SPACE} parameter(1)
ROOT %g = f32[8,128]{1,0:T(8,128)} gather(%a, %i), offset_dims={1}"""
    assert read_program(step(body.replace("SPACE", "S(1)"))).hbm_bytes == 2 * 4 * KiB
    assert read_program(step(body.replace("SPACE", ""))).hbm_bytes == 2 * 4 * KiB + 4 * 128


def test_a_kernel_that_writes_into_an_operand_moves_what_its_estimate_leaves_for_it():
    body = """%new = f32[8,128]{1,0:T(8,128)} parameter(0)
%all = f32[64,8,128]{2,1,0:T(8,128)} parameter(1)
ROOT %k.1 = (f32[64,8,128]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) custom-call(%new, %all), \
custom_call_target="tpu_custom_call", output_to_operand_aliasing={{0}: (1, {})}"""
    whole = 2 * 64 * 4 * KiB
    assert read_program(step(body)).hbm_bytes == 2 * 4 * KiB + whole
    for part, found in ((4 * KiB, 4 * KiB), (0, 0), (2 * whole, whole)):
        estimate = f', backend_config={{"cost_estimate":{{"flops":"0","bytes_accessed":"{2 * 4 * KiB + part}"}}}}'
        assert read_program(step(body + estimate)).hbm_bytes == 2 * 4 * KiB + found


def test_both_messages_of_a_program_too_large_are_read():
    short = read_out_of_memory(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.00G) "
        "exceeds available HBM (15.75G)."
    )
    assert short is not None
    assert (short.needed, short.available, short.largest) == (20 * GiB, 15.75 * GiB, ())
    long = read_out_of_memory(
        """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Program hbm requirement 63.80G:
    HLO temp         63.79G (100.0% utilization: Unpadded (63.58G) Padded (63.58G))

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(step)/jvp(h)/0/dot_general" source_file="attention.py" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265.remat3 = fusion(custom-call.224), kind=kOutput, calls=fused_computation.957
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: bf16[65536,4096]{1,0}
     Unpadded size: 512.0M
     XLA label: copy.7 = copy(param.1)

  3. Size: 256.0M
     Operator: op_name="state.params[\\'embed\\']"
     Shape: f32[16384,4096]{1,0}
"""
    )
    assert long is not None and long.needed == round(63.8 * GiB)
    assert long.largest == (
        (2 * GiB, "f32[32,4096,4096]", "jit(step)/jvp(h)/0/dot_general"),
        (512 * MiB, "bf16[65536,4096]", "copy.7"),
        (256 * MiB, "f32[16384,4096]", "state.params['embed']"),
    )
    assert read_out_of_memory("Ran out of memory in memory space vmem. Used 20.0M of 16.0M vmem.") is None
