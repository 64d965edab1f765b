"""A model as it runs: forward pass and training step, at random weights; FLOPs from the programs that ran."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from anert.bench.measure import Case
from anert.bench.options import BenchOptions
from anert.errors import AnertError, InputError

LOSS_SCALE = 1024.0


class Bench:
    """A network of a plugin's model with its weights drawn, and tokens to run it on."""

    def __init__(self, options: BenchOptions, train: bool) -> None:
        from anert.boundaries import settle
        from anert.network import Network
        from anert.param import ParamStore

        self.rt = options.runtime()
        self.model, self.config = options.model()
        self.batch = options.batch
        self.store = ParamStore(self.rt.heap, self.rt.pool, self.model.specs(), train)
        self.store.initialise(1)
        settle(self.rt, self.model, self.config.seq_len, options.batch)
        self.net = Network(self.rt, self.model, self.store, self.config.seq_len, options.batch, train)
        self.store.sync()
        self.tokens, self.targets = _tokens(options, self.config, options.batch * self.config.seq_len)
        self.n = len(self.tokens)

    def about(self) -> dict[str, Any]:
        rt = self.rt
        return {"backend": rt.backend.name, "precision": rt.precision, "layout": rt.layout,
                "boundaries": rt.boundaries.label, "threads": rt.pool.threads,
                "isa": rt.pool.isa, "seq_len": self.config.seq_len, "batch": self.batch, "params": self.store.n_params,
                "kernels": self.net.kernels, "compiles": rt.backend.compiles,
                "compile_ms": round(rt.backend.compile_ms, 2)}  # fmt: skip


def _tokens(options: BenchOptions, config: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n ids and their successors: of a token file, or drawn."""
    if options.data:
        from anert.data.dataset import TokenDataset

        data = TokenDataset(Path(options.data), config.seq_len, 0.0, config.vocab_size)
        tokens, targets = next(data.train_batches(options.batch, 1))
        return tokens, targets
    ids = np.random.default_rng(1).integers(0, config.vocab_size, n + 1).astype(np.int32)
    return ids[:-1].copy(), ids[1:].copy()


def cases(name: str, options: BenchOptions) -> list[Case]:
    """The cases of `forward` or `train`, with the peers that were asked for."""
    unknown = {peer for peer, _ in options.peers} - {"torch"}
    if unknown:
        raise InputError(f"bench {name} has no peer {min(unknown)!r}: torch is the one it has")
    made = [forward(options) if name == "forward" else train(options)]
    if options.peers:
        from anert.bench.torch_peer import peer_cases

        return [*made, *peer_cases(name, options, made[0])]
    return made


def forward(options: BenchOptions) -> Case:
    """Embedding and all blocks on batch * seq_len positions."""
    b = Bench(options, train=False)
    flops = b.net.flops - b.net.head.flops // 3  # the classifier does not run here
    expected = b.net.loss(b.tokens, b.targets)[0]

    def run() -> None:
        b.net.forward(b.tokens)

    def verify() -> None:
        loss = b.net.loss(b.tokens, b.targets)[0]
        if loss != expected or not abs(loss - math.log(b.config.vocab_size)) < 1:
            raise AnertError(f"bench forward: loss {loss}, at first {expected}; random weights give about "
                             f"{math.log(b.config.vocab_size):.2f}")  # fmt: skip

    name = f"forward {options.plugin} {b.rt.precision}"
    return Case(
        name, run, "tok/s", b.n, flops, peak=partial(b.rt.peak_gflops, again=True), verify=verify, notes=b.about()
    )


def train(options: BenchOptions) -> Case:
    return train_on(options)[0]


def train_on(options: BenchOptions) -> tuple[Case, Bench]:
    """Forward, backward, every gradient, norm and clip, AdamW, every fp16 copy of the weights."""
    from anert.optim import AdamW

    b = Bench(options, train=True)
    optimizer = AdamW(b.store, 0.9, 0.95, 1e-8, 0.1)
    losses: list[float] = []

    def run() -> None:
        b.net.zero_grad()
        losses.append(b.net.loss_backward(b.tokens, b.targets, LOSS_SCALE))
        norm, finite = optimizer.grad_norm()
        if not finite:
            raise AnertError("bench train: a gradient is not finite")
        optimizer.step(3e-5, min(1.0, 1.0 / (norm + 1e-6)))

    def verify() -> None:
        first, last = losses[0], losses[-1]
        if not (abs(first - math.log(b.config.vocab_size)) < 1 and (last < first or len(losses) == 1)):
            raise AnertError(f"bench train: the loss went from {first} to {last} on one batch: it should fall")

    name = f"train {options.plugin} {b.rt.precision}"
    case = Case(
        name, run, "tok/s", b.n, b.net.flops, peak=partial(b.rt.peak_gflops, again=True), verify=verify, notes=b.about()
    )
    return case, b
