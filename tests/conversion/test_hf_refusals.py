"""A folder that is not just as published is refused by the name of what is wrong, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.hf_config import hf_config, read_config
from conversion.hf_files import Folder
from conversion.hf_import import import_folder
from moe_jax.config import MoEConfig
from moe_jax.errors import UserError
from tests.conversion.folders import TINY, TINY_DENSE, tiny_tokenizer, write_published


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {int4: write_published(root / str(int4), TINY, int4) for int4 in (False, True)}


@pytest.fixture
def folder(published, tmp_path):
    """Copies a published folder, to be damaged."""
    return lambda int4=False: shutil.copytree(published[int4], tmp_path / "published")


def refused(folder, sentence):
    """The import must fail with the sentence and leave nothing."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError, match=sentence):
        import_folder(folder, folder.parent / "run", allow_requantization=True)
    assert sorted(folder.parent.iterdir()) == before


def saying(folder, key, value):
    """The folder, whose config.json says `value` at a dotted `key`."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    *parents, last = key.split(".")
    part = data[parents[0]] if parents else data
    part[last] = value
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model_type", "llama4", "model_type = 'llama4'"),
        ("hidden_act", "gelu", "hidden_act = 'gelu'"),
        ("tie_word_embeddings", False, "tie_word_embeddings = False"),
        ("attention_bias", True, "attention_bias = True"),
        ("attention_bias", 0, "attention_bias = 0"),  # equal to false, as true is to 1
        ("interleave_moe_layer_step", 2, "interleave_moe_layer_step = 2"),
        ("interleave_moe_layer_step", True, "interleave_moe_layer_step = True"),
        ("no_rope_layers", [1, 0], r"no_rope_layers = \[1, 0\]"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types"),
        ("rope_scaling.rope_type", "yarn", "rope_scaling.rope_type = 'yarn'"),
        ("rope_scaling.low_freq_factor", 4.0, "rope_scaling.low_freq_factor = 4.0"),
        ("rope_scaling.high_freq_factor", 4.0, "rope_scaling.high_freq_factor = 4.0"),
        ("rope_scaling.beta_fast", 32, "rope_scaling.beta_fast = 32"),
        ("rope_scaling", "none", "rope_scaling = 'none'"),
        ("rope_parameters", {"rope_theta": 1.0}, "rope_parameters"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("num_hidden_layers", 10**18, "num_hidden_layers = 1000000000000000000; at most 10000 can be read"),
    ],
)
def test_a_config_that_says_something_else_is_refused_by_the_field(folder, key, value, sentence):
    refused(saying(folder(), key, value), sentence)


@pytest.mark.parametrize("key", ["tie_word_embeddings", "no_rope_layers", "hidden_act", "model_type"])
def test_a_config_that_does_not_say_what_every_folder_says_is_refused_by_the_field(folder, key):
    place = folder()
    path = place / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    refused(place, f"{key} = None")


# Most are equal to what is right, and would make a run whose config cannot be read again.
@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_hidden_layers", 2.0, "a whole number"),
        ("num_experts_per_tok", 2.0, "a whole number"),
        ("max_position_embeddings", 1024.0, "a whole number"),
        ("rope_scaling.original_max_position_embeddings", 64.0, "a whole number"),
        ("num_key_value_heads", True, "a whole number"),
        ("head_dim", "wide", "a whole number"),
        ("hidden_size", [64], "a whole number"),
        ("use_qk_norm", 1, "true or false"),
        ("norm_topk_prob", 1, "true or false"),
        ("routed_scaling_factor", True, "a number"),
        ("rope_scaling.factor", None, "a number"),
        ("rope_theta", None, "a number"),
    ],
)
def test_a_value_of_another_type_is_refused_by_the_field(folder, key, value, expected):
    place = saying(folder(), key, value)
    refused(place, re.escape(f"{key} in {place}/config.json is {value!r}; expected {expected}"))


def test_a_whole_number_does_where_a_number_is_wanted_and_a_missing_field_is_named(folder):
    place = saying(folder(), "rope_theta", 10_000)
    assert read_config(place / "config.json")[0] == TINY
    path = place / "config.json"
    for key in ("rope_scaling", "num_local_experts"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
        refused(place, f"misses '{key}'")
        saying(place, key, {"num_local_experts": 5}.get(key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("group_size", 64),
        ("embedding_group_size", 128),
        ("symmetric", False),
        ("expert_group_axis", "in"),
        ("zero_point", 8),
    ],
)
def test_another_quantisation_is_refused_by_the_field(folder, key, value):
    refused(saying(folder(int4=True), f"quantization.{key}", value), rf"quantization\.{key}")


def test_fields_that_nothing_reads_are_told(folder):
    place = saying(folder(), "router_aux_loss_coef", 0.01)
    config, int4, unread = read_config(place / "config.json")
    assert (config, int4, unread) == (TINY, False, ["router_aux_loss_coef"])


def test_a_field_of_llama_4_that_says_nothing_beside_another_is_passed_over(folder):
    place = saying(folder(), "no_rope_layer_interval", 4)
    assert read_config(place / "config.json") == (TINY, False, [])


NAME = "model.layers.1.feed_forward.experts.down_"


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "dtype", "infinite", "negative"])
def test_a_wrong_tensor_is_refused_by_its_name(folder, damage):
    place = folder(int4=True)
    arrays = load_file(place / "model.safetensors")
    name = NAME + ("scale" if damage in ("infinite", "negative", "dtype") else "qweight")
    if damage == "missing":
        del arrays[name]
    elif damage == "extra":
        name = "model.layers.2.feed_forward.router.weight"
        arrays[name] = np.zeros((5, 64), np.float32)
    elif damage == "shape":  # groups of 64 would look like this
        arrays[name] = arrays[name][..., ::2].copy()
    elif damage == "dtype":
        arrays[name] = arrays[name].astype(np.float32)
    else:
        arrays[name][1, 2, 0] = np.inf if damage == "infinite" else -1
    save_file(arrays, place / "model.safetensors")
    refused(place, name.replace(".", r"\."))


def test_a_truncated_file_is_refused_by_the_tensor_that_is_cut(folder):
    place = folder()
    file = place / "model.safetensors"
    entries = sorted(Folder(place).entries.items(), key=lambda item: item[1].start)
    name, entry = entries[len(entries) // 2]
    with file.open("r+b") as raw:
        raw.truncate(entry.start + 1)
    refused(place, rf"truncated: {name}")
    with file.open("r+b") as raw:
        raw.truncate(100)
    refused(place, "header .* longer than the file")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b'"model.norm.weight"', b'"model.normzweight"', "model.norm.weight"),
        (b'{"dtype":"BF16","shape":[300,64]', b'{"dtype":"BF16","shape":[300,65]', "damaged at model.embed_tokens"),
        (b'"BF16","shape":[300', b'"BG16","shape":[300', "damaged at model.embed_tokens.weight .*BG16"),
        (b'{"__metadata__"', b'["__metadata__"', "header .* is damaged"),
    ],
)
def test_a_flipped_header_is_refused(folder, old, new, sentence):
    file = folder() / "model.safetensors"
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))
    refused(file.parent, sentence)


def stored(path, data=bytes(16), **fields):
    """A safetensors file with `data` behind a header of `fields`."""
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def field(shape, offsets, dtype="U8"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"a": field([8], [0, 8]), "b": field([12], [4, 16])}, "b does not start where the tensor before it ends"),
        ({"a": field([8], [0, 8]), "b": field([4], [12, 16])}, "b does not start where the tensor before it ends"),
        ({"a": field([8], [0, 8]), "b": field([9], [8, 17])}, "truncated: b and what follows"),
        ({"a": field([8], [0, 8]), "b": field([7], [8, 15])}, "has 1 bytes that belong to no tensor"),
        ({"a": field([2.0], [0, 8], "F32"), "b": field([8], [8, 16])}, "damaged at a .*whole numbers"),
        ({"a": field([8], [0, 8]), "b": field([True, 2], [8, 16], "F32")}, "damaged at b .*whole numbers"),
        ({"a": field([8], [0.0, 8]), "b": field([8], [8, 16])}, "damaged at a .*whole numbers"),
        ({"a": field([-2, -4], [0, 8]), "b": field([8], [8, 16])}, "damaged at a .*whole numbers"),
        ({"a": field([8], [0, 8]), "b": field([8], [-8, 0])}, "damaged at b .*whole numbers"),
        ({"a": field([8], [0, 8]), "b": None}, "damaged at b"),
        ({"a": field([8], [0, 8], ["U8"]), "b": field([8], [8, 16])}, "damaged at a"),
    ],
)
def test_a_header_that_does_not_add_up_is_refused_by_file_and_tensor(tmp_path, fields, sentence):
    file = tmp_path / "model.safetensors"
    stored(file, a=field([8], [0, 8]), b=field([2], [8, 16], "F32"))
    assert Folder(tmp_path).entries["b"].shape == (2,)
    stored(file, **fields)
    with pytest.raises(UserError, match=sentence) as told:
        Folder(tmp_path)
    assert str(file) in str(told.value)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"a": 1}}, "puts a into 1, which is no file"),
        ({"weight_map": {"a": "model-1.safetensors", "b": None}}, "puts b into None, which is no file"),
        ({"weight_map": {"a": ["model-1.safetensors"]}}, "puts a into .*, which is no file"),
        ({"weight_map": None}, "cannot be read"),
        ({"weight_map": ["x"]}, "cannot be read"),
        ({}, "cannot be read"),
        (None, "cannot be read"),
        ([], "cannot be read"),
    ],
)
def test_an_index_that_names_no_files_is_refused(tmp_path, index, sentence):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence) as told:
        Folder(tmp_path)
    assert str(file) in str(told.value)


def test_a_tensor_in_two_shards_is_refused_by_its_name_and_both_files(tmp_path):
    for name in "xy":
        stored(tmp_path / name, **{name: field([8], [0, 8]), "a": field([8], [8, 16])})
    places = {"x": "x", "y": "y", "a": "x"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=f"a is in {tmp_path}/y and in {tmp_path}/x"):
        Folder(tmp_path)


def test_a_file_that_is_not_there_and_a_tokenizer_that_does_not_fit_are_named(folder):
    place = folder()
    (place / "model.safetensors").rename(place / "other")
    refused(place, "cannot read .*model.safetensors")
    (place / "other").rename(place / "model.safetensors")
    (place / "tokenizer.json").unlink()
    refused(place, "tokenizer")


@pytest.mark.parametrize("layers", [1, 2])
def test_experts_are_not_rounded_again_unless_allowed_and_the_price_is_told(tmp_path, layers):
    place = write_published(tmp_path / "published", dataclasses.replace(TINY, num_layers=layers), int4=True)
    with pytest.raises(UserError, match=r"moves the first layer's weights by \d+\.\d%.*--allow-requantization"):
        import_folder(place, place.parent / "run")
    assert not (place.parent / "run").exists()


def test_a_run_folder_that_holds_something_is_left_alone(folder):
    place = folder()
    (place.parent / "run").mkdir()
    (place.parent / "run" / "notes").write_text("mine")
    refused(place, "run exists")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation": "gelu_tanh"}, "activation"),
        ({"moe": MoEConfig(5, 2, 32, 160, score_func="softmax")}, "moe.score_func"),
        ({"moe": MoEConfig(5, 2, 32, 160, use_expert_bias=False)}, "moe.use_expert_bias"),
    ],
)
def test_what_the_layout_has_no_words_for_is_named(change, named):
    with pytest.raises(UserError, match=f"cannot say {named}"):
        hf_config(dataclasses.replace(TINY, **change), tiny_tokenizer(), False)
    with pytest.raises(UserError, match="no dense model"):
        hf_config(TINY_DENSE, tiny_tokenizer(), False)
