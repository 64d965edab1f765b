"""The Stories model in PyTorch, written from the papers and llama2.c, as an oracle: (B, T, C) layout, complex-free
rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


class TorchStories:
    """Parameters by anert's names; `loss(tokens, targets)` with int arrays (batch, seq_len)."""

    def __init__(self, cfg: Any, tensors: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> None:
        self.cfg = cfg
        self.p = {k: torch.tensor(np.array(v), dtype=dtype, requires_grad=True) for k, v in tensors.items()}
        hd = cfg.dim // cfg.n_heads
        angle = torch.outer(torch.arange(cfg.seq_len), cfg.rope_theta ** (-torch.arange(0, hd, 2).double() / hd))
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg.norm_eps) * gain

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[-2]
        a, b = x[..., 0::2], x[..., 1::2]
        c, s = self.cos[:t], self.sin[:t]
        return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)

    def hidden(self, tokens: np.ndarray) -> torch.Tensor:
        cfg, p = self.cfg, self.p
        x = p["tok_embeddings"][torch.as_tensor(tokens, dtype=torch.long)]
        b, t, _ = x.shape
        for i in range(cfg.n_layers):
            w = {k.removeprefix(f"layers.{i}."): v for k, v in p.items() if k.startswith(f"layers.{i}.")}
            h = self._norm(x, w["attn_norm"])
            q, k, v = (
                (h @ w[n].T).view(b, t, m, -1).transpose(1, 2)
                for n, m in (("wq", cfg.n_heads), ("wk", cfg.n_kv_heads), ("wv", cfg.n_kv_heads))
            )
            q, k = self._rotate(q), self._rotate(k)
            k, v = (z.repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 1) for z in (k, v))
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + o.transpose(1, 2).reshape(b, t, -1) @ w["wo"].T
            h = self._norm(x, w["ffn_norm"])
            x = x + (F.silu(h @ w["w1"].T) * (h @ w["w3"].T)) @ w["w2"].T
        return self._norm(x, p["norm"])

    def logits(self, tokens: np.ndarray) -> torch.Tensor:
        return self.hidden(tokens) @ self.p["tok_embeddings"].T

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> torch.Tensor:
        logits = self.logits(tokens)
        return F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), torch.as_tensor(targets, dtype=torch.long).reshape(-1)
        )
