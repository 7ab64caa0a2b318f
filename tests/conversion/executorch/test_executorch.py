"""ExecuTorch itself on exported files: its logits are the reference's, and its LLM runner says what they say.

In the Python packages' runtime the experts see activations in float32 (`conversion.executorch.program`), all other
products in INT8 as everywhere, so the reference rounds for those alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from conversion import weights
from conversion.__main__ import main
from conversion.executorch.packing import pack
from conversion.weights import Weights
from moe_jax.config import ModelConfig
from moe_jax.data import corpus
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.train.trainer import fit
from tests.conversion.folders import ROUTED, TINY, TINY_DENSE, WIDE
from tests.conversion.test_packing import random_int4
from tests.conversion.ties import Tied, nearest

pytest.importorskip("executorch", reason="pip install -r requirements/executorch.txt")
import executorch.kernels.quantized  # noqa: F401
from executorch.runtime import Runtime

from conversion.executorch import command, lower, readback

CONTEXT, CLOSE = 48, 1e-5
IDS = np.random.default_rng(3).integers(0, TINY.vocab_size, CONTEXT).tolist()
SOFTMAX = dataclasses.replace(
    TINY, moe=dataclasses.replace(ROUTED, score_func="softmax", use_expert_bias=False, shared_expert_width=0)
)
PLAIN = dataclasses.replace(
    TINY, qk_norm=False, moe=dataclasses.replace(ROUTED, use_expert_bias=False, routed_scaling_factor=1.0)
)
GELU = dataclasses.replace(TINY_DENSE, activation="gelu_tanh")
MODELS = {"moe": TINY, "dense": TINY_DENSE, "softmax": SOFTMAX, "plain": PLAIN, "gelu": GELU}


class Theirs(Tied):
    """The reference as this runtime computes."""

    def rounded(self, x: torch.Tensor, product: str, tokens: torch.Tensor | None = None) -> torch.Tensor:
        return x if ".experts." in product else super().rounded(x, product, tokens)


class File:
    """A .pte file in the stock runtime."""

    def __init__(self, path: Path) -> None:
        self._method = Runtime.get().load_program(str(path)).load_method("forward")

    def next(self, ids: list[int], start: int) -> np.ndarray:
        """Logits [V] of what follows ids from position `start` on."""
        return self._method.execute([torch.tensor([ids]), torch.tensor([start])])[0].numpy()[0]

    def one_by_one(self, ids: list[int]) -> np.ndarray:
        return np.stack([self.next([token], i) for i, token in enumerate(ids)])


@pytest.fixture(scope="module", params=MODELS)
def written(request, tmp_path_factory) -> tuple[ModelConfig, Path]:
    path = tmp_path_factory.mktemp(request.param) / "m.pte"
    config = MODELS[request.param]
    lower.export_pte(weights.random(config), path, CONTEXT, CONTEXT - 1, {})
    return config, path


def test_each_token_has_the_likelihood_that_the_reference_gives_it(written):
    config, path = written
    logits = torch.from_numpy(File(path).one_by_one(IDS))
    got = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()
    want, _ = nearest(weights.random(config), IDS, got, CLOSE, kind=Theirs)
    assert np.abs(got - want).max() < CLOSE


def test_a_prompt_in_one_call_or_in_pieces_is_the_same_as_token_by_token(written):
    _, path = written
    want = File(path).one_by_one(IDS[:24])[-1]
    file = File(path)
    np.testing.assert_allclose(file.next(IDS[:24], 0), want, atol=1e-5)
    file.next(IDS[:9], 0)
    np.testing.assert_allclose(file.next(IDS[9:24], 9), want, atol=1e-5)


def test_every_code_and_scale_reads_back(written):
    config, path = written
    source = weights.random(config)
    found = readback.compare(path, source)
    assert found.mismatches == 0
    assert found.codes_checked == sum(int(np.prod(source.shape(name))) for name in source.int4_names())
    assert readback.compare(path, weights.random(config, seed=1)).mismatches > 0.8 * found.codes_checked


def test_a_file_that_was_changed_anywhere_in_its_weights_is_noticed(tmp_path):
    source, path = weights.random(TINY), tmp_path / "m.pte"
    lower.export_pte(source, path, 8, 7, {})
    content, rng = path.read_bytes(), np.random.default_rng(0)
    places = [content.find(weights_of(source, name)[:64].tobytes()) for name in (0, 1)]
    contents = readback.Contents(path)
    (call, *_) = contents.calls("llama::quantized_moe_ffn")
    assert min(places) > 0 and call[3] is not None
    for place in (places[0], places[1], places[1] + 64 + int(rng.integers(0, 1000))):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        assert readback.compare(path, source).mismatches > 0


def weights_of(source: Weights, which: int) -> np.ndarray:
    """Bytes as the file has them: of the embedding's table, of the last layer's experts."""
    if which == 0:
        table = source.packed("model.embed_tokens") ^ 0x88
        return (table >> 4 | table << 4).reshape(-1)
    return pack(source.int4(f"model.layers.{TINY.num_layers - 1}.feed_forward.experts.down_proj")).reshape(-1)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in "ab":
        lower.export_pte(weights.random(WIDE, group=64), tmp_path / name, 8, 7, {"get_max_seq_len": 7})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from([32, 64, 96]), st.sampled_from([32, 64]), st.integers(1, 9), st.data())
def test_the_op_of_the_experts_reads_what_is_packed(experts, width, inner, tokens, data):
    k = data.draw(st.integers(1, experts))
    rng = np.random.default_rng(tokens)
    gate_up, down = random_int4(experts, 2 * inner, width, 32), random_int4(experts, width, inner, 32, seed=1)
    router = rng.standard_normal((experts, width), np.float32)
    bias, x = rng.normal(0, 0.1, experts).astype(np.float32), rng.standard_normal((tokens, width), np.float32)
    arrays = [torch.from_numpy(a) for a in (x, router, bias, pack(gate_up), pack(down))]
    shapes = k, experts, inner, width, 32, 4
    got = torch.ops.llama.quantized_moe_ffn(*arrays, *shapes, "sigmoid", 2.5).numpy()
    scores = 1 / (1 + np.exp(-(x @ router.T)))
    want = np.zeros_like(x)
    for token, (row, score) in enumerate(zip(x, scores, strict=True)):
        chosen = np.argsort(-(score + bias), kind="stable")[:k]
        for expert in chosen:
            gate, up = np.split(gate_up.dequantize()[expert] @ row, 2)
            y = down.dequantize()[expert] @ (gate / (1 + np.exp(-gate)) * up)
            want[token] += 2.5 * score[expert] / score[chosen].sum() * y
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that has learnt a little, with a tokenizer of the embedded corpus."""
    folder = tmp_path_factory.mktemp("trained")
    Tokenizer.train(corpus.stdlib_texts(False), 2048).save(folder / "tokenizer.json")
    cfg = configs.load("demo_pretrain", ["quant=default", "steps=60", "data.max_bytes=500000", "log_every=60"])
    files = {"tokenizer": str(folder / "tokenizer.json"), "cache_dir": str(folder / "cache")}
    data = dataclasses.replace(cfg.data, seq_len=128, global_batch_size=8, **files)
    fit(dataclasses.replace(cfg, data=data), folder / "run", jax.devices()[:1])
    return folder / "run"


def test_the_stock_runner_says_what_the_reference_says(run, tmp_path):
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    path = tmp_path / "m.pte"
    report = tmp_path / "r.json"
    assert main(["executorch", str(run), str(path), "--prefill", "8", "--json", str(report)]) == 0
    figures = json.loads(report.read_text())
    assert figures["mismatches"] == 0 < figures["codes_checked"] and figures["bytes"] == path.stat().st_size
    beside = tmp_path / "m.tokenizer.json"
    tokenizer = Tokenizer.load(beside)
    assert tokenizer.fingerprint == Tokenizer.load(run / "tokenizer.json").fingerprint

    prompt, new = "def add(first, second):\n    return first", 24
    pieces: list[str] = []
    runner = TextLLMRunner(str(path), str(beside))
    greedy = GenerationConfig(echo=False, max_new_tokens=new, temperature=0.0, num_bos=1)
    runner.generate(prompt, greedy, pieces.append)

    file, ids = File(path), [tokenizer.bos, *tokenizer.encode(prompt)]
    assert len(ids) > 8  # so that the runner cuts the prompt
    logits = [file.next(ids[start : start + 8], start) for start in range(0, len(ids), 8)][-1]
    said: list[int] = []
    for _ in range(new):
        said.append(int(logits.argmax()))
        if said[-1] in (tokenizer.end, tokenizer.eot):
            break
        logits = file.next(said[-1:], len(ids) + len(said) - 1)
    assert "".join(pieces) == tokenizer.decode(said)


def test_text_is_cut_into_the_same_tokens(run):
    from pytorch_tokenizers import CppHFTokenizer

    theirs, ours = CppHFTokenizer(), Tokenizer.load(run / "tokenizer.json")
    theirs.load(str(run / "tokenizer.json"))
    texts = list(corpus.stdlib_texts(True))[:20]
    texts += ["", " ", "\n\n\n", "\t x  \n y ", "it's I'LL we'Ve 1234567", "漢字かな 🙂👍🏽 é é", "a\u00a0b\u2003c"]
    for text in texts:
        assert theirs.encode(text, 1, 0) == [ours.bos, *ours.encode(text)], text[:80]


@pytest.mark.parametrize(
    ("moe", "activation", "words"),
    [
        ({"norm_topk_prob": False}, "silu", "norm_topk_prob=false"),
        ({"score_func": "softmax"}, "silu", "expert bias"),
        ({}, "gelu_tanh", "silu"),
    ],
)
def test_a_model_that_its_experts_do_not_know_is_refused(moe, activation, words, tmp_path):
    config = dataclasses.replace(TINY, activation=activation, moe=dataclasses.replace(ROUTED, **moe))
    with pytest.raises(UserError, match=words):
        command.export_random(config, tmp_path / "m.pte")
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_cannot_be_and_existing_files_are_refused(tmp_path):
    for context, prefill, words in ((4096, None, "context 4096"), (8, 9, "--prefill 9")):
        with pytest.raises(UserError, match=words):
            command.export_random(TINY, tmp_path / "m.pte", context=context, prefill=prefill)
    (tmp_path / "m.tokenizer.json").touch()
    with pytest.raises(UserError, match=r"m\.tokenizer\.json exists"):
        command.export_random(TINY, tmp_path / "m.pte")
    assert [path.name for path in tmp_path.iterdir()] == ["m.tokenizer.json"]
