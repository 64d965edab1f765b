"""PyTorch as a peer: the same Llama-style decoder, batch and optimizer (fused AdamW), eager and compiled, in this very
process and on as many threads. Written from the papers; weights are drawn anew, which no speed depends on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from anert.bench.measure import Case, let_peers_wait
from anert.bench.options import BenchOptions
from anert.errors import InputError


def peer_cases(name: str, options: BenchOptions, ours: Case) -> list[Case]:
    """`torch eager` and `torch compile` for `forward` or `train`; our case gets the first as its baseline."""
    try:
        let_peers_wait()  # before its OpenMP reads the environment
        import torch
    except ImportError:
        raise InputError("--peer torch needs PyTorch: pip install torch (2.13.0 is the one we measured)") from None
    _, config = options.model()
    threads, precision = int(ours.notes["threads"]), str(ours.notes["precision"])
    torch.set_num_threads(threads)
    made = []
    for how in ("eager", "compile"):
        step = _step(torch, config, options.batch, precision, name == "train", how == "compile")
        made.append(Case(f"torch {how} {name} {precision}", step, "tok/s", ours.amount,
                         notes={"torch": torch.__version__, "threads": threads}))  # fmt: skip
    ours.baseline = made[0].name
    for case in made[1:]:
        case.baseline = made[0].name
    return made


def _step(torch: Any, config: Any, batch: int, precision: str, train: bool, compiled: bool) -> Callable[[], None]:
    model = _llama(torch, config)
    run_model: Any = torch.compile(model) if compiled else model
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, config.vocab_size, (batch, config.seq_len + 1)))
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def precise() -> Any:
        if precision == "bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()

    if not train:

        def forward() -> None:
            with torch.no_grad(), precise():
                run_model(tokens, classify=False)

        return forward
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with precise():
            logits = run_model(tokens)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _llama(torch: Any, c: Any) -> Any:
    """A decoder of this config; parameters N(0, 0.02)."""
    nn, functional = torch.nn, torch.nn.functional
    head_dim = getattr(c, "head_dim", 0) or c.dim // c.n_heads

    class Block(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            q, kv = c.n_heads * head_dim, c.n_kv_heads * head_dim
            for name, rows, cols in (("wq", q, c.dim), ("wk", kv, c.dim), ("wv", kv, c.dim), ("wo", c.dim, q),
                                     ("w1", c.hidden_dim, c.dim), ("w2", c.dim, c.hidden_dim),
                                     ("w3", c.hidden_dim, c.dim)):  # fmt: skip
                setattr(self, name, nn.Linear(cols, rows, bias=False))
            self.attn_norm, self.ffn_norm = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            b, t, _ = x.shape
            h = self.attn_norm(x)
            q = self.wq(h).view(b, t, c.n_heads, head_dim)
            k = self.wk(h).view(b, t, c.n_kv_heads, head_dim)
            v = self.wv(h).view(b, t, c.n_kv_heads, head_dim).transpose(1, 2)
            q, k = (_rotated(torch, z, cos, sin).transpose(1, 2) for z in (q, k))
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.n_kv_heads < c.n_heads)
            x = x + self.wo(y.transpose(1, 2).reshape(b, t, c.n_heads * head_dim))
            h = self.ffn_norm(x)
            return x + self.w2(functional.silu(self.w1(h)) * self.w3(h))

    class Llama(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(c.vocab_size, c.dim)
            self.blocks = nn.ModuleList(Block() for _ in range(c.n_layers))
            self.norm = nn.RMSNorm(c.dim, c.norm_eps)
            angle = torch.outer(torch.arange(c.seq_len),
                                c.rope_theta ** (-torch.arange(0, head_dim, 2).double() / head_dim))  # fmt: skip
            self.register_buffer("cos", angle.cos().float(), persistent=False)
            self.register_buffer("sin", angle.sin().float(), persistent=False)
            for p in self.parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, std=0.02)

        def forward(self, tokens: Any, classify: bool = True) -> Any:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            x = self.norm(x)
            return functional.linear(x, self.embedding.weight) if classify else x

    return Llama()


def _rotated(torch: Any, x: Any, cos: Any, sin: Any) -> Any:
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
