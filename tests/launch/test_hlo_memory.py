"""Bytes that one instruction moves through HBM, on arrays whose tiles are counted by hand."""

from __future__ import annotations

import pytest

from launch.hlo import read_program
from launch.hlo_text import arrays
from tests.launch.test_hlo import KiB, step

TILE = "f32[1,8,128]{2,1,0:T(8,128)}"  # 4 KiB
MANY = "f32[64,8,128]{2,1,0:T(8,128)}"
IDS = "s32[32,1]{1,0:T(8,128)}"  # 16 KiB: each number takes a row of a tile
SHORT = "bf16[32,128]{1,0:T(8,128)(2,1)}"  # 8 KiB
HALVES = "bf16[4096,128]{1,0:T(8,128)(2,1)}"


def vmem(shape: str) -> str:
    return shape.replace("}", "S(1)}")


def test_a_truth_value_takes_a_byte():
    (found,) = arrays("pred[16,8]{1,0}")
    assert found.bytes == found.padded_bytes == 128


@pytest.mark.parametrize(
    ("shapes", "call", "moved"),
    [
        ((MANY,), f"{TILE} dynamic-slice(%p0, %i, %i, %i)", 4 + 4),
        ((MANY,), f"{vmem(TILE)} dynamic-slice(%p0, %i, %i, %i)", 4),
        ((vmem(MANY),), f"{TILE} dynamic-slice(%p0, %i, %i, %i)", 4),
        ((MANY, TILE), f"{MANY} dynamic-update-slice(%p0, %p1, %i, %i, %i)", 4 + 4),
        ((MANY, vmem(TILE)), f"{MANY} dynamic-update-slice(%p0, %p1, %i, %i, %i)", 4),
        ((vmem(MANY), TILE), f"{vmem(MANY)} dynamic-update-slice(%p0, %p1, %i, %i, %i)", 4),
        ((HALVES, IDS), f"{SHORT} gather(%p0, %p1), slice_sizes={{1,128}}", 8 + 16 + 8),
        ((TILE,), f"({TILE}, {MANY}) all-gather-start(%p0), replica_groups={{}}", 4 + 64 * 4),
        ((TILE,), f"({vmem(TILE)}, {MANY}) all-gather-start(%p0), replica_groups={{}}", 64 * 4),
        ((TILE, TILE), f"{vmem(TILE)} add(%p0, %p1)", 4 + 4),
    ],
)
def test_an_instruction_moves_what_it_touches_and_not_the_whole_array(shapes, call, moved):
    given = [f"%p{i} = {shape} parameter({i})" for i, shape in enumerate(shapes)]
    text = step("\n".join([*given, "%i = s32[]{:S(6)} parameter(9)", f"ROOT %r = {call}"]))
    assert read_program(text).hbm_bytes == moved * KiB


@pytest.mark.parametrize(
    ("shapes", "result", "call", "read"),
    [
        ((MANY,), TILE, "dynamic-slice(%p0, %i, %i, %i)", 4),
        ((MANY,), TILE, "slice(%p0), slice={[3:4], [0:8], [0:128]}", 4),
        ((HALVES, IDS), SHORT, "gather(%p0, %p1), slice_sizes={1,128}", 8 + 16),  # the numbers are read whole
        ((MANY,), vmem(MANY), "negate(%p0)", 64 * 4),
    ],
)
def test_a_fusion_reads_the_slices_of_what_it_takes_slices_of_and_all_else_whole(shapes, result, call, read):
    given = [f"%p{i} = {shape} parameter({i})" for i, shape in enumerate(shapes)]
    inside = ["%i = s32[] constant(0)", f"ROOT %r = {result.replace('S(1)', '')} {call}"]
    fused = "\n  ".join(["%fused () -> f32[] {", *given, *inside]) + "\n}"
    names = ", ".join(f"%p{i}" for i in range(len(shapes)))
    # What it makes stays in VMEM.
    made = f"ROOT %f = {vmem(result) if 'S(1)' not in result else result} fusion({names}), calls=%fused"
    assert read_program(step("\n".join([*given, made]), fused)).hbm_bytes == read * KiB


def test_a_gather_that_runs_beside_fusions_moves_what_one_by_itself_does():
    started = f"({TILE}, {MANY}, {IDS})"  # the operand, the result, and what only the collective knows
    fused = f"""
%start (p: f32[1,8,128]) -> (f32[1,8,128], f32[64,8,128], s32[32,1]) {{
  %p = {TILE} parameter(0)
  %g = {MANY} all-gather(%p), replica_groups=[1,64]<=[64], frontend_attributes={{chain_id="0"}}
  ROOT %c = {started} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%end (q: f32[1,8,128], r: f32[64,8,128]) -> f32[64,8,128] {{
  %q = {TILE} parameter(0)
  %r = {MANY} parameter(1)
  %h = {MANY} all-gather(%q), replica_groups=[1,64]<=[64], frontend_attributes={{chain_id="0"}}
  ROOT %d = {MANY} custom-call(%q, %r, %h), custom_call_target="AsyncCollectiveDone"
}}"""
    body = f"""%a = {TILE} parameter(0)
%s = {started} fusion(%a), kind=kCustom, calls=%start
%b = {TILE} get-tuple-element(%s), index=0
%c = {MANY} get-tuple-element(%s), index=1
ROOT %e = {MANY} fusion(%b, %c), kind=kCustom, calls=%end"""
    program = read_program(step(body, fused, partitions=64))
    assert program.hbm_bytes == (4 + 64 * 4) * KiB
    assert [(c.kind, c.count) for c in program.collectives] == [("all-gather", 1)]
