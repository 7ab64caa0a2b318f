"""The parity ladder holds for what was exported, and each injected fault is found and named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as tflite

from conversion import heldout, readback, verify, weights
from conversion.litert import bundle, container
from conversion.weights import Weights
from moe_jax.config import QuantConfig, SourceConfig
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.generate import Generator
from tests.conversion.conftest import CONTEXT, MOE, write_run
from tests.conversion.folders import read_run, share_buffer

KINDS = pytest.mark.parametrize("exported", ["moe"], indirect=True)


def rung_1(run_dir: Path, path: Path) -> readback.Findings:
    run, parameters, source = read_run(run_dir)
    return verify.codes_and_scales(readback.sections(path).tflite, run.model, parameters, source.group)


def damaged(path: Path, folder: Path, content: np.ndarray, byte: int, mask: int) -> Path:
    """A copy of the bundle where one byte of the stored `content` has some bits flipped."""
    raw, wanted = bytearray(path.read_bytes()), np.ascontiguousarray(content).tobytes()
    assert raw.count(wanted) == 1
    raw[raw.index(wanted) + byte] ^= mask
    (folder / "damaged.litertlm").write_bytes(raw)
    return folder / "damaged.litertlm"


def test_every_nibble_and_scale_of_the_file_is_the_checkpoints(run_dir, exported):
    found = rung_1(run_dir, exported.bundle)
    source: Weights = exported.weights
    sizes = [source.int4(name) for name in source.int4_names()]
    assert found.codes_checked == sum(weight.codes.size for weight in sizes)
    assert found.scales_checked == sum(weight.scales.size for weight in sizes)
    assert (found.mismatches, found.reports) == (0, [])


@KINDS
@pytest.mark.parametrize("nibble", [0x01, 0x80], ids=["low", "high"])
def test_one_flipped_nibble_of_one_expert_is_named(run_dir, exported, tmp_path, nibble):
    name = "model.layers.1.feed_forward.experts.down_proj"
    packed = exported.weights.packed(name)[3]
    found = rung_1(run_dir, damaged(exported.bundle, tmp_path, packed, 17, nibble))
    assert found.mismatches == 1
    assert found.reports == [f"{name}[3]: 1 of {packed.size * 2} codes differ"]


@KINDS
def test_one_changed_scale_of_a_fused_weight_is_named(run_dir, exported, tmp_path):
    name = "model.layers.0.self_attn.k_proj"
    scales = exported.weights.scales(name)
    found = rung_1(run_dir, damaged(exported.bundle, tmp_path, scales, 0, 0x08))
    assert found.mismatches == 1
    assert found.reports == [f"{name}: 1 of {scales.size} scales differ"]


@KINDS
def test_a_bundle_of_another_checkpoint_ends_the_climb_at_rung_1(exported, tmp_path):
    fewer = dataclasses.replace(MOE, num_layers=1)
    result = verify.verify(write_run(tmp_path, fewer, exported.tokenizer), exported.bundle)
    assert result["export"]["mismatches"] > 0 and result["parity"] == {}
    assert any("model.layers.1" in s and "no weight of the check" in s for s in result["failed"])


@KINDS
def test_a_bundle_with_another_tokenizer_is_named(run_dir, exported, tmp_path):
    Tokenizer.train(["while True:\n    pass\n" * 2] * 3, 266).save(tmp_path / "other.json")
    bundle.write_bundle(exported.tflite, tmp_path / "other.json", tmp_path / "m.litertlm", CONTEXT)
    result = verify.verify(run_dir, tmp_path / "m.litertlm")
    assert result["failed"] == ["rung 5 (chat): the tokenizer in the bundle is not the run's"]
    assert result["export"]["mismatches"] == 0


@KINDS
def test_a_weight_that_is_not_in_the_file_is_a_mismatch(exported):
    source, name = exported.weights, "model.layers.7.self_attn.o_proj"
    expected = {n: (source.int4(n).codes, source.scales(n)) for n in source.int4_names()}
    expected[name] = expected["model.layers.0.self_attn.o_proj"]
    found = readback.compare(readback.sections(exported.bundle).tflite, expected)
    assert found.mismatches == expected[name][0].size
    assert found.reports == [f"{name} is not in the file"]


@KINDS
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_second_copy_of_a_weight_is_compared_too(exported, part):
    raw, source, found = bytearray(exported.tflite.read_bytes()), exported.weights, {}
    model = tflite.Model.GetRootAs(raw, 0)
    for graph in container.entries(model, "Subgraphs"):
        for tensor in container.entries(graph, "Tensors"):
            if tensor.Type() == tflite.TensorType.INT4:
                held = tensor if part == "codes" else graph.Tensors(readback._blockwise(tensor).Scales())
                found.setdefault(tensor.Name().decode(), []).append(held)
    name, other = (f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1))
    expected = {n: (source.int4(n).codes, source.scales(n)) for n in source.int4_names()}
    assert readback.compare(memoryview(raw), expected).mismatches == 0
    assert len(found[name]) > 1  # of decode and of prefill
    share_buffer(raw, found[name][-1], found[other][0])
    (report,) = readback.compare(memoryview(raw), expected).reports
    assert report.startswith(f"{name}: ") and report.endswith(f"{part} differ")


@KINDS
def test_every_decode_call_that_is_asked_for_is_compared_and_no_more(exported, monkeypatch):
    model, reference = memoryview(exported.tflite.read_bytes()), verify._torch_logits
    for place, seen in ((7, False), (8, True), (11, True), (12, False)):

        def shifted(*args, place=place):
            logits, margins = reference(*args)
            logits[place : place + 1] += 1
            return logits, margins

        monkeypatch.setattr(verify, "_torch_logits", shifted)
        figures = verify.torch_tflite(exported.weights, model, list(range(6, 31)), 1, 4)
        assert (figures["torch_tflite_max_abs"] > 0.9) == seen


@KINDS
def test_the_whole_ladder_holds_for_a_random_model(run_dir, exported):
    result = verify.verify(run_dir, exported.bundle, texts=2, tokens=20, probes=6, threads=1)
    # Random logits lie far apart in arithmetic and close together in rank, so choices may differ at a tie.
    assert [s for s in result["failed"] if "top1" not in s] == []
    parity = result["parity"]
    assert result["export"]["codes_checked"] and parity["engine_tokens"] == 40
    assert parity["jax_torch_max_abs"] < 1e-4 and parity["engine_top1_asked"] >= 4
    assert parity["engine_top1_agreement"] > 0.9
    assert parity["chat_start_tokens"] == 1 and parity["chat_wrong_ids"] == 0


@KINDS
def test_the_engine_is_held_to_int8_activations_whatever_the_run_trained_with(run_dir, exported, tmp_path):
    quant = QuantConfig(quantize_activations=False)
    runs = run_dir, write_run(tmp_path, MOE, exported.tokenizer, quant)
    options = {"texts": 1, "tokens": 8, "probes": 1, "threads": 1}
    one, two = (verify.verify(run, exported.bundle, **options)["parity"] for run in runs)
    assert one["jax_nll_nats"] == two["jax_nll_nats"]


@KINDS
def test_figures_out_of_bounds_are_named(exported):
    good = {name: least for name, (least, _) in verify.BOUNDS.items()}
    assert verify.broken(good) == []
    for name, value in (("engine_nll_diff_nats", 0.03), ("engine_top1_agreement", float("nan"))):
        assert [name in sentence for sentence in verify.broken(good | {name: value})] == [True]


@KINDS
def test_weights_that_compute_something_else_fail_the_rungs_between(run_dir, exported):
    _, parameters, _ = read_run(run_dir)
    other, ids = weights.random(MOE, seed=9), list(range(6, 31))  # as many as above: compiled once
    assert verify.jax_torch(parameters, other, ids)["jax_torch_max_abs"] > 1e-2
    model = readback.sections(exported.bundle).tflite
    assert verify.torch_tflite(other, model, ids, 1, 2)["torch_tflite_median_abs"] > 1e-2
    assert verify.torch_tflite(exported.weights, model, ids[:4], 1)["torch_tflite_median_abs"] < 1e-3


@KINDS
def test_a_bundle_without_room_for_a_piece_of_text_is_named(run_dir, exported, tmp_path):
    with pytest.raises(UserError, match=r"m\.litertlm has room for 2 tokens; export it with a larger --context"):
        verify.verify(run_dir, exported.again(tmp_path, context=2))


@KINDS
def test_a_bundle_too_short_for_a_question_is_not_asked_one(run_dir, exported, tmp_path):
    result = verify.verify(run_dir, exported.again(tmp_path, context=16), texts=1, probes=1, threads=1)
    assert not [sentence for sentence in result["failed"] if "rung 5" in sentence]
    assert result["parity"]["engine_tokens"] == 14 and "chat_wrong_ids" not in result["parity"]
    (sentence,) = result["left_out"]
    assert sentence.startswith("rung 5") and "tokens, and the bundle has room for 16" in sentence


@KINDS
def test_a_bundle_that_only_serves_to_compare_speed_is_not_called_damaged(run_dir, exported, tmp_path):
    if exported.weights.config.moe is not None:
        with pytest.raises(UserError, match=r"has experts without names \(--experts dense\)"):
            verify.verify(run_dir, exported.again(tmp_path, experts="dense"))


@KINDS
def test_a_bundle_whose_tflite_cannot_be_followed_is_named_by_the_ladder(run_dir, exported, tmp_path):
    raw = exported.bundle.read_bytes()
    start = raw.index(exported.tflite.read_bytes())
    (tmp_path / "m.litertlm").write_bytes(raw[:start] + b"\xff" * 4 + raw[start + 4 :])
    with pytest.raises(UserError, match=r"m\.litertlm is damaged \(.+\); export it again"):
        verify.verify(run_dir, tmp_path / "m.litertlm")


@KINDS
def test_a_tflite_that_the_runtime_refuses_is_named(exported):
    raw = bytearray(exported.tflite.read_bytes())
    raw[:64] = bytes(64)
    with pytest.raises(UserError, match=r"m\.litertlm is damaged"):
        verify.torch_tflite(exported.weights, memoryview(raw), [6, 7, 8], 1, path="m.litertlm")


@pytest.mark.parametrize("damage", ["missing", "foreign", "truncated"])
@KINDS
def test_what_is_no_whole_bundle_is_refused_in_words(exported, tmp_path, damage):
    path = tmp_path / "m.litertlm"
    if damage == "foreign":
        path.write_bytes(b"something else entirely")
    elif damage == "truncated":
        path.write_bytes(exported.bundle.read_bytes()[:40_000])
    with pytest.raises(UserError, match=r"cannot read|no \.litertlm bundle|is damaged"):
        readback.sections(path)


@KINDS
def test_pieces_of_held_out_text_encode_to_themselves_and_hold_no_special_token(exported, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("while True:\n    pass  # é漢\n" * 50 + "<|eot|>" + "def add(first):\n" * 200)
    sources = (SourceConfig(str(text)),)
    found = heldout.pieces(sources, exported.tokenizer, 4, 10)
    assert found
    for ids in found:
        written = exported.tokenizer.decode(ids)
        assert len(ids) == 10 and exported.tokenizer.encode(written) == ids and "<|" not in written
    with pytest.raises(UserError, match=r"text\.txt. has no piece of 9999 tokens"):
        heldout.pieces(sources, exported.tokenizer, 4, 9999)
    with pytest.raises(UserError, match="no source"):
        heldout.pieces((), exported.tokenizer, 4, 10)


@KINDS
def test_pieces_come_from_every_document_that_is_long_enough_and_from_conversations(exported, tmp_path):
    long = [f"def name_{i}(first):\n    return {i}\n" * 40 for i in range(3)]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "b", "c", *long)))
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in long]
    chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    for source in (SourceConfig(str(texts)), SourceConfig(str(chats), kind="chat")):
        found = heldout.pieces((source,), exported.tokenizer, 3, 20)
        written = [exported.tokenizer.decode(ids) for ids in found]
        assert ["name_0" in written[0], "name_1" in written[1], "name_2" in written[2]] == [True] * 3
        assert len(heldout.pieces((source,), exported.tokenizer, 5, 20)) == 5  # second pieces after all first ones


@KINDS
def test_no_agreement_is_told_where_no_token_could_be_asked_for(run_dir, exported):
    class Halves:  # an engine whose every token is a part of a character
        def score(self, text):
            return np.zeros(len(exported.tokenizer.encode(text)))

        def token_text(self, token):
            return "\ufffd"

    run, parameters, _ = read_run(run_dir)
    generator = Generator(run.model, parameters, run.quant)
    ids = exported.tokenizer.encode("def add(first")
    parity = verify.engine_jax(cast(Any, Halves()), generator, exported.tokenizer, [ids], 4)
    assert parity["engine_top1_asked"] == 0 and "engine_top1_agreement" not in parity
    assert not any("top1" in sentence for sentence in verify.broken(parity))
