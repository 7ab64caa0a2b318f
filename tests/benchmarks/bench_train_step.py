"""One training step on CPU against the same architecture in PyTorch: `transformers`' Qwen3-MoE classes.

    python -m tests.benchmarks.bench_train_step [--threads 2] [--rounds 9] [--json PATH]

Both sides train the same weights on the same tokens in float32 without recomputation: forward, backward,
clipping to the global norm, AdamW (PyTorch's fused one). The turns are interleaved in one process on
`--threads` cores, and the ratio is to the fastest of PyTorch's forms. `batched_mm`, which gathers a weight
matrix per routed row, is left out: it would need 6 GB a layer here. Processor seconds well above a free
machine's, or below its share of the wall time, say that others use these cores: OpenMP's barriers then spin,
PyTorch takes ten times as long, and the ratio means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from moe_jax.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig, RopeConfig, RunConfig
from moe_jax.parallel.batches import put_batch
from moe_jax.parallel.mesh import make_mesh
from moe_jax.paths import flatten_paths
from moe_jax.train.state import TrainState, init_state
from moe_jax.train.step import make_train_step

# MobileMoE's proportions at a third of its width, and what Qwen3-MoE has not switched off.
MODEL = ModelConfig(
    num_layers=4,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,
    max_position_embeddings=512,
    rope=RopeConfig(factor=1.0),
    moe=MoEConfig(
        num_experts=16,
        num_experts_per_tok=4,
        expert_width=128,
        shared_expert_width=0,
        score_func="softmax",
        routed_scaling_factor=1.0,
        use_expert_bias=False,
        router_z_loss=0.0,
    ),
)
CONFIG = RunConfig(
    model=MODEL,
    data=DataConfig(seq_len=512, global_batch_size=8),
    optimizer=OptimizerConfig(schedule="constant"),
    mesh=MeshConfig(data=1, fsdp=1, expert=1),
    compute_dtype="float32",
    remat="nothing",
)
Turn = Callable[[], tuple[float, float]]  # one step: (loss in nats, norm of the gradient)


def our_turn(state: TrainState, tokens_BS: np.ndarray) -> Turn:
    """Steps of `make_train_step` on one packed batch of whole-row documents."""
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:1])
    step = make_train_step(CONFIG, mesh)
    mask = np.ones(tokens_BS.shape, np.float32)
    mask[:, -1] = 0
    batch = {
        "tokens": tokens_BS,
        "targets": np.roll(tokens_BS, -1, axis=1),
        "segment_ids": np.ones_like(tokens_BS),
        "positions": np.broadcast_to(np.arange(tokens_BS.shape[1], dtype=np.int32), tokens_BS.shape),
        "loss_mask": mask,
    }
    held, placed = [state], put_batch(batch, mesh)

    def turn() -> tuple[float, float]:
        held[0], metrics = jax.block_until_ready(step(held[0], placed))
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return turn


def torch_model(weights: dict[str, np.ndarray], experts: str) -> torch.nn.Module:
    """Qwen3MoeForCausalLM with our weights; `experts` is one of `transformers`' implementations."""
    moe = MODEL.moe
    assert moe is not None
    options: dict[str, Any] = {
        "vocab_size": MODEL.vocab_size,
        "hidden_size": MODEL.d_model,
        "num_hidden_layers": MODEL.num_layers,
        "num_attention_heads": MODEL.num_heads,
        "num_key_value_heads": MODEL.num_kv_heads,
        "head_dim": MODEL.head_dim,
        "max_position_embeddings": MODEL.max_position_embeddings,
        "rms_norm_eps": MODEL.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": MODEL.rope.theta},
        "tie_word_embeddings": True,
        "use_cache": False,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.expert_width,
        "norm_topk_prob": moe.norm_topk_prob,
        "attn_implementation": "sdpa",
        "experts_implementation": experts,
    }
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**options))
    names = {
        "input_layernorm": "attention_norm/scale",
        "self_attn.q_proj": "attention/q/kernel",
        "self_attn.k_proj": "attention/k/kernel",
        "self_attn.v_proj": "attention/v/kernel",
        "self_attn.o_proj": "attention/o/kernel",
        "post_attention_layernorm": "ffn_norm/scale",
        "mlp.gate": "ffn/router/kernel",
        "mlp.experts.gate_up_proj": "ffn/experts/gate_up",
        "mlp.experts.down_proj": "ffn/experts/down",
    }
    state = {
        "model.embed_tokens.weight": weights["embed/embedding"],
        "model.norm.weight": weights["final_norm/scale"],
    }
    for layer in range(MODEL.num_layers):
        for theirs, ours in names.items():
            w = weights[f"layers/{ours}"][layer]
            if theirs in ("self_attn.q_proj", "self_attn.k_proj"):
                # We rotate adjacent pairs of a head, Qwen one half against the other.
                halves = w.reshape(MODEL.d_model, -1, MODEL.head_dim // 2, 2).swapaxes(2, 3)
                w = halves.reshape(w.shape)
            suffix = "" if ".experts." in theirs else ".weight"
            state[f"model.layers.{layer}.{theirs}{suffix}"] = w.swapaxes(-1, -2) if w.ndim > 1 else w
    missing, unexpected = model.load_state_dict({k: torch.tensor(v.copy()) for k, v in state.items()}, strict=False)
    left_out = [name for name in missing if "_norm." not in name and name != "lm_head.weight"]
    assert not unexpected and not left_out, (unexpected, left_out)
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.requires_grad_(False)  # ones: our norm of queries and keys has no weights
    return model


def torch_turn(model: torch.nn.Module, tokens_BS: np.ndarray, compiled: bool) -> Turn:
    """Steps of the usual PyTorch loop on the same batch."""
    cfg = CONFIG.optimizer
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if "norm" not in name], "weight_decay": cfg.weight_decay},
        {"params": [p for name, p in trained if "norm" in name], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, cfg.learning_rate, (cfg.b1, cfg.b2), cfg.eps, fused=True)
    tokens = torch.from_numpy(tokens_BS.astype(np.int64))
    model.train()
    call = torch.compile(model) if compiled else model

    def turn() -> tuple[float, float]:
        loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], cfg.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), norm.item()

    return turn


def relative(a: float, b: float) -> float:
    """Difference over the second."""
    return abs(a - b) / abs(b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--experts", nargs="+", default=["grouped_mm", "eager"], help="transformers' forms")
    parser.add_argument("--compile", action="store_true", help="add torch.compile of each form")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # XLA takes a thread per core it may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)

    rng = np.random.default_rng(0)
    shape = (CONFIG.data.global_batch_size, CONFIG.data.seq_len)
    tokens = rng.integers(0, MODEL.vocab_size, shape, np.int32)
    state = init_state(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:1]))
    weights = {path: np.array(leaf) for path, leaf in flatten_paths(state.params).items()}
    parameters = sum(w.size for w in weights.values())
    turns = {"moe_jax": our_turn(state, tokens)}
    for experts in args.experts:
        for compiled in (False, True) if args.compile else (False,):
            model = torch_model(weights, experts)
            trained, fixed = (
                sum(p.numel() for p in model.parameters() if p.requires_grad is wanted) for wanted in (True, False)
            )
            print(f"parameters: ours {parameters}, PyTorch's {trained} and {fixed} ones in query and key norms")
            assert trained == parameters, "the two sides train different numbers of weights"
            turns[f"torch {experts}{' compiled' if compiled else ''}"] = torch_turn(model, tokens, compiled)

    results: dict[str, Any] = {
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "threads": args.threads,
        "parameters": parameters,
        "tokens": tokens.size,
    }
    print(", ".join(f"{name} {version}" for name, version in results["versions"].items()))
    print(f"{args.threads} threads, {tokens.size} tokens a step")
    first = {name: turn() for name, turn in turns.items()}  # which also compiles
    for name, (loss, norm) in first.items():
        worst = max(relative(loss, first["moe_jax"][0]), relative(norm, first["moe_jax"][1]))
        print(f"{name:26s} first loss {loss:.6f}, gradient norm {norm:.6f}")
        assert worst < 1e-4, f"{name} computes something else"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    last = first
    for i in range(args.rounds + 1):
        for name, turn in turns.items():
            time.sleep(0.02)  # the other side's idle threads spin a little before they sleep
            start = time.perf_counter(), time.process_time()
            last[name] = turn()
            if i:
                times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for name, series in times.items():
        wall, processor = (statistics.median(column) for column in zip(*series, strict=True))
        least = min(series)[0]
        results[name] = {
            "median_s": wall,
            "least_s": least,
            "processor_s": processor,
            "tokens_per_s": tokens.size / wall,
        }
        print(
            f"{name:26s} median {wall:6.3f} s, least {least:6.3f} s, processor {processor:6.3f} s,"
            f" {tokens.size / wall:6.0f} tokens/s, loss {last[name][0]:.4f} after {args.rounds + 2} steps"
        )
    ours = results["moe_jax"]
    fastest = min((results[name] for name in turns if name != "moe_jax"), key=lambda r: r["median_s"])
    for which in ("median", "least"):
        results[f"{which}_ratio"] = fastest[f"{which}_s"] / ours[f"{which}_s"]
        print(
            f"moe_jax over the fastest PyTorch form, tokens per second by {which}: {results[f'{which}_ratio']:.2f}x"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
