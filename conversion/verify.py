"""The parity ladder from a QAT checkpoint to the bundle in the stock engine, rung by rung, with bounds.

Two programs that sum floats in another order differ in the last bit; rounding activations to INT8 turns that
into a whole step now and then, and a tie between experts into another expert. So rungs that compare arithmetic
switch INT8 off or judge medians, and rung 4 judges what a user sees: likelihoods and choices of the real engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conversion import MASKED, heldout, keymap, readback
from conversion.arm import machine as machines
from conversion.arm.engine import RemoteEngine
from conversion.checkpoint import open_checkpoint
from conversion.kernel import register
from conversion.litert.container import intact
from conversion.litert.engine import Engine
from conversion.readback import Findings
from conversion.torch_model import MobileMoE, Reference
from conversion.weights import Weights, from_parameters
from moe_jax.config import ModelConfig, QuantConfig
from moe_jax.data import chat
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.model.describe import describe
from moe_jax.ops import fake_quant

Parameters = Mapping[str, np.ndarray]
# Figure -> (least, most) allowed.
BOUNDS: dict[str, tuple[float, float]] = {
    "jax_torch_max_abs": (0, 1e-4),
    "torch_tflite_median_abs": (0, 1e-2),
    **{f"{engine}_nll_diff_nats": (0, 0.02) for engine in ("engine", "arm")},
    **{f"{engine}_top1_agreement": (0.98, 1) for engine in ("engine", "arm")},
    "chat_start_tokens": (1, 1),
    "chat_wrong_ids": (0, 0),
}
_TIE = 2e-6  # scores of experts closer than this may come in either order
_QUESTION = "What does `os.getcwd` do?"


def verify(
    run_dir: str | Path,
    bundle: str | Path,
    *,
    step: int | None = None,
    tokenizer: str | Path | None = None,
    quantize_float: bool = False,
    texts: int = 16,
    tokens: int = 128,
    probes: int = 16,
    threads: int = 2,
    arm: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Climb all rungs; {"export": ..., "parity": ..., "failed": ..., "left_out": ...}: a sentence for each broken
    promise, and for each rung that the bundle has no room for.

    The engine reads `texts` held-out pieces of `tokens` tokens and is asked for its next token at `probes` places
    of each; with `arm`, so is its Arm build on that processor of QEMU's. A file without the checkpoint's weights or
    tokenizer ends the climb. Raises UserError for what cannot be read.
    """
    from moe_jax.generate import Generator

    machine = machines.arm(arm) if arm else None
    checkpoint = open_checkpoint(run_dir, step, tokenizer)
    run, tokens_of, parameters = checkpoint.run, checkpoint.tokenizer, checkpoint.arrays()
    source = from_parameters(parameters, run.model, checkpoint.group(quantize_float))
    parts = readback.sections(bundle)
    say("rung 1: codes and scales of the file against the checkpoint")
    found = codes_and_scales(parts.tflite, run.model, parameters, source.group, bundle)
    experts = [name for name in source.int4_names() if ".experts." in name]
    nameless = [label for name in experts for label in readback.labels(name, source.shape(name))]
    if nameless and found.codes_checked and found.missing == nameless:  # and all else is there
        raise UserError(
            f"{bundle} has experts without names (--experts dense), only to compare speed; verify another"
        )
    result: dict[str, Any] = {
        "export": {
            "codes_checked": found.codes_checked,
            "scales_checked": found.scales_checked,
            "mismatches": found.mismatches,
        },
        "parity": {},
        "failed": [f"rung 1 (codes and scales): {report}" for report in found.reports],
        "left_out": [],
    }
    if parts.tokenizer.fingerprint != tokens_of.fingerprint:
        result["failed"].append("rung 5 (chat): the tokenizer in the bundle is not the run's")
    if result["failed"]:
        return result
    context = parts.metadata.max_num_tokens
    if context < 3:
        longer = run.model.max_position_embeddings >= 3
        mend = "export it with a larger --context" if longer else "its model has no more, and cannot be verified"
        raise UserError(f"{bundle} has room for {context} tokens; {mend}")
    tokens = min(tokens, context - 2)
    pieces = heldout.pieces(run.data.heldout, tokens_of, texts, tokens)
    parity = result["parity"]
    say("rung 2: JAX against PyTorch")
    parity |= jax_torch(parameters, source, [tokens_of.bos, *pieces[0]])
    say("rung 3: PyTorch against the .tflite through XNNPACK")
    parity |= torch_tflite(source, parts.tflite, [tokens_of.bos, *pieces[0]], threads, path=bundle)
    say(f"rung 4: the engine against JAX on {len(pieces)} held-out pieces of {tokens} tokens")
    # Any engine rounds activations to INT8, whatever the run was trained with.
    generator = Generator(run.model, dict(parameters), QuantConfig(source.group))
    with Engine(bundle, threads, measured=True) as engine:
        parity |= engine_jax(engine, generator, tokens_of, pieces, probes)
        if machine:
            say(f"rung 4 again: the engine's Arm build on an emulated {arm}")
            with RemoteEngine(bundle, engine, machine, threads) as remote:
                parity |= engine_jax(remote, generator, tokens_of, pieces, probes, "arm")
        if (needed := len(_question(tokens_of))) >= context:
            left_out = f"rung 5 (chat): its question takes {needed} tokens, and the bundle has room for {context}"
            result["left_out"].append(left_out)
        else:
            say("rung 5: the chat template")
            parity |= chat_template(engine, tokens_of)
    result["failed"] += broken(parity)
    return result


def codes_and_scales(
    tflite: memoryview, config: ModelConfig, parameters: Parameters, group: int, path: str | Path = "the .tflite"
) -> Findings:
    """Rung 1: what the file holds against the grid applied to the float32 master weights, in JAX's own layout."""
    codes, scales = {}, {}
    quantised = 0
    for name, leaf in describe(config).items():
        value = np.asarray(parameters[name], np.float32)
        if (axis := leaf.quant_axis) is None:
            codes[name] = scales[name] = value
            continue
        quantised += value.size
        found = fake_quant.int4_scales(value, axis, group)
        codes[name] = fake_quant.int4_codes(value, found, axis, group)
        # Spread to the shape of the weight, so that the key map lays both out alike.
        scales[name] = np.repeat(found.astype(np.float16), group, axis)
    pairs = zip(keymap.to_torch(codes, config), keymap.to_torch(scales, config), strict=True)
    expected = {
        tensor.name: (code.astype(np.int8), scale[..., ::group].astype(np.float16))
        for (tensor, code), (_, scale) in pairs
        if tensor.int4
    }
    result = readback.compare(tflite, expected, path)
    if (listed := sum(code.size for code, _ in expected.values())) != quantised:
        result.wrong(abs(quantised - listed), f"the key map lists {listed} of {quantised} INT4 weights")
    return result


def jax_torch(parameters: Parameters, source: Weights, ids: Sequence[int]) -> dict[str, float]:
    """Rung 2: logits of one sequence on INT4 weights, activations in float32 (and in INT8, for the record).

    Compared up to the first token whose choice of experts hangs on a difference that float32 sums cannot tell.
    """
    from moe_jax.generate import Generator

    figures: dict[str, float] = {}
    for int8, name in ((False, "jax_torch"), (True, "jax_torch_int8")):
        quant = QuantConfig(source.group, quantize_activations=int8)
        want = Generator(source.config, dict(parameters), quant).logits(ids)
        got, margins = _torch_logits(source, ids, int8)
        close = np.flatnonzero(margins < _TIE)
        count = len(ids) if int8 or not len(close) else max(int(close[0]), 1)
        figures |= _spread(name, np.abs(got - want).max(axis=-1)[:count])
        figures |= {} if int8 else {"jax_torch_tokens": count}
    return figures


def torch_tflite(
    source: Weights,
    tflite: memoryview,
    ids: Sequence[int],
    threads: int = 2,
    steps: int = 16,
    path: str | Path = "the .tflite",
) -> dict[str, float]:
    """Rung 3: logits of `steps` decode calls after one call of the shortest prefill, both with INT8 activations."""
    from ai_edge_litert.interpreter import Interpreter

    delegates = register.delegates(tflite)
    with tempfile.NamedTemporaryFile(suffix=".tflite") as file:
        file.write(tflite)
        file.flush()
        with intact(path):
            runtime = Interpreter(file.name, num_threads=threads, experimental_delegates=delegates)
            first = min(int(name.split("_")[1]) for name in runtime.get_signature_list() if name != "decode")
            decode = runtime.get_signature_runner("decode")
            shapes = {name: d["shape"] for name, d in decode.get_input_details().items()}
        length = shapes.pop("mask")[-1]
        cache = {n: np.zeros(s, np.float32) for n, s in shapes.items() if n.startswith("kv_cache")}
        if first < len(ids):
            prefill = runtime.get_signature_runner(f"prefill_{first}")
            cache = prefill(**_step(ids[:first], 0, length), **cache)
        else:  # shorter than what any prefill takes
            first = 0
        steps = min(steps, len(ids) - first)
        rows = []
        for place in range(first, first + steps):
            cache = decode(**_step(ids[place : place + 1], place, length), **cache)
            rows.append(cache.pop("logits")[0, 0])
    want = _torch_logits(source, ids[: first + steps], True)[0][first:]
    return _spread("torch_tflite", np.abs(np.stack(rows) - want).max(axis=-1))


def engine_jax(
    engine: Engine | RemoteEngine,
    generator: Any,
    tokenizer: Tokenizer,
    pieces: Sequence[Sequence[int]],
    probes: int,
    name: str = "engine",
) -> dict[str, float]:
    """Rung 4: likelihoods of every token and choices at `probes` places of each piece, engine against JAX QAT."""
    ours, theirs, agree, asked = [], [], 0, 0
    for ids in pieces:
        text = tokenizer.decode(ids)
        logits = generator.logits([tokenizer.bos, *ids]).astype(np.float64)
        top = logits.max(axis=-1, keepdims=True)
        rows = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        ours.append(rows[np.arange(len(ids)), list(ids)])
        theirs.append(engine.score(text))
        for place in np.unique(np.linspace(1, len(ids), min(probes, len(ids))).astype(int)):
            prefix, best = (tokenizer.decode(ids[:place]), engine.token_text(int(logits[place].argmax())))
            # Half a character reads as U+FFFD whatever it is: such places tell nothing.
            if "\ufffd" not in prefix + best and tokenizer.encode(prefix) == list(ids[:place]):
                asked += 1
                agree += engine.next_token(prefix) == best
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    figures = {
        "jax_nll_nats": float(-ours.mean()),
        f"{name}_nll_nats": float(-theirs.mean()),
        f"{name}_nll_diff_nats": float(abs((theirs - ours).mean())),
        f"{name}_token_median_abs_nats": float(np.median(np.abs(theirs - ours))),
        f"{name}_token_max_abs_nats": float(np.abs(theirs - ours).max()),
        f"{name}_tokens": len(ours),
        f"{name}_top1_asked": asked,
    }
    return figures | ({f"{name}_top1_agreement": agree / asked} if asked else {})


def chat_template(engine: Engine, tokenizer: Tokenizer) -> dict[str, int]:
    """Rung 5: start tokens before one user message in the engine, and places where its ids are not training's."""
    want = _question(tokenizer)
    rendered, taken = engine.prompt_tokens(_QUESTION)
    # A session puts the start token in front by itself: what it took in beyond the template's own ids.
    starts = taken - len(rendered)
    got = [tokenizer.bos] * starts + rendered
    wrong = sum(a != b for a, b in zip(got, want, strict=False)) + abs(len(got) - len(want))
    return {"chat_start_tokens": starts + rendered.count(tokenizer.bos), "chat_wrong_ids": wrong}


def _question(tokenizer: Tokenizer) -> list[int]:
    """The ids of the question as training frames it."""
    message = [{"role": "user", "content": _QUESTION}]
    return chat.render_ids(message, tokenizer, generation_prompt=True)[0].tolist()


def _torch_logits(source: Weights, ids: Sequence[int], int8: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits [S, V], and [S] by how much the last expert chosen beat the next, the least over all layers."""
    margins = np.full(len(ids), np.inf)

    class Noting(Reference):
        def top_k(self, scores: torch.Tensor, k: int) -> torch.Tensor:
            ranked = scores.sort(descending=True).values.numpy()
            if k < ranked.shape[1]:
                np.minimum(margins, ranked[:, k - 1] - ranked[:, k], out=margins)
            return super().top_k(scores, k)

    model = MobileMoE(source, Noting(source, int8_activations=int8), len(ids))
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)], dtype=torch.int32))[0].numpy()
    return logits, margins


def _step(ids: Sequence[int], start: int, length: int) -> dict[str, np.ndarray]:
    places = np.arange(start, start + len(ids), dtype=np.int32)
    mask = np.where(np.arange(length) <= places[:, None], 0, MASKED).astype(np.float32)[None, None]
    return {"tokens": np.array([ids], np.int32), "input_pos": places, "mask": mask}


def _spread(name: str, difference: np.ndarray) -> dict[str, float]:
    values = {"max": difference.max(), "median": np.median(difference)}
    return {f"{name}_{kind}_abs": float(value) for kind, value in values.items()}


def broken(parity: Mapping[str, float]) -> list[str]:
    """A sentence for each figure out of its bounds; what could not be asked for is not among them."""
    return [
        f"{name} is {parity[name]:.6g}; it must lie within {least:g} and {most:g}"
        for name, (least, most) in BOUNDS.items()
        if name in parity and not least <= parity[name] <= most
    ]
