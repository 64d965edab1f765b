"""Several ranks: how long sums over them take, and how much faster they train than one.

    mpiexec -n 2 python -m mpi4py -m anert bench mpi plugins/stories.py:15m

Rank 0 measures; before each run it tells the others what to do with it, which is part of the time (tens of
microseconds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from anert.bench.measure import Case
from anert.bench.options import BenchOptions
from anert.dist import GradientSum, Mpi, world
from anert.errors import AnertError, InputError

SIZES = (1 << 16, 1 << 20, 1 << 24)
"""Bytes of the plain sums."""

LOSS_SCALE = 1024.0

Run = Callable[[], None]


class Together:
    """Actions that all ranks do when rank 0 says so; the same list on each."""

    def __init__(self, ranks: Mpi) -> None:
        self.ranks, self.actions = ranks, list[Run]()

    def add(self, action: Run) -> Run:
        """What rank 0 calls for all to do it."""
        self.actions.append(action)
        number = len(self.actions)

        def run() -> None:
            self.ranks.sum([number])
            action()

        return run

    def serve(self) -> None:
        """What the other ranks do until `end`."""
        while number := int(self.ranks.sum([0])[0]):
            self.actions[number - 1]()

    def end(self) -> None:
        self.ranks.sum([0])
        self.ranks.close()


class Step:
    """A training step of one micro-batch of `batch` sequences a rank."""

    def __init__(self, options: BenchOptions, ranks: Mpi) -> None:
        from anert.ffi import threads_granted
        from anert.network import Network
        from anert.optim import AdamW
        from anert.param import ParamStore
        from anert.runtime import Runtime

        model, config = options.model()
        threads = options.threads or max(1, threads_granted() // ranks.local_size)
        self.rt = Runtime(options.backend, options.precision, options.layout, threads, isa=options.isa)
        self.store = ParamStore(self.rt.heap, self.rt.pool, model.specs(), train=True)
        self.store.initialise(1)
        assert self.store.grads is not None
        self.ranks, self.sum = ranks, GradientSum(ranks, self.store.grads)
        ready = self.sum.ready
        self.net = Network(self.rt, model, self.store, config.seq_len, options.batch, True, on_grads=ready)
        self.store.sync()
        self.optimizer = AdamW(self.store, 0.9, 0.95, 1e-8, 0.1)
        ids = np.random.default_rng(1 + ranks.rank).integers(0, config.vocab_size, self.net.n + 1).astype(np.int32)
        self.tokens, self.targets = ids[:-1].copy(), ids[1:].copy()
        self.total = self.net.n * ranks.size

    def alone(self) -> None:
        """Every rank's sequences on this rank."""
        self._gradients(self.ranks.size, armed=False)
        self._update()

    def shared(self, overlapped: bool) -> None:
        """This rank's sequences, and the sum of all ranks' gradients: behind the backward pass, or after it."""
        self._gradients(1, armed=overlapped)
        self.sum.finish()
        self.store.grads_written()
        self._update()

    def _gradients(self, parts: int, armed: bool) -> None:
        self.net.zero_grad()
        for part in range(parts):
            self.sum.armed = armed and part == parts - 1
            self.net.loss_backward(self.tokens, self.targets, LOSS_SCALE)

    def _update(self) -> None:
        norm, finite = self.optimizer.grad_norm()
        if not finite:
            raise AnertError(f"the gradients of the timed step are not finite (norm {norm})")
        self.optimizer.step(0.0, 1.0 / self.ranks.size)  # all the work of a step, and the weights stay

    def check(self) -> None:
        """Gradients that were summed behind the backward pass are those that are summed after it, on every rank."""
        assert self.store.grads is not None
        found = []
        for overlapped in (True, False):
            self.shared(overlapped)
            found.append(hashlib.sha256(self.store.grads.data).hexdigest())
        self.ranks.require_equal("gradients", found[0])
        if found[0] != found[1]:
            raise AnertError("gradients summed behind the backward pass differ from those summed after it")


TOGETHER: list[Together] = []
"""Of this process, once it takes part."""


def cases(name: str, options: BenchOptions) -> list[Case]:
    """The cases on rank 0. The other ranks serve them, and have none; their process ends when rank 0 says so."""
    ranks = world()
    if not isinstance(ranks, Mpi):
        raise InputError("bench mpi is started on several ranks: mpiexec -n 2 python -m mpi4py -m anert bench mpi ...")
    if options.peers:
        raise InputError(f"bench mpi has no peer {options.peers[0][0]!r}")
    together = Together(ranks)
    TOGETHER.append(together)
    made = [case for size in SIZES for case in _sum_cases(ranks, together, f"{size >> 10:,} kB", size // 4)]
    if options.plugin:
        made += _training(options, ranks, together)
    if ranks.rank:
        together.serve()
        ranks.close()
        return []
    return made


def close() -> None:
    """Rank 0 lets the others go."""
    for together in TOGETHER:
        if together.ranks.rank == 0:
            together.end()
    TOGETHER.clear()


def _sum_cases(ranks: Mpi, together: Together, label: str, n: int) -> list[Case]:
    """The sum of n floats in buckets, as a step does it, against a copy of as many on this rank."""
    values = np.zeros(n, np.float32)
    copy = np.zeros(n, np.float32)
    summing = GradientSum(ranks, values)

    def check() -> None:
        values[...] = ranks.rank + 1
        summing.finish()
        if not (values == sum(range(1, ranks.size + 1))).all():
            raise AnertError(f"the sum over ranks of {label} is wrong")
        values[...] = 0

    def add_up() -> None:
        summing.finish()

    notes = {"ranks": ranks.size, "local_ranks": ranks.local_size}
    return [
        Case(f"copy {label}", partial(np.copyto, copy, values), nbytes=4 * n, notes=notes),
        Case(f"allreduce {label}, {ranks.size} ranks", together.add(add_up), nbytes=4 * n, notes=notes,
             baseline=f"copy {label}", verify=together.add(check)),
    ]  # fmt: skip


def _training(options: BenchOptions, ranks: Mpi, together: Together) -> list[Case]:
    step = Step(options, ranks)
    assert step.store.grads is not None
    flops = float(step.net.flops * ranks.size)
    notes: dict[str, Any] = {
        "ranks": ranks.size, "threads": step.rt.pool.threads, "isa": step.rt.pool.isa, "precision": step.rt.precision,
        "tokens_per_step": step.total, "params": step.store.n_params,
    }  # fmt: skip
    one = "train, 1 rank"

    def case(name: str, run: Run, baseline: str = "", verify: Run | None = None) -> Case:
        return Case(name, run, "tok/s", step.total, flops, notes=notes, baseline=baseline, verify=verify)

    return [
        *_sum_cases(ranks, together, f"all gradients ({4 * step.store.size / 1e6:.0f} MB)", step.store.size),
        case(one, step.alone),
        case(f"train, {ranks.size} ranks", together.add(lambda: step.shared(True)), one, together.add(step.check)),
        case(f"train, {ranks.size} ranks, sum after backward", together.add(lambda: step.shared(False)), one),
    ]
