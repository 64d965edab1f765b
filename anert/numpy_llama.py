"""A Llama-style decoder in plain NumPy, float32 throughout: `--engine numpy`, and the oracle of the others.

It shares nothing with them but the checkpoint: no MIL, no fp16, no native code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anert.errors import InputError, StateError

LAYER = ("attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")


class NumpyLlama:
    """RMSNorm, RoPE over adjacent pairs, grouped queries, SwiGLU, as in llama2.c. `model`: its config and parameters.

    Raises InputError for a model with other parameters than llama2.c's.
    """

    def __init__(self, model: Any, tensors: Mapping[str, np.ndarray]) -> None:
        cfg = model.config
        layer = model.layer_params(cfg)
        if set(layer) != set(LAYER) or not hasattr(cfg, "n_heads"):
            raise InputError(
                f"engine numpy runs Llama-style models ({', '.join(LAYER)}), not one with {', '.join(layer)}"
            )
        self.config, self.capacity, self.position = cfg, cfg.seq_len, 0
        self.eps = model.norm_eps
        self.w = {
            name: np.asarray(tensors[name], np.float32).reshape(spec.shape) for name, spec in model.specs().items()
        }
        self.head_dim = self.w["layers.0.wq"].shape[0] // cfg.n_heads if cfg.n_layers else cfg.dim
        self.n_kv_heads = getattr(cfg, "n_kv_heads", cfg.n_heads)
        theta = getattr(cfg, "rope_theta", 10000.0)
        pairs = theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim) if theta else np.zeros(self.head_dim // 2)
        angle = np.outer(np.arange(self.capacity), pairs)  # (S, hd / 2)
        self.cos, self.sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        cache = (cfg.n_layers, self.capacity, self.n_kv_heads, self.head_dim)
        self.k, self.v = np.zeros(cache, np.float32), np.zeros(cache, np.float32)

    def rewind(self, position: int) -> None:
        if not 0 <= position <= self.position:
            raise StateError(f"cannot go back to position {position}: the cache holds {self.position}")
        self.position = position

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """See tokens; float32 logits (vocab,) of what comes next."""
        ids = np.asarray(tokens, np.int64)
        if ids.size == 0 or ids.size > self.capacity - self.position:
            raise InputError(f"{ids.size} tokens do not fit: {self.position} of {self.capacity} positions are taken")
        table = self.w["tok_embeddings"]
        if ids.min() < 0 or ids.max() >= len(table):
            raise InputError(f"token {int(ids.max())} is outside the vocabulary of {len(table)}")
        x = table[ids]  # (T, dim)
        for i in range(self.config.n_layers):
            w = {name: self.w[f"layers.{i}.{name}"] for name in LAYER}
            x = x + self._attention(i, self._norm(x, w["attn_norm"]), w) @ w["wo"].T
            h = self._norm(x, w["ffn_norm"])
            gate = h @ w["w1"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"].T)) @ w["w2"].T
        self.position += ids.size
        last = self._norm(x[-1:], self.w["norm"])[0] if "norm" in self.w else x[-1]
        logits: np.ndarray = self.w.get("output", table) @ last
        return logits

    def _norm(self, x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(self.eps)) * gain[:, 0]
        return scaled

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """x (T, heads, hd), its first row at `position`."""
        rows = slice(self.position, self.position + len(x))
        cos, sin = self.cos[rows, None], self.sin[rows, None]
        even, odd = x[..., ::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    def _attention(self, layer: int, h: np.ndarray, w: Mapping[str, np.ndarray]) -> np.ndarray:
        t, start, kv, hd = len(h), self.position, self.n_kv_heads, self.head_dim
        q, k, v = (h @ w[name].T for name in ("wq", "wk", "wv"))
        seen = start + t
        self.k[layer, start:seen] = self._rotate(k.reshape(t, kv, hd))
        self.v[layer, start:seen] = v.reshape(t, kv, hd)
        q = self._rotate(q.reshape(t, -1, hd)).reshape(t, kv, -1, hd)  # (T, KV, group, hd)
        scores = np.einsum("tkgd,skd->kgts", q, self.k[layer, :seen]) / np.float32(np.sqrt(hd))
        scores += np.where(np.arange(seen)[None] > np.arange(start, seen)[:, None], np.float32(-np.inf), np.float32(0))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return np.einsum("kgts,skd->tkgd", p, self.v[layer, :seen]).reshape(t, -1)
