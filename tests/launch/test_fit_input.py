"""What `python -m launch fit` takes: slices of every family and size, and numbers in range."""

from __future__ import annotations

import pytest

from launch import fit_compile
from launch.fit_compile import device_count
from launch.slices import parse_slice
from tests.launch.test_fit import needs_libtpu, run, small


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--seq-len", "0"), "argument --seq-len: '0' is not a whole number of 1 or more"),
        (("--slices", "0"), "argument --slices: '0' is not"),
        (("--top", "-1"), "argument --top: '-1' is not"),
        (("--max-compiles", "0"), "argument --max-compiles: '0' is not"),
        (("--per-device-batch", "inf"), "argument --per-device-batch: 'inf' is not a number"),
    ],
)
def test_numbers_out_of_range_are_refused_by_the_options_name(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run("mobilemoe_s", "--topology", "v5e:2x2", *words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize("batch", ["0", "0.3"])
def test_a_search_with_a_batch_of_no_whole_sequences_is_refused_and_not_rounded(batch, capsys):
    assert run("mobilemoe_s", "--topology", "v5e:2x2", "--search", "--per-device-batch", batch) == 2
    assert f"--per-device-batch {batch} makes" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("name", ["v4-8", "v4-32", "v5e-1", "v5e-8", "v5p-8", "v6e-1", "tpu7x-8"])
def test_libtpu_gives_as_many_devices_as_the_table_of_chips_says(name, slices):
    kind = parse_slice(name)
    assert len(fit_compile.devices_of(kind, slices)) == device_count(kind, slices)


@needs_libtpu
def test_a_step_compiles_for_v4_whose_cores_make_one_device_a_chip():
    dense = (
        "model.num_layers=1",
        "model.d_model=128",
        "model.num_heads=2",
        "model.num_kv_heads=1",
        "model.moe=none",
    )
    compiled = fit_compile.compile_step(small(*dense, "mesh.fsdp=4", "data.seq_len=256"), parse_slice("v4-8"))
    assert compiled.text and compiled.message == "" and compiled.mesh["fsdp"] == 4


@needs_libtpu
def test_a_search_over_a_sequence_that_no_mesh_can_mend_says_so(capsys):
    assert run("mobilemoe_s", "--topology", "v5e:2x2", "--search", "--seq-len", "1000") == 2
    assert "data.seq_len 1000 over mesh.context=1 is no multiple of 128 per device" in capsys.readouterr().err
