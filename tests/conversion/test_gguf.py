"""GGUF files as the format's own package reads them: every code, what llama.cpp is told, what it cannot be told."""

from __future__ import annotations

import dataclasses
import json

import gguf
import numpy as np
import pytest

from conversion import weights
from conversion.__main__ import main
from conversion.gguf import export_run
from conversion.gguf_file import write_gguf
from conversion.gguf_vocab import vocabulary
from conversion.int4 import Int4
from conversion.weights import Weights
from moe_jax.config import DataConfig, QuantConfig, RunConfig
from moe_jax.data.chat import CHAT_TEMPLATE
from moe_jax.errors import UserError
from tests.conversion.folders import ROUTED, TINY, TINY_DENSE, WIDE, random_parameters, tiny_tokenizer, write_run

MODELS = pytest.mark.parametrize("config", [TINY, TINY_DENSE], ids=["moe", "dense"])


def quantised(config, group=32) -> Weights:
    """Weights of random parameters."""
    return weights.from_parameters(random_parameters(config), config, group)


def read(path) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata, and every tensor in float32 as the format's package dequantises it."""
    file = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in file.tensors}
    return {name: field.contents() for name, field in file.fields.items()}, tensors


@MODELS
@pytest.mark.parametrize("kind", ["q4_0", "f32"])
def test_every_weight_of_the_file_is_the_one_that_was_trained(config, kind, tmp_path):
    source = quantised(config)
    write_gguf(source, tmp_path / "m.gguf", kind=kind)
    _, found = read(tmp_path / "m.gguf")

    def want(name: str) -> np.ndarray:
        return source.int4(name).dequantize()

    layer = "model.layers.1."
    assert np.array_equal(found["token_embd.weight"], want("model.embed_tokens"))
    assert np.array_equal(found["output.weight"], want("model.embed_tokens"))
    assert np.array_equal(found["blk.1.attn_v.weight"], want(layer + "self_attn.v_proj"))
    assert np.array_equal(found["blk.1.attn_output.weight"], want(layer + "self_attn.o_proj"))
    assert np.array_equal(found["blk.1.ffn_norm.weight"], source.float(layer + "post_attention_layernorm.weight"))
    if config.moe is None:
        for part in ("gate", "up", "down"):
            assert np.array_equal(found[f"blk.1.ffn_{part}.weight"], want(layer + f"feed_forward.{part}_proj"))
        return
    routed, width = want(layer + "feed_forward.experts.gate_up_proj"), config.moe.expert_width
    assert np.array_equal(found["blk.1.ffn_gate_exps.weight"], routed[:, :width])
    assert np.array_equal(found["blk.1.ffn_up_exps.weight"], routed[:, width:])
    assert np.array_equal(found["blk.1.ffn_down_exps.weight"], want(layer + "feed_forward.experts.down_proj"))
    assert np.array_equal(found["blk.1.exp_probs_b.bias"], source.float(layer + "feed_forward.expert_bias"))
    assert np.array_equal(found["blk.1.ffn_gate_inp.weight"], source.float(layer + "feed_forward.router.weight"))
    shared = layer + "feed_forward.shared_expert.up_proj"
    assert np.array_equal(found["blk.1.ffn_up_shexp.weight"], want(shared))


def test_rows_of_a_head_are_in_the_order_that_is_rotated_there(tmp_path):
    source = quantised(TINY)
    write_gguf(source, tmp_path / "m.gguf")
    _, found = read(tmp_path / "m.gguf")
    width = TINY.head_dim
    for part, heads in (("q", TINY.num_heads), ("k", TINY.num_kv_heads)):
        want = source.int4(f"model.layers.0.self_attn.{part}_proj").dequantize()
        got = found[f"blk.0.attn_{part}.weight"]
        assert len(got) == heads * width
        for head in range(heads):
            ours, theirs = (rows[head * width : (head + 1) * width] for rows in (want, got))
            assert np.array_equal(theirs[: width // 2], ours[0::2])
            assert np.array_equal(theirs[width // 2 :], ours[1::2])


def test_codes_keep_their_scale_where_groups_are_wider_than_a_block(tmp_path):
    source = quantised(WIDE, group=64)
    write_gguf(source, tmp_path / "m.gguf")
    _, found = read(tmp_path / "m.gguf")
    name = "model.layers.1.feed_forward.experts.down_proj"
    assert np.array_equal(found["blk.1.ffn_down_exps.weight"], source.int4(name).dequantize())
    assert isinstance(source.int4(name), Int4)


UNUSUAL = dataclasses.replace(ROUTED, score_func="softmax", norm_topk_prob=False, routed_scaling_factor=1.5)


@pytest.mark.parametrize("moe", [ROUTED, UNUSUAL, None], ids=["moe", "unusual", "dense"])
def test_llama_cpp_is_told_all_of_the_architecture(moe, tmp_path):
    config = dataclasses.replace(TINY, norm_eps=3e-6, moe=moe)  # no value is a default of llama.cpp or of ours
    write_gguf(quantised(config), tmp_path / "m.gguf")
    fields, found = read(tmp_path / "m.gguf")
    assert (fields["general.architecture"], fields["general.name"]) == ("exaone-moe", "m")
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    want = {
        "vocab_size": 300,
        "context_length": 1024,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 160 if moe else 224,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": np.float32(3e-6),
        "attention.sliding_window": 1024,
        "attention.sliding_window_pattern": [True, True],
        "rope.freq_base": 10_000.0,
        "rope.dimension_count": 16,
        "expert_feed_forward_length": 32 if moe else 224,
        "expert_gating_func": 1 if moe is UNUSUAL else 2,
        "leading_dense_block_count": 0 if moe else 2,
    }
    if moe:
        want |= {
            "expert_count": 5,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_shared_feed_forward_length": 160,
            "expert_weights_norm": moe is ROUTED,
            "expert_weights_scale": 2.5 if moe is ROUTED else 1.5,
        }
    told = {name: value for name, value in fields.items() if name.startswith("exaone-moe.")}
    assert told == {f"exaone-moe.{name}": value for name, value in want.items()}
    factors = found["rope_freqs.weight"]
    assert set(factors.tolist()) == {1.0, 16.0} and (np.diff(factors) >= 0).all()
    for part in "qk":
        assert np.array_equal(found[f"blk.1.attn_{part}_norm.weight"], np.ones(16, np.float32))


@pytest.mark.parametrize(("config", "group"), [(TINY, 32), (WIDE, 64)], ids=["32", "64"])
def test_the_same_weights_give_the_same_bytes_however_they_come(config, group, tmp_path):
    run = write_run(tmp_path / "run", config, random_parameters(config), QuantConfig(group))
    report = export_run(run, tmp_path / "a.gguf")
    write_gguf(quantised(config, group), tmp_path / "b.gguf", run / "tokenizer.json", name="a")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert report["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "run"]


def test_the_checkpoint_of_the_step_that_is_named_is_written(tmp_path):
    run = write_run(tmp_path / "run", TINY, random_parameters(TINY), QuantConfig(), random_parameters(TINY, 1))
    for step in (1, 2):
        export_run(run, tmp_path / f"{step}.gguf", step=step)
        want = weights.from_parameters(random_parameters(TINY, step - 1), TINY).int4("model.embed_tokens")
        assert np.array_equal(read(tmp_path / f"{step}.gguf")[1]["token_embd.weight"], want.dequantize())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"qk_norm": False}, "no QK norm"),
        ({"activation": "gelu_tanh"}, "gelu_tanh"),
        ({"moe": dataclasses.replace(ROUTED, shared_expert_width=0)}, "no shared expert"),
        ({"moe": dataclasses.replace(ROUTED, num_experts=1025)}, "more than 1024 experts"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(change, why, tmp_path):
    with pytest.raises(UserError, match=why):
        write_gguf(quantised(dataclasses.replace(TINY, **change)), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_bias_that_the_model_does_not_use_is_zero_in_the_file(tmp_path):
    unused = dataclasses.replace(TINY, moe=dataclasses.replace(ROUTED, use_expert_bias=False))
    for config in (TINY, unused):
        write_gguf(quantised(config), tmp_path / "m.gguf")
        found = read(tmp_path / "m.gguf")[1]["blk.0.exp_probs_b.bias"]
        assert found.any() == (config is TINY)


def test_what_llama_cpp_cannot_compute_is_refused_before_any_weight_is_read(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, qk_norm=False)
    run = write_run(tmp_path / "run", config, random_parameters(TINY), QuantConfig())
    monkeypatch.setattr("conversion.weights.quantised", None)
    with pytest.raises(UserError, match="no QK norm"):
        export_run(run, tmp_path / "m.gguf")


def test_a_tokenizer_file_of_an_older_version_is_read_with_its_defaults(tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    want = vocabulary(tmp_path / "tokenizer.json", TINY.vocab_size)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["ignore_merges"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary(tmp_path / "tokenizer.json", TINY.vocab_size) == want


def test_the_tokenizer_goes_along_with_its_kinds_ends_and_template(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    words = vocabulary(tmp_path / "tokenizer.json", TINY.vocab_size)
    tokens, kinds = words["tokenizer.ggml.tokens"], words["tokenizer.ggml.token_type"]
    assert [tokens[i] for i in range(270)] == [tokenizer.token(i) for i in range(270)]
    assert len(tokens) == len(set(tokens)) == TINY.vocab_size and set(kinds[270:]) == {5}
    assert kinds[:6] == [3] * 6 and set(kinds[6:270]) == {1}
    assert words["tokenizer.ggml.pre"] == "smaug-bpe" and words["tokenizer.ggml.model"] == "gpt2"
    special = {"bos": tokenizer.bos, "eos": tokenizer.end, "eot": tokenizer.eot, "padding": tokenizer.pad}
    assert {name: words[f"tokenizer.ggml.{name}_token_id"] for name in special} == special
    assert len(set(special.values())) == 4
    assert words["tokenizer.ggml.add_bos_token"] is True and words["tokenizer.ggml.add_eos_token"] is False
    assert words["tokenizer.chat_template"] == CHAT_TEMPLATE
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert vocabulary(tmp_path / "tokenizer.json", 300)["tokenizer.ggml.pre"] == "llama-bpe"


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("normalizer", {"type": "NFC"}, "normalises"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": r"\s+"}, "rule is another"),
        ("pre_tokenizer.pretokenizers.0.behavior", "MergedWithNext", "rule is another"),
        ("pre_tokenizer.pretokenizers.1.use_regex", True, "one rule into bytes"),
        ("model.dropout", 0.1, "plain BPE"),
        ("model.byte_fallback", True, "plain BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_apply_otherwise_is_refused(part, value, why, tmp_path):
    tiny_tokenizer().save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    *path, last = part.split(".")
    place = content
    for key in path:
        place = place[int(key) if key.isdecimal() else key]
    place[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"cannot cut text .*{why}|does not give back"):
        vocabulary(tmp_path / "tokenizer.json", TINY.vocab_size)


def test_random_weights_of_any_shape_are_written_for_measurements(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "configs.load", lambda name: RunConfig(model={"tiny": TINY}[name], data=DataConfig(seq_len=64))
    )
    for name in "ab":
        assert main(["gguf", "tiny", str(tmp_path / f"{name}.gguf"), "--random-weights", "--seed", "3"]) == 0
    fields, found = read(tmp_path / "a.gguf")
    assert fields["tokenizer.ggml.model"] == "no_vocab"
    want = weights.random(TINY, 3).int4("model.embed_tokens").dequantize()
    assert np.array_equal(found["token_embd.weight"], want)
    assert np.array_equal(read(tmp_path / "b.gguf")[1]["output.weight"], want)
    assert main(["gguf", "tiny", str(tmp_path / "a.gguf" / "m.gguf"), "--random-weights"]) == 2
    assert capsys.readouterr().err.endswith(f"error: {tmp_path}/a.gguf: File exists; name another place\n")


def test_the_command_writes_a_file_and_refuses_in_a_sentence(tmp_path, capsys):
    run = write_run(tmp_path / "run", TINY_DENSE, random_parameters(TINY_DENSE))
    output = str(tmp_path / "m.gguf")
    assert main(["gguf", str(run), output]) == 2
    assert main(["gguf", str(run), output, "--quantize-float", "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["type"] == "q4_0"
    assert main(["gguf", str(run), output, "--quantize-float"]) == 2
    assert main(["gguf", str(run), str(tmp_path / "m.bin"), "--quantize-float"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ["without quantisation" in errors[0], "exists" in errors[1], ".gguf" in errors[2]] == [True] * 3
