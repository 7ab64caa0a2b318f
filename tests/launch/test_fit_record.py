"""The figures and the verdict that `launch fit` gives of a compiled step, and which kept result is that step's.

Nothing is compiled: the results are made up.
"""

from __future__ import annotations

import shutil

import jax
import pytest

import configs
import launch.fit
from launch import fit_compile
from launch.fit import fit
from launch.fit_compile import Compiled, cache_path, compile_step
from launch.fit_estimate import estimated_bytes
from launch.fit_report import available_bytes, first_knob, fit_record
from launch.fit_table import Row, render_table
from launch.slices import parse_slice
from tests.launch.test_fit import GB, MESH, SHORT, SMALL, needs_libtpu, run, small
from tests.launch.test_hlo import step

# Two slices of four devices: a sum within each of them, and one of each device with its twin.
TEXT = step(
    """%a = f32[2,128] parameter(0)
%near = f32[2,128] all-reduce(%a), replica_groups=[2,4]<=[8], to_apply=%add
ROOT %far = f32[2,128] all-reduce(%near), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add"""
)
KIND = parse_slice("v5e:2x2")


def result(fits: bool = True, mesh: dict[str, int] = MESH) -> Compiled:
    text, message = (TEXT, "") if fits else ("", SHORT)
    return Compiled(text, message, 4 * GB, 2 * GB, mesh, 1.0, {"jax": "1"}, "2026-01-01")


# ---- figures ----------------------------------------------------------------------------------------


def test_the_memory_of_a_device_that_is_half_a_chip_is_half_of_the_chips_less_what_the_runtime_keeps():
    assert available_bytes(parse_slice("tpu7x:2x2x2")) == 96 * 2**30 - 2**28
    assert available_bytes(KIND) == 16 * 2**30 - 2**28


def test_a_record_of_two_slices_counts_the_chips_and_the_traffic_of_both():
    cfg = small("data.global_batch_size=32", "gradient_accumulation=2")
    record = fit_record("mobilemoe_s", cfg, KIND, 2, result(mesh=MESH | {"slices": 2}), 1e12)
    assert record["devices"] == 8 and record["per_device_batch"] == 2
    assert record["stage"]["days"] == pytest.approx(record["stage"]["chip_hours"] / 8 / 24)
    # Half of what is reduced leaves its slice.
    assert record["collectives"] == {"all-reduce": {"count": 2, "gb": 2048 / 1e9, "dcn_gb": 1024 / 1e9}}


def test_a_table_has_the_state_and_the_temporaries_in_their_own_columns():
    record = fit_record("mobilemoe_s", small(), KIND, 1, result(), 1e12)
    text = render_table([(Row("mobilemoe_s", "v5e:2x2", 512), record)])
    names, _, cells = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    found = dict(zip(names, cells, strict=True))
    assert (found["args GB"], found["temp GB"]) == ("4.00", "2.00")
    assert float(found["headroom GB"]) == pytest.approx(available_bytes(KIND) / 1e9 - 6, abs=0.01)


def test_logits_that_are_cut_by_the_vocabulary_are_not_what_is_large():
    cfg = configs.load("mobilemoe_s", ["remat=full", "loss_chunk=32768", "data.global_batch_size=128"])
    meshes = [MESH | {"fsdp": 16}, MESH | {"fsdp": 8, "tensor": 2}]
    knobs = [first_knob(cfg, mesh, GB, 20 * GB, 16 * GB) for mesh in meshes]
    # 8.4 GB of logits are more than a quarter of 19 GB, half of them are less.
    assert "loss_chunk=16384" in knobs[0] and "loss_chunk" not in knobs[1]


def test_fewer_sequences_at_a_time_are_more_microbatches_than_there_are():
    cfg = configs.load("mobilemoe_s", ["remat=full", "data.global_batch_size=128", "gradient_accumulation=2"])
    knob = first_knob(cfg, MESH | {"fsdp": 16}, GB, 31 * GB, 16 * GB)
    assert "gradient_accumulation=4 " in knob and "--per-device-batch 2" in knob
    # Devices that share a sequence do not halve the sequences.
    cfg = configs.load("mobilemoe_s", ["remat=full", "data.global_batch_size=16"])
    knob = first_knob(cfg, MESH | {"fsdp": 8, "tensor": 2}, GB, 31 * GB, 16 * GB)
    assert "gradient_accumulation=2 " in knob and "--per-device-batch 0.5" in knob


# ---- verdicts ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_compiled_again_on_as_many_devices_with_more_memory(monkeypatch):
    kinds = []

    def refuse(cfg, kind, slices=1):
        kinds.append(kind)
        return result(fits=False, mesh=MESH | {"fsdp": 8})

    monkeypatch.setattr(launch.fit, "compile_kept", refuse)
    record, _ = fit("mobilemoe_s", small("data.global_batch_size=8"), parse_slice("v5e:2x4"), 1, 1e12)
    assert not record["fits"] and [f"{kind.family}:{kind.topology}" for kind in kinds] == ["v5e:2x4", "v5p:2x2x2"]


@needs_libtpu
@pytest.mark.parametrize(("fits", "status"), [(True, 0), (False, 2)])
def test_the_status_of_a_search_tells_whether_anything_fits(fits, status, monkeypatch, capsys):
    monkeypatch.setattr("launch.fit_search.compile_kept", lambda *_: result(fits))
    assert run("mobilemoe_s", *SMALL, "--topology", "v5e:2x2", "--search", "--max-compiles", "2") == status
    assert ("does not fit" in capsys.readouterr().out) is not fits


@needs_libtpu
@pytest.mark.parametrize("offload", ["false", "true"])
def test_what_a_step_too_large_holds_leaves_out_what_is_in_the_hosts_memory(offload, monkeypatch):
    def too_large(*_):
        raise jax.errors.JaxRuntimeError(SHORT)

    monkeypatch.setattr("moe_jax.train.step.make_train_step", too_large)
    cfg = small(f"optimizer.offload={offload}", "mesh.fsdp=4")
    refused = compile_step(cfg, KIND)
    assert refused.message == SHORT and refused.args == pytest.approx(estimated_bytes(cfg, MESH)[0], rel=0.02)


# ---- kept results -----------------------------------------------------------------------------------


@needs_libtpu
def test_a_kept_result_is_for_one_kind_and_number_of_slices():
    wanted = [("v5e:4x4", 1), ("v6e:4x4", 1), ("v5e:4x8", 1), ("v5e:4x4", 2)]
    assert len({cache_path(small(), parse_slice(name), slices) for name, slices in wanted}) == 4


@needs_libtpu
@pytest.mark.parametrize("name", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_a_kept_result_is_for_the_flags_that_the_compiler_was_given(name, monkeypatch):
    before = cache_path(small(), KIND, 1)
    monkeypatch.setenv(name, "--xla_tpu_scoped_vmem_limit_kib=65536")
    assert cache_path(small(), KIND, 1) != before


@needs_libtpu
def test_a_kept_result_is_for_the_code_that_makes_the_step_and_not_for_its_comments(tmp_path, monkeypatch):
    before = cache_path(small(), KIND, 1)
    copy = shutil.copytree(fit_compile._PACKAGE, tmp_path / "moe_jax")
    monkeypatch.setattr(fit_compile, "_PACKAGE", copy)
    changed = copy / "ops/grouped_matmul.py"
    text = changed.read_text()
    changed.write_text("# why\n\n" + text)
    assert cache_path(small(), KIND, 1) == before
    changed.write_text(text.replace("even(1024, k)", "even(512, k)"))
    assert changed.read_text() != text and cache_path(small(), KIND, 1) != before
