"""MobileMoE in NumPy, float64, one token and one expert at a time: written from the model's description alone."""

from __future__ import annotations

import math

import numpy as np

from moe_jax.config import ModelConfig


def _rms(x, scale=None):
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return y if scale is None else y * scale


def _activate(name, x):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _rotate(head, position, cfg: ModelConfig):
    out = head.copy()
    for pair in range(cfg.head_dim // 2):
        frequency = cfg.rope.theta ** (-2 * pair / cfg.head_dim)
        if 2 * math.pi / frequency > cfg.rope.original_max_position_embeddings:
            frequency /= cfg.rope.factor
        c, s = math.cos(position * frequency), math.sin(position * frequency)
        a, b = head[2 * pair], head[2 * pair + 1]
        out[2 * pair], out[2 * pair + 1] = a * c - b * s, a * s + b * c
    return out


def route(h, w_router, bias, moe):
    """(ids, weights) of one token."""
    logits = h @ w_router
    if moe.score_func == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    biased = scores + bias if moe.use_expert_bias else scores
    ids = sorted(range(moe.num_experts), key=lambda e: (-biased[e], e))[: moe.num_experts_per_tok]
    weights = scores[ids] / scores[ids].sum() if moe.norm_topk_prob else scores[ids]
    return ids, weights * moe.routed_scaling_factor


def _gated(x, gate, up, down, name):
    return (_activate(name, x @ gate) * (x @ up)) @ down


def logits(parameters: dict[str, np.ndarray], cfg: ModelConfig, ids, positions, segments):
    """[S, V] of one row; `parameters` by path, layers stacked."""
    p = {k: np.asarray(v, np.float64) for k, v in parameters.items()}
    x = p["embed/embedding"][ids]
    heads, kv, width = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    for i in range(cfg.num_layers):
        w = {k.removeprefix("layers/"): v[i] for k, v in p.items() if k.startswith("layers/")}
        h = _rms(x, w["attention_norm/scale"])
        q = (h @ w["attention/q/kernel"]).reshape(-1, heads, width)
        k = (h @ w["attention/k/kernel"]).reshape(-1, kv, width)
        v = (h @ w["attention/v/kernel"]).reshape(-1, kv, width)
        if cfg.qk_norm:
            q, k = _rms(q), _rms(k)
        for t in range(len(ids)):
            for n in range(heads):
                q[t, n] = _rotate(q[t, n], positions[t], cfg)
            for n in range(kv):
                k[t, n] = _rotate(k[t, n], positions[t], cfg)
        mixed = np.zeros((len(ids), heads, width))
        for t in range(len(ids)):
            seen = [u for u in range(t + 1) if segments[u] == segments[t]]
            for n in range(heads):
                group = n // (heads // kv)
                score = np.array([q[t, n] @ k[u, group] for u in seen]) / math.sqrt(width)
                share = np.exp(score - score.max())
                mixed[t, n] = (share / share.sum()) @ v[seen, group]
        x = x + mixed.reshape(len(ids), -1) @ w["attention/o/kernel"]
        h = _rms(x, w["ffn_norm/scale"])
        if cfg.moe is None:
            gate_up = w["ffn/gate_up"]
            x = x + _gated(h, gate_up[:, 0], gate_up[:, 1], w["ffn/down"], cfg.activation)
            continue
        y = np.zeros_like(x)
        for t in range(len(ids)):
            chosen, routing = route(h[t], w["ffn/router/kernel"], w["ffn/router/bias"], cfg.moe)
            for e, m in zip(chosen, routing, strict=True):
                gate, up = np.split(w["ffn/experts/gate_up"][e], 2, axis=-1)
                y[t] += m * _gated(h[t], gate, up, w["ffn/experts/down"][e], cfg.activation)
        if cfg.moe.shared_expert_width:
            gate_up = w["ffn/shared/gate_up"]
            y += _gated(h, gate_up[:, 0], gate_up[:, 1], w["ffn/shared/down"], cfg.activation)
        x = x + y
    return _rms(x, p["final_norm/scale"]) @ p["embed/embedding"].T
