"""Options are typed, named in full, and read back as they were written."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
from moe_jax.config import MoEConfig, QuantConfig, RunConfig, SourceConfig
from moe_jax.errors import UserError
from moe_jax.overrides import apply, differences, from_dict, option_names, to_dict

CFG = RunConfig()


def test_every_registered_config_survives_json():
    for name, function in configs.registered().items():
        cfg = function()
        assert from_dict(RunConfig, json.loads(json.dumps(to_dict(cfg)))) == cfg, name


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["data.seq_len=256"], {"data.seq_len": (2048, 256)}),
        (["optimizer.learning_rate=1"], {"optimizer.learning_rate": (4e-4, 1.0)}),
        (["optimizer.offload=true"], {"optimizer.offload": (False, True)}),
        (["init_from=a=b"], {"init_from": ("", "a=b")}),
        (["data.sources.0.path=x"], {"data.sources.0.path": ("stdlib:text", "x")}),
        (["steps=5", "steps=7"], {"steps": (1000, 7)}),
        (["model.num_heads=15", "model.num_kv_heads=5"], None),  # only valid together
    ],
)
def test_overrides_change_what_they_name(texts, expected):
    changed = differences(CFG, apply(CFG, texts))
    assert expected is None or changed == expected


def test_optional_parts_are_switched_on_and_off():
    assert apply(CFG, ["quant=default"]).quant == QuantConfig()
    assert apply(CFG, ["quant.weight_group_size=64"]).quant == QuantConfig(64)
    assert apply(CFG, ["quant=default", "quant=none"]) == CFG
    dense = apply(CFG, ["model.moe=none"])
    assert dense.model.moe is None
    assert apply(dense, ["model.moe.num_experts=8"]).model.moe == MoEConfig(num_experts=8)


def test_a_repeated_part_grows_at_its_next_index():
    cfg = apply(CFG, ["data.sources.1.path=b", "data.sources.1.weight=3"])
    assert [(s.path, s.weight) for s in cfg.data.sources] == [("stdlib:text", 1.0), ("b", 3.0)]
    cfg = apply(CFG, ['data.sources=[{"path": "c", "weight": 1, "kind": "chat"}]'])
    assert [(s.path, s.kind) for s in cfg.data.sources] == [("c", "chat")]


@pytest.mark.parametrize(
    "text, words",
    [
        ("data.seq_length=3", ["'data.seq_length'", "did you mean 'data.seq_len'?"]),
        ("seq_len=3", ["did you mean 'data.seq_len'?"]),
        ("modle.d_model=3", ["did you mean 'model.d_model'?"]),
        ("model.moe.num_expert=3", ["did you mean 'model.moe.num_experts'?"]),
        ("zzz=3", ["unknown option 'zzz'", "known: "]),
        ("data.seq_len=many", ["data.seq_len is 'many'", "a whole number"]),
        ("data.seq_len=2.5", ["a whole number"]),
        ("optimizer.offload=1", ["true or false"]),
        ("optimizer.b1=high", ["a number"]),
        ("data=5", ["data is 5", "group of options"]),
        ("quant=int4", ["JSON, none or default"]),
        ("data.sources.5.path=x", ["'5' is no index of a list of 1"]),
        ("steps", ["not of the form name=value"]),
        ("data.seq_len.x=1", ["unknown option 'data.seq_len.x'"]),
        ('data.sources=[{"paths": "x"}]', ["unknown option 'data.sources.0.paths'", "did you mean 'path'?"]),
        ("model.num_heads=7", ["num_heads 7 is not a multiple"]),
    ],
)
def test_a_wrong_override_names_cause_and_mend(text, words):
    with pytest.raises(UserError) as caught:
        apply(CFG, [text])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_what_an_earlier_version_did_not_know_has_its_default():
    data = to_dict(CFG)
    data["model"] = {k: v for k, v in data["model"].items() if k != "qk_norm"}
    assert from_dict(RunConfig, {k: v for k, v in data.items() if k != "loss_chunk"}) == replace(
        CFG, loss_chunk=RunConfig().loss_chunk
    )
    (source,) = apply(CFG, ['data.sources=[{"path": "x"}]']).data.sources
    assert source == SourceConfig("x")


def test_an_unknown_or_mistyped_key_is_no_config():
    data = to_dict(CFG)
    with pytest.raises(UserError, match=r"unknown option 'model\.colour'"):
        from_dict(RunConfig, data | {"model": data["model"] | {"colour": 1}})
    with pytest.raises(UserError, match="steps is True; expected a whole number"):
        from_dict(RunConfig, data | {"steps": True})


@given(st.sampled_from(option_names(RunConfig)), st.text(max_size=12))
def test_any_text_is_taken_or_refused_in_one_sentence(name, value):
    try:
        cfg = apply(CFG, [f"{name.replace('*', '0')}={value}"])
    except UserError as error:
        assert name.split(".")[0] in str(error) or name.split(".")[-1] in str(error)
    else:
        assert from_dict(RunConfig, to_dict(cfg)) == cfg


def test_unknown_config_suggests_the_nearest_name():
    name = next(iter(configs.registered()))
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        configs.get(name + "x")


def test_every_config_says_what_it_is_for():
    for name in configs.registered():
        assert len(configs.summary(name)) > 20, name


@pytest.mark.parametrize(("text", "right"), [("model.mode=1", "model.moe"), ("model.m=1", "model.moe")])
def test_a_mistyped_part_is_mended_where_it_stands(text, right):
    with pytest.raises(UserError, match=re.escape(repr(right))):
        apply(RunConfig(), [text])


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["mesh={}", "mesh.fsdp=2"], {"mesh.fsdp": (-1, 2)}),
        (
            ['data.sources=[{"path":"x.txt"}]', "data.sources.0.weight=2"],
            {"data.sources.0.path": None, "data.sources.0.weight": None},
        ),
        (["quant={}", "quant.weight_group_size=64"], {"quant.weight_group_size": None}),
        (['model.moe={"num_experts":8}', "model.moe.num_experts_per_tok=2"], {"model.moe.num_experts": (60, 8)}),
    ],
)
def test_a_group_that_was_set_can_be_overridden_inside(texts, expected):
    changed = differences(CFG, apply(CFG, texts))
    assert changed.keys() >= expected.keys()
    assert all(changed[name] == values for name, values in expected.items() if values)


@pytest.mark.parametrize("texts", [["mesh=5", "mesh.fsdp=2"], ["data.sources=5", "data.sources.0.path=x"]])
def test_a_group_that_is_none_is_named(texts):
    with pytest.raises(UserError, match="is 5; expected a"):
        apply(CFG, texts)
