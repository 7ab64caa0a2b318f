"""Published folders in and out: bit for bit where the layout allows, with the loss named where it does not."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import keymap
from conversion.__main__ import main
from conversion.hf_export import export_folder
from conversion.hf_files import Folder
from conversion.hf_import import import_folder
from conversion.hf_int4 import on_grid
from conversion.int4 import Int4, unpack_nibbles
from conversion.tensor_file import DTYPES
from moe_jax.config import DataConfig, OptimizerConfig, QuantConfig, RopeConfig, RunConfig, SourceConfig
from moe_jax.errors import UserError
from moe_jax.generate import Generator
from moe_jax.model.rope import rope_frequencies
from moe_jax.overrides import from_dict
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train.checkpoint import Checkpoints, final_checkpoint, load_parameters
from moe_jax.train.state import abstract_state
from moe_jax.train.trainer import fit
from tests.conversion.folders import (
    ROUTED,
    TINY,
    TINY_DENSE,
    WIDE,
    random_parameters,
    tiny_tokenizer,
    write_published,
    write_run,
)
from tests.data.helpers import render_text

UNSCALED = dataclasses.replace(TINY, rope=RopeConfig(10_000.0, 1.0, 64))
PLAIN = dataclasses.replace(UNSCALED, qk_norm=False, moe=dataclasses.replace(ROUTED, norm_topk_prob=False))
IDS = np.random.default_rng(1).integers(0, 270, 100).tolist()


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """A BF16 folder and the run that it was imported to."""
    root = tmp_path_factory.mktemp("bf16")
    published = write_published(root / "published", TINY, int4=False)
    import_folder(published, root / "run")
    return published, root / "run"


@pytest.fixture(scope="module", params=[True, False], ids=["rounded", "any"])
def int4(request, tmp_path_factory):
    """An INT4 folder, the run that it was imported to, and the report."""
    root = tmp_path_factory.mktemp("int4")
    published = write_published(root / "published", TINY, int4=True, full=request.param)
    return published, root / "run", import_folder(published, root / "run", allow_requantization=True)


def same_tensors(one, other) -> bool:
    """Whether two folders hold the same tensors bit for bit."""
    left, right = Folder(one), Folder(other)
    assert left.entries.keys() == right.entries.keys()
    return all(
        (left.entries[n].dtype, left.read(n).tobytes()) == (right.entries[n].dtype, right.read(n).tobytes())
        for n in left.entries
    )


def test_bf16_goes_in_out_and_in_without_a_bit_changed(bf16, tmp_path):
    published, run = bf16
    report = export_folder(run, tmp_path / "again")
    assert report["rounding"]["tensors"] == report["requantization"]["tensors"] == {}
    assert same_tensors(published, tmp_path / "again")
    import_folder(tmp_path / "again", tmp_path / "run")
    once, twice = (load_parameters(folder)[1] for folder in (run, tmp_path / "run"))
    assert all(np.array_equal(once[path], twice[path]) for path in once)


def test_float32_goes_in_as_it_is(tmp_path):
    published = write_published(tmp_path / "published", TINY, int4=False, wide=True)
    import_folder(published, tmp_path / "run")
    found, wanted = load_parameters(tmp_path / "run")[1], as_published(published, int4=False)
    for path, value in wanted.items():
        assert value.dtype == np.float32 and np.array_equal(found[path], value), path
    kinds = Counter(entry.dtype for entry in Folder(published).entries.values())
    assert kinds.keys() == {"F32"}


def test_int4_goes_in_out_and_in_without_a_bit_changed(int4, tmp_path):
    published, run, _ = int4
    report = export_folder(run, tmp_path / "again", kind="int4-g32")
    assert report["requantization"]["tensors"] == {}
    assert same_tensors(published, tmp_path / "again")
    import_folder(tmp_path / "again", tmp_path / "run", allow_requantization=True)
    once, twice = (load_parameters(folder)[1] for folder in (run, tmp_path / "run"))
    assert all(np.array_equal(once[path], twice[path]) for path in once)


def test_an_imported_folder_is_a_finished_run_of_its_config(bf16):
    _, run = bf16
    config = from_dict(RunConfig, json.loads((run / "config.json").read_text()))
    assert config.model == TINY and config.quant is None and final_checkpoint(run).name == "1"
    assert config.data.tokenizer == str(run / "tokenizer.json")
    stored, parameters = load_parameters(run)
    assert stored == config and parameters.keys() == keymap.jax_shapes(TINY).keys()
    assert sorted(path.name for path in run.parent.iterdir()) == ["published", "run"]


def test_a_model_whose_positions_are_not_scaled_comes_back_with_the_same_frequencies(tmp_path):
    run = write_run(tmp_path / "run", UNSCALED, random_parameters(UNSCALED))
    export_folder(run, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["rope_scaling"] is None
    import_folder(tmp_path / "hf", tmp_path / "again")
    back = load_parameters(tmp_path / "again")[0].model
    # What scaling would start from is not told by the folder, and nothing depends on it.
    assert back == dataclasses.replace(UNSCALED, rope=RopeConfig(10_000.0, 1.0, TINY.max_position_embeddings))
    before, after = (rope_frequencies(model.rope, model.head_dim) for model in (UNSCALED, back))
    assert np.array_equal(before, after)


def test_int4_import_keeps_the_codes_along_the_input_and_tells_what_experts_lose(int4):
    _, run, report = int4
    assert from_dict(RunConfig, json.loads((run / "config.json").read_text())).quant == QuantConfig(32)
    moved = report["requantization"]["tensors"]
    experts = [name for name in moved if ".experts." in name]
    assert len(experts) == 2 * TINY.num_layers and all(0.04 < moved[n]["relative_rms"] < 0.15 for n in experts)
    # What lies along the input moves by the rounding of its scales, unless a group does not reach the grid's end.
    assert all(moved[name]["relative_rms"] < 0.02 for name in moved if name not in experts)
    assert json.loads((run / "import.json").read_text())["requantization"] == report["requantization"]
    assert 0 < report["requantization"]["relative_rms"] < 0.15


def test_the_loss_that_is_told_is_what_the_grid_does_to_the_weights_of_the_folder(int4):
    published, _, report = int4
    moved, files = report["requantization"]["tensors"], Folder(published)
    for tensor in keymap.hf_tensors(TINY):
        if tensor.row.in_out:
            said = Int4(unpack_nibbles(files.read(tensor.codes)), files.read(tensor.scales)).dequantize()
            lost = np.linalg.norm(on_grid(said, -2, 32) - said) / np.linalg.norm(said)
            assert moved[tensor.name]["relative_rms"] == pytest.approx(lost, rel=1e-4)


def test_a_run_trained_here_says_what_each_layout_costs(tmp_path):
    run = write_run(tmp_path / "run", TINY, random_parameters(TINY), QuantConfig())
    with pytest.raises(Exception, match=r"experts\.gate_up_proj by \d+\.\d% .*--allow-requantization"):
        export_folder(run, tmp_path / "int4", kind="int4-g32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    report = export_folder(run, tmp_path / "int4", kind="int4-g32", allow_requantization=True)
    assert all(".experts." in name for name in report["requantization"]["tensors"])
    assert all("norm" in name or "bias" in name for name in report["rounding"]["tensors"])


@pytest.mark.parametrize(("config", "group"), [(TINY, 32), (WIDE, 64)], ids=["32", "64"])
def test_an_int4_folder_of_a_run_trained_here_holds_what_was_trained(config, group, tmp_path):
    run = write_run(tmp_path / "run", config, (trained := random_parameters(config)), QuantConfig(group))
    export_folder(run, tmp_path / "int4", kind="int4-g32", allow_requantization=True)
    experts = Int4.from_float(on_grid(trained["layers/ffn/experts/down"][1], -2, group), 32)
    folder, layer = Folder(tmp_path / "int4"), "model.layers.1."
    held = [(experts, "feed_forward.experts.down_qweight", "feed_forward.experts.down_scale")]
    for part in "qo":  # a row of o has several groups of either width
        linear = Int4.from_float(np.ascontiguousarray(trained[f"layers/attention/{part}/kernel"][1].T), group)
        linear = Int4(linear.codes, np.repeat(linear.scales, group // 32, axis=-1))
        held.append((linear, f"self_attn.{part}_proj.qweight", f"self_attn.{part}_proj.weight_scale"))
    for weight, codes, scales in held:
        assert np.array_equal(unpack_nibbles(folder.read(layer + codes)), weight.codes)
        assert np.array_equal(folder.read(layer + scales), weight.scales)


def test_the_checkpoint_of_the_step_that_is_named_is_written(tmp_path):
    run = write_run(tmp_path / "run", TINY, random_parameters(TINY), None, random_parameters(TINY, 1))
    for step in (1, 2):
        export_folder(run, tmp_path / str(step), step=step)
        want = random_parameters(TINY, step - 1)["embed/embedding"].astype(DTYPES["BF16"])
        assert Folder(tmp_path / str(step)).read("model.embed_tokens.weight").tobytes() == want.tobytes()


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["published", "without norms and scaling"])
def test_transformers_computes_what_jax_computes(kind, config, tmp_path):
    published = write_published(tmp_path / "published", config, int4=kind == "int4", full=True)
    model = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True, dtype=torch.float32)
    with torch.inference_mode():
        got = model(torch.tensor([IDS])).logits[0].numpy()
    want = Generator(config, as_published(published, kind == "int4")).logits(IDS)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_transformers_misses_no_weight_of_a_model_without_a_shared_expert(tmp_path):
    config = dataclasses.replace(TINY, moe=dataclasses.replace(ROUTED, shared_expert_width=0))
    run = write_run(tmp_path / "run", config, random_parameters(config))
    export_folder(run, tmp_path / "hf")
    options = {"trust_remote_code": True, "dtype": torch.float32, "output_loading_info": True}
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.inference_mode():
        got = model(torch.tensor([IDS])).logits[0].numpy()
    parameters = {k: v.astype(DTYPES["BF16"]).astype(np.float32) for k, v in random_parameters(config).items()}
    want = Generator(config, parameters).logits(IDS)
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()


def as_published(folder, int4) -> dict[str, np.ndarray]:
    """The JAX parameters that a folder says, straight from its tensors."""
    files, layers = Folder(folder), {}
    for tensor in keymap.hf_tensors(TINY):
        if int4 and tensor.row.int4:
            codes = unpack_nibbles(files.read(tensor.codes))
            value = Int4(codes, files.read(tensor.scales)).dequantize()
        else:
            value = files.read(tensor.name).astype(np.float32)
        layers.setdefault((tensor.row, tensor.layer), []).append(value)
    found: dict[str, list[np.ndarray]] = {}
    for (row, _), parts in layers.items():
        found.setdefault(row.jax, []).append(keymap.from_hf(row, parts))
    return {row.jax: np.stack(found[row.jax]) if row.stacked else found[row.jax][0] for row in keymap.rows(TINY)}


def test_transformers_tells_the_loss_of_the_next_token_and_the_last_logits_alone(bf16):
    model = AutoModelForCausalLM.from_pretrained(bf16[0], trust_remote_code=True, dtype=torch.float32)
    ids = torch.tensor([IDS[:20]])
    with torch.inference_mode():
        whole, last = model(ids, labels=ids), model(ids, logits_to_keep=3).logits
    want = -whole.logits[0].log_softmax(-1)[torch.arange(19), ids[0, 1:]].mean()
    torch.testing.assert_close(whole.loss, want)
    torch.testing.assert_close(last, whole.logits[:, -3:])


def test_routers_and_scales_are_not_rounded_where_a_folder_is_loaded_as_bfloat16(int4):
    published, _, _ = int4
    model = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True, dtype=torch.bfloat16)
    held, files = model.state_dict(), Folder(published)
    exact = [name for name in held if name.endswith(("router.weight", "expert_bias", "_scale"))]
    for name in exact:
        assert held[name].dtype == torch.float32
        assert np.array_equal(held[name].numpy(), files.read(name).astype(np.float32))
    assert len(exact) == 1 + TINY.num_layers * 11  # q, k, v, o, three of the shared expert, two of the routed
    assert held["model.norm.weight"].dtype == torch.bfloat16


def test_transformers_generates_with_its_cache_and_pads_on_the_left(bf16):
    published, _ = bf16
    model = AutoModelForCausalLM.from_pretrained(published, trust_remote_code=True, dtype=torch.float32)
    want = Generator(TINY, as_published(published, False)).generate(IDS[:20], 8)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    # The ends of an answer are kept from being chosen by `min_new_tokens`, in JAX they never were.
    assert not {2, 5} & set(want)
    assert model.generate(torch.tensor([IDS[:20]]), **options)[0, 20:].tolist() == want
    padded = torch.tensor([[0] * 5 + IDS[:20], IDS[20:45]])
    mask = (torch.arange(25) >= torch.tensor([[5], [0]])).long()
    assert model.generate(padded, attention_mask=mask, **options)[0, 25:].tolist() == want


def test_the_tokenizer_cuts_and_frames_as_training_did(bf16, tmp_path):
    _, run = bf16
    export_folder(run, tmp_path / "folder")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "folder", trust_remote_code=True), tiny_tokenizer()
    assert theirs is not None
    text = "def add(x): # 'tis  é 漢字 , and 12345 \n\n"
    assert theirs.encode(text) == [ours.bos, *ours.encode(text)]
    assert theirs.decode(ours.encode(text)) == text
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yes"}]
    framed = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert framed == render_text(messages, True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eot, ours.pad)


@pytest.mark.parametrize("kind", ["bf16", "int4-g32"])
def test_the_small_files_say_where_text_begins_and_ends(bf16, tmp_path, kind):
    _, run = bf16
    export_folder(run, tmp_path / "folder", kind=kind, quantize_float=True, allow_requantization=True)
    names = ("config", "generation_config", "tokenizer_config")
    told = {name: json.loads((tmp_path / "folder" / f"{name}.json").read_text()) for name in names}
    tokenizer = tiny_tokenizer()
    ends = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": [tokenizer.end, tokenizer.eot],
        "pad_token_id": tokenizer.pad,
    }
    assert len({tokenizer.bos, tokenizer.end, tokenizer.eot, tokenizer.pad}) == 4
    for name in ("config", "generation_config"):
        assert {key: told[name][key] for key in ends} == ends
    assert told["tokenizer_config"]["model_max_length"] == TINY.max_position_embeddings
    assert ("quantization" in told["config"]) == (kind != "bf16")


def test_shards_are_read_like_one_file(tmp_path, monkeypatch):
    published = write_published(tmp_path / "one", TINY, int4=False)
    monkeypatch.setattr("conversion.hf_files.SHARD_BYTES", 50_000)
    parted = write_published(tmp_path / "parts", TINY, int4=False)
    assert len(list(parted.glob("model-0*.safetensors"))) > 2
    assert same_tensors(published, parted)
    model = AutoModelForCausalLM.from_pretrained(parted, trust_remote_code=True)
    assert model.model.layers[1].feed_forward.router.weight.dtype == torch.float32


def test_the_same_run_gives_the_same_bytes(bf16, tmp_path):
    for name in "ab":
        export_folder(bf16[1], tmp_path / name)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in "ab"]
    assert files[0] == files[1]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files[0])
    assert set(DTYPES) == {"BF16", "F16", "F32", "U8"}


def test_both_commands_say_what_they_did(bf16, tmp_path, capsys):
    published, run = bf16
    assert main(["export-hf", str(run), str(tmp_path / "f"), "--json", str(tmp_path / "e.json")]) == 0
    assert main(["import", str(tmp_path / "f"), str(tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "as bf16" in out and "requantization: nothing moved" in out
    assert json.loads((tmp_path / "e.json").read_text())["format"] == "bf16"
    dense = write_run(tmp_path / "dense", TINY_DENSE, random_parameters(TINY_DENSE))
    assert main(["export-hf", str(dense), str(tmp_path / "d")]) == 2
    assert main(["export-hf", str(run), str(published)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "no dense model" in errors[0] and "exists; name another folder" in errors[1]


@pytest.mark.parametrize("command", ["export-hf", "import", "gguf"])
def test_an_output_below_a_file_is_one_sentence_and_leaves_nothing(bf16, tmp_path, capsys, command):
    published, run = bf16
    (tmp_path / "file").write_text("mine")
    words = {"export-hf": [run, "out"], "import": [published, "run"], "gguf": [run, "m.gguf", "--quantize-float"]}
    source, name, *more = words[command]
    assert main([command, str(source), str(tmp_path / "file" / name), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"error: {tmp_path}/file: File exists; name another place"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_an_imported_run_that_is_resumed_says_how_it_goes_on(bf16):
    state = abstract_state(RunConfig("qat", TINY, data=DataConfig(seq_len=64)), single_device_mesh())
    with pytest.raises(
        UserError, match=r"^checkpoint \S+ holds parameters only: name its run in init_from of a new one$"
    ):
        Checkpoints(bf16[1]).restore_latest(state)


def test_training_goes_on_from_an_imported_folder(bf16, tmp_path):
    _, run = bf16
    (tmp_path / "text.txt").write_text("def add(first, second):\n    return first + second\n" * 200)
    source = (SourceConfig(str(tmp_path / "text.txt")),)
    tokenizer, cache = str(run / "tokenizer.json"), str(tmp_path / "cache")
    data = DataConfig(source, source, tokenizer, seq_len=64, global_batch_size=2, cache_dir=cache)
    schedule = OptimizerConfig(learning_rate=1e-9, schedule="constant", weight_decay=0.0)
    options = {"compute_dtype": "float32", "remat": "nothing", "init_from": str(run)}
    cfg = RunConfig("qat", TINY, QuantConfig(), data, schedule, steps=1, **options)
    fit(cfg, tmp_path / "next", jax.devices()[:1])
    before, after = (load_parameters(folder)[1] for folder in (run, tmp_path / "next"))
    for path, value in before.items():
        moved = np.abs(after[path] - value).max()
        assert moved <= (2e-3 if path.endswith("router/bias") else 1e-6), path
