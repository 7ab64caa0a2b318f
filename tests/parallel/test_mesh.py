"""Meshes: what fits the devices, which axis crosses slices, and what cannot cut a run is refused with the mend."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from moe_jax.config import DataConfig, MeshConfig
from moe_jax.errors import UserError
from moe_jax.parallel import mesh as module
from moe_jax.parallel.mesh import AXES, make_mesh, platform, single_device_mesh
from moe_jax.parallel.rules import BATCH_AXES, RULES, check_divisible
from moe_jax.train.state import init_state
from tests.tiny import DENSE, MOE, mesh_of, run_config, with_moe


def sizes(**axes):
    return MeshConfig(**{"fsdp": 1} | axes)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (sizes(data=3), "mesh data=3 does not fit 8 device.*multiply to 8"),
        (sizes(), "mesh of one device does not fit 8"),
        (
            sizes(fsdp=-1, tensor=3),
            "mesh fsdp=-1, tensor=3 does not fit 8.*beside the -1 must multiply to a divisor of 8",
        ),
        (sizes(slices=2, context=8), "mesh slices=2, context=8 does not fit 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(cfg, message):
    with pytest.raises(UserError, match=message):
        make_mesh(cfg, jax.devices())


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"data": -1}, "mesh data=-1, fsdp=-1 is not usable.*at most one of them -1"),
        ({"data": 0}, "mesh data=0, fsdp=-1 is not usable.*1 or more"),
        ({"context": -2}, "mesh fsdp=-1, context=-2 is not usable"),
    ],
)
def test_sizes_of_no_mesh_are_refused_where_they_are_written(axes, message):
    with pytest.raises(UserError, match=message):
        MeshConfig(**axes)


def test_one_axis_may_take_the_remaining_devices():
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices())
    assert dict(mesh.shape) == {"slices": 1, "data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert make_mesh(MeshConfig(slices=-1, fsdp=4), jax.devices()).shape["slices"] == 2
    assert single_device_mesh().size == 1 and platform(mesh) == "cpu"


def devices_in_slices(slices, per_slice):
    """What the arrangement reads of devices that are spread over slices."""
    return [
        SimpleNamespace(
            id=i, slice_index=i // per_slice, process_index=i // per_slice, platform="cpu", device_kind="cpu"
        )
        for i in range(slices * per_slice)
    ]  # fmt: skip


def test_only_the_slices_axis_crosses_slices():
    arranged = module._arrange((2, 1, 2, 2, 1, 1), devices_in_slices(2, 4))
    assert arranged.shape == (2, 1, 2, 2, 1, 1)
    for index in range(2):
        assert {device.slice_index for device in arranged[index].flat} == {index}


def test_devices_of_several_slices_ask_for_as_many():
    with pytest.raises(UserError, match="the devices form 4 slices; set mesh"):
        make_mesh(sizes(slices=2, fsdp=4), devices_in_slices(4, 2))


def test_every_mesh_axis_is_an_option_and_every_rule_names_mesh_axes():
    assert set(AXES) == set(vars(MeshConfig()))
    named = {axis for axes in RULES.values() for axis in ([axes] if isinstance(axes, str) else axes or ())}
    assert named == set(AXES) and set(BATCH_AXES) < set(AXES)


@pytest.mark.parametrize(
    ("axes", "model", "what", "divisors"),
    [
        (
            {"expert": 8},
            with_moe(num_experts=60),
            "model.moe.num_experts 60",
            "1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60",
        ),
        ({"expert": 4}, MOE, "model.moe.num_experts 6", "1, 2, 3, 6"),
        ({"fsdp": 3}, MOE, "model.d_model 64", "1, 2, 4, 8, 16, 32, 64"),
        ({"context": 3}, MOE, "data.seq_len 16", "1, 2, 4, 8, 16"),
        ({"tensor": 3}, MOE, "model.num_heads 4", "1, 2"),
        ({"context": 16, "tensor": 2}, MOE, "data.seq_len per context shard 1", "1"),
        ({"tensor": 8}, MOE, "model.num_heads 4", "1, 2"),
        ({"tensor": 4}, MOE, "model.num_kv_heads 2", "1, 2"),
        ({"tensor": 2}, replace(MOE, num_heads=12, num_kv_heads=3), "model.num_kv_heads 3", "1"),
        ({"tensor": 4}, replace(MOE, num_kv_heads=4, vocab_size=98), "model.vocab_size 98", "1, 2"),
        ({"tensor": 2}, with_moe(shared_expert_width=33), "model.moe.shared_expert_width 33", "1"),
        ({"tensor": 4}, replace(DENSE, num_kv_heads=4, ffn_width=90), "model.ffn_width 90", "1, 2"),
    ],
)
def test_a_mesh_that_cannot_cut_the_model_is_refused_with_the_sizes_that_can(axes, model, what, divisors):
    """The sizes named are right for all that the axis cuts, not only for what failed first."""
    axis = list(axes)[-1]
    message = refusal(run_config(model, mesh=sizes(**axes)))
    assert message == f"{what} does not divide over mesh.{axis}={axes[axis]}; use one of {divisors}"


def described(cfg: MeshConfig, platform: str = "cpu") -> Any:
    """A mesh as far as its sizes and the kind of its devices go."""
    devices = np.array([SimpleNamespace(platform=platform)])
    return SimpleNamespace(shape={axis: getattr(cfg, axis) for axis in AXES}, devices=devices)


def refusal(cfg, platform="cpu"):
    """What `check_divisible` says of the mesh of this run."""
    with pytest.raises(UserError) as caught:
        check_divisible(cfg, described(cfg.mesh, platform))
    return str(caught.value)


def test_a_dense_model_has_no_experts_to_cut():
    message = refusal(run_config(DENSE, mesh=sizes(expert=2)))
    assert message == "mesh.expert is above 1 but the model is dense; use mesh.fsdp or mesh.data"


def test_a_batch_must_divide_over_all_the_axes_that_cut_it():
    cfg = run_config(mesh=sizes(slices=2, data=2, fsdp=2, expert=2))
    assert refusal(cfg) == (
        "sequences per microbatch 8 does not divide over mesh slices x data x fsdp x expert = 16; "
        "use a multiple of 16 sequences, or a product of 1, 2, 4, 8"
    )


def test_what_a_refusal_suggests_is_taken():
    for axes in ({"expert": 6, "data": 4}, {"fsdp": 8}, {"context": 8, "tensor": 2}, {"data": 8}):
        cfg = run_config(mesh=sizes(**axes))
        cfg = replace(cfg, data=replace(cfg.data, global_batch_size=24))
        check_divisible(cfg, described(cfg.mesh))


def test_only_the_sequences_of_a_microbatch_are_cut():
    cfg = run_config(mesh=sizes(data=8), gradient_accumulation=2)
    assert refusal(cfg).startswith("sequences per microbatch 4 does not divide over mesh data = 8")


def test_attention_on_tpu_needs_a_sequence_of_whole_registers_on_each_device():
    def of(length, **axes):
        data = DataConfig(seq_len=length, global_batch_size=8)
        model = replace(MOE, max_position_embeddings=4096)
        return run_config(model, mesh=sizes(**axes), data=data)

    for cfg in (of(640), of(768, context=2), of(100, tensor=2)):
        check_divisible(cfg, described(cfg.mesh))
    check_divisible(of(640), described(sizes(), "tpu"))
    message = refusal(of(640, context=2), "tpu")
    assert message.startswith("data.seq_len 640 over mesh.context=2 is no multiple of 128 per device")
    assert message.endswith("use a multiple of 256")


def test_the_state_is_not_made_on_a_mesh_that_cannot_hold_it():
    with pytest.raises(UserError, match="does not divide"):
        init_state(run_config(mesh=sizes(expert=4)), mesh_of(sizes(expert=4)))
