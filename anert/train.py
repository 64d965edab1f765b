"""The training loop: a generator of events. Nothing is drawn or printed here."""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from anert.errors import AnertError, InputError
from anert.events import Event, Notice, Progress, RunDone, RunStarted, Sampled, Saved, StepDone, Validated

if TYPE_CHECKING:
    from anert.plugin import Plugin

T = TypeVar("T")
MAX_SKIPPED = 30
"""Steps in a row that may overflow before a run counts as diverged: enough for the scale to fall from 2^24 to under
1."""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything that `anert run PLUGIN train` can be told; a plugin's preset may carry other defaults.

    Steps are optimizer steps; a step reads `batch * grad_accum` windows of the model's seq_len.
    """

    steps: int = 1000
    batch: int = 1
    grad_accum: int = 1
    lr: float = 5e-4
    min_lr: float = 0.0
    """Where the cosine ends."""
    warmup: int = 100
    optimizer: str = "adamw"
    """`adamw`, `lion`, or a name that the plugin registered."""
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Global gradient norm; 0 turns clipping off."""
    loss_scale: str = "dynamic"
    """`dynamic`, or a number."""
    seed: int = 1337
    data: str = ""
    """Text or token file; empty: the plugin's own corpus."""
    val: str = "0.05"
    """A fraction of the data's tail, or a file."""
    tokenizer: str = ""
    """Tokenizer file; empty: one that the data names, or one trained on it."""
    init: str = "scratch"
    """`scratch`, `resume`, or a checkpoint file or directory."""
    out: str = ""
    """Run directory; empty: runs/<plugin>-<preset>-<n>."""
    eval_every: int = 100
    eval_tokens: int = 16384
    sample_every: int = 100
    sample_prompt: str = "Once upon a time"
    save_every: int = 250
    keep: int = 3
    time_budget_s: float = 0.0
    """Stop and save after this many seconds of training; 0: no limit."""
    backend: str = "auto"
    precision: str = "auto"
    """`fp32`, `bf16`, `fp16`; auto: bf16 where the CPU multiplies it natively, else fp32."""
    layout: str = "auto"
    threads: int = 0
    """0: ANERT_NUM_THREADS, else what the cgroup and affinity grant."""
    compile_budget: int = 0
    """0: the backend's own."""


def waited(task: str, unit: str, work: Callable[[Callable[[float, float], None]], T]) -> Generator[Event, None, T]:
    """Run `work(progress)` in a thread and yield its progress(done, total) at most four times a second; returns its
    result."""
    ticks: queue.SimpleQueue[tuple[float, float] | None] = queue.SimpleQueue()
    outcome: list[Any] = []
    last = 0.0

    def report(done: float, total: float) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > 0.25 or done >= total > 0:
            last = now
            ticks.put((done, total))

    def run() -> None:
        try:
            outcome.extend((True, work(report)))
        except BaseException as error:  # handed to the caller's thread below
            outcome.extend((False, error))
        ticks.put(None)

    threading.Thread(target=run, name=f"anert-{task}", daemon=True).start()
    while (tick := ticks.get()) is not None:
        yield Progress(task, *tick, unit)
    ok, result = outcome
    if not ok:
        raise result
    return result


class Trainer:
    """One run: prepares data and model, steps, validates, samples, saves. `run` is the generator that `train`
    returns."""

    def __init__(
        self, plugin: Plugin, preset: str, config: Any, options: TrainOptions, stop: Callable[[], bool]
    ) -> None:
        self.plugin, self.preset, self.config, self.options, self.stop = (
            plugin,
            plugin.preset(preset),
            config,
            options,
            stop,
        )
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.val_first = self.val_loss = self.best_val = self.train_loss = math.nan
        self.saved_step, self.saved_path = -1, ""
        self.trained_s = 0.0
        self.step_ms: list[float] = []
        self.ui_ms = 0.0

    # ---- preparation

    def prepare(self) -> Iterator[Event]:
        from anert.inputs import estimate_run, open_data, open_weights, run_dir
        from anert.param import ParamStore
        from anert.runtime import Runtime

        o = self.options
        self.rt = Runtime(o.backend, o.precision, o.layout, o.threads, o.compile_budget)
        yield Notice("info", self.rt.note)
        self.out = run_dir(self.plugin.name, self.preset.name, o)
        weights = yield from open_weights(self.plugin, self.config, o, self.out)
        self.config = weights.config
        self.data = yield from open_data(self.plugin, self.preset, self.config, o, self.out, weights)
        self.config = self.data.config
        self.model = self.preset.model(self.config)
        specs = self.model.specs()
        self.memory = estimate_run(self.rt, self.model, specs, o, self.out)
        self.store = ParamStore(self.rt.heap, self.rt.pool, specs, train=True)
        if weights.tensors is None:
            self.store.initialise(o.seed)
        else:
            self.store.load(weights.tensors)
        yield from self._networks()
        self._optimizer()
        if weights.checkpoint is not None:
            self._restore(weights.checkpoint)
        self.store.sync()

    def _networks(self) -> Iterator[Event]:
        from anert.decode import Session
        from anert.network import Network

        o, cfg = self.options, self.config

        def build(progress: Callable[[float, float], None]) -> tuple[Network, Session]:
            train = Network(self.rt, self.model, self.store, cfg.seq_len, o.batch, True, progress)
            return train, Session(self.rt, self.model, self.store, widths=SAMPLE_WIDTHS, on_compile=progress)

        self.net, self.sampler = yield from waited("compile kernels", "kernels", build)

    def _optimizer(self) -> None:
        from anert.optim import OPTIMIZERS, LossScale, warmup_cosine

        o = self.options
        known: dict[str, Any] = {**OPTIMIZERS, **self.plugin.optimizers}
        if o.optimizer not in known:
            raise InputError(f"--optimizer {o.optimizer!r} is not known: choose {', '.join(known)}")
        self.optimizer = known[o.optimizer](self.store, o.beta1, o.beta2, o.eps, o.weight_decay)
        self.schedule = warmup_cosine(o.lr, o.min_lr, o.warmup, o.steps)
        self.scale = LossScale(o.loss_scale)
        self.batches = self.data.dataset.train_batches(o.batch, o.seed)

    # ---- state

    def state(self) -> dict[str, Any]:
        """Everything but tensors that a resumed run needs to go on bit for bit."""
        return {
            "plugin": self.plugin.name, "preset": self.preset.name, "config": self.model.describe(),
            "options": dataclasses.asdict(self.options), "optimizer_t": self.optimizer.t,
            "scaler": self.scale.state_dict(),
            "data": self.batches.state_dict(), "skipped": self.skipped, "trained_s": self.trained_s,
            "train_loss": self.train_loss, "val_first": self.val_first, "val_loss": self.val_loss,
            "best_val": self.best_val,
        }  # fmt: skip

    def _restore(self, checkpoint: Any) -> None:
        state = checkpoint.state
        self.step = checkpoint.step
        self.saved_step, self.saved_path = checkpoint.step, str(checkpoint.path)
        self.optimizer.t = int(state["optimizer_t"])
        self.scale.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["data"])
        self.skipped = int(state["skipped"])
        self.trained_s = float(state["trained_s"])
        for name in ("train_loss", "val_first", "val_loss", "best_val"):
            value = state.get(name)
            setattr(self, name, math.nan if value is None else float(value))
        for name, p in self.store.items():
            for kind, moment in (("m", p.m), ("v", p.v)):
                if f"{name}.{kind}" in checkpoint.optim and moment is not None:
                    moment[...] = checkpoint.optim[f"{name}.{kind}"].reshape(moment.shape)

    def save(self, best: bool) -> Saved:
        from anert import checkpoint

        start = time.perf_counter()
        moments = ((name, kind, getattr(p, kind)) for name, p in self.store.items() for kind in ("m", "v"))
        optim = {f"{name}.{kind}": value for name, kind, value in moments if value is not None}
        path = checkpoint.save(self.out, self.step, self.store.tensors(), optim, self.state(), self.data.tokenizer,
                               best=best, keep=self.options.keep)  # fmt: skip
        self.saved_step, self.saved_path = self.step, str(path)
        return Saved(self.step, str(path), best, (time.perf_counter() - start) * 1e3)

    # ---- the loop

    def run(self) -> Iterator[Event]:
        yield from self.prepare()
        yield self._started()
        reason = "steps"
        yield from self._validate()
        begin = time.perf_counter() - self.trained_s
        self._begin = begin
        while self.step < self.options.steps:
            if self.stop():
                reason = "interrupted"
                break
            budget = self.options.time_budget_s
            if budget and time.perf_counter() - begin >= budget:
                reason = "time"
                break
            try:
                event = self.train_step()
            except AnertError as error:
                yield Notice("error", str(error))
                reason = "diverged"
                break
            shown = time.perf_counter()
            yield event
            yield from self._between()
            self.ui_ms = (time.perf_counter() - shown) * 1e3 - self._between_ms
        self.trained_s = time.perf_counter() - begin
        yield from self._finish(reason)

    def _started(self) -> RunStarted:
        o, rt, d = self.options, self.rt, self.data
        return RunStarted(
            plugin=self.plugin.name, preset=self.preset.name, config=self.model.describe(),
            n_params=self.store.n_params,
            backend=rt.backend.name, precision=rt.precision, threads=rt.pool.threads, isa=rt.pool.isa, layout=rt.layout,
            kernels=self.net.kernels + self.sampler.kernels, compiles=rt.backend.compiles,
            compile_budget=rt.backend.budget,
            compile_ms=rt.backend.compile_ms, dataset=d.name, train_tokens=d.dataset.train_tokens,
            val_tokens=d.dataset.val_tokens,
            tokenizer=d.tokenizer_name, tokens_per_step=o.batch * o.grad_accum * self.config.seq_len, steps=o.steps,
            first_step=self.step, time_budget_s=o.time_budget_s, out_dir=str(self.out), memory_bytes=self.memory,
            peak_gflops=rt.peak_gflops(), options=dataclasses.asdict(o),
        )  # fmt: skip

    def train_step(self) -> StepDone:
        """One optimizer step. NonFiniteError when the forward itself is not finite, or overflows never end."""
        from anert.errors import NonFiniteError
        from anert.runtime import rss_bytes

        o, net = self.options, self.net
        start = time.perf_counter()
        net.ms.clear()
        net.zero_grad()
        data_ms, losses = 0.0, 0.0
        for _ in range(o.grad_accum):
            fetch = time.perf_counter()
            tokens, targets = next(self.batches)
            data_ms += (time.perf_counter() - fetch) * 1e3
            loss = net.loss_backward(tokens, targets, self.scale.scale)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"step {self.step}: the loss is {loss}; first in {net.name_nonfinite()}. "
                    f"{self._kept()}: lower --lr or raise --warmup"
                )
            losses += loss
        begin = time.perf_counter()
        norm, finite = self.optimizer.grad_norm()
        norm /= o.grad_accum
        lr, clamped, scale = self.schedule(self.step), 0, self.scale.scale
        if finite:
            factor = min(1.0, o.clip / (norm + 1e-6)) if o.clip else 1.0
            clamped = self.optimizer.step(lr, factor / o.grad_accum)
            self.train_loss = losses / o.grad_accum
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row > MAX_SKIPPED or not self.scale.dynamic:
                raise NonFiniteError(
                    f"step {self.step}: gradients overflow at loss scale {scale:g} "
                    f"for {self.skipped_in_a_row} steps. {self._kept()}"
                )
        self.scale.update(finite)
        self.step += 1
        now = time.perf_counter()
        step_ms = (now - start) * 1e3
        self.step_ms.append(step_ms)
        tokens_done = o.batch * o.grad_accum * self.config.seq_len
        ms = {"data": data_ms, **net.ms, "optimizer": (now - begin) * 1e3, "sync": 0.0, "dashboard": self.ui_ms}
        elapsed = now - self._begin
        return StepDone(
            step=self.step, loss=losses / o.grad_accum, lr=lr, grad_norm=norm, loss_scale=scale, skipped=not finite,
            tokens=tokens_done, step_ms=step_ms, ms=ms, flops=net.flops * o.grad_accum,
            tokens_per_s=tokens_done / step_ms * 1e3,
            elapsed_s=elapsed, eta_s=self._eta(elapsed), rss_bytes=rss_bytes(), compiles=self.rt.backend.compiles,
            amax=net.amax()[0], clamped=clamped,
        )  # fmt: skip

    def _kept(self) -> str:
        return (
            f"the last good checkpoint stays at {self.saved_path}" if self.saved_path else "no checkpoint was saved yet"
        )

    def _eta(self, elapsed: float) -> float:
        recent = self.step_ms[-20:]
        left = (self.options.steps - self.step) * sum(recent) / len(recent) / 1e3
        budget = self.options.time_budget_s
        return min(left, max(0.0, budget - elapsed)) if budget else left

    def _between(self) -> Iterator[Event]:
        """What is due after this step: validation, a sample, a checkpoint."""
        o, start = self.options, time.perf_counter()
        due = self.step < o.steps
        if due and o.eval_every and self.step % o.eval_every == 0:
            yield from self._validate()
        if due and o.sample_every and self.step % o.sample_every == 0:
            yield self._sample()
        if due and o.save_every and self.step % o.save_every == 0 and self.saved_step != self.step:
            yield self.save(best=False)
        self._between_ms = (time.perf_counter() - start) * 1e3

    def _validate(self) -> Iterator[Event]:
        """Mean loss over the fixed validation windows; the best one so far is saved as `best`."""
        start = time.perf_counter()
        total, count = 0.0, 0
        for tokens, targets in self.data.dataset.val_windows(self.options.batch, self.options.eval_tokens):
            loss, n = self.net.loss(tokens, targets)
            total, count = total + loss * n, count + n
        if not count:
            return
        self.val_loss = total / count
        if math.isnan(self.val_first):
            self.val_first = self.val_loss
        best = not self.val_loss >= self.best_val
        if best:
            self.best_val = self.val_loss
        yield Validated(self.step, self.val_loss, count, best, (time.perf_counter() - start) * 1e3)
        if best and self.step and math.isfinite(self.val_loss):
            yield self.save(best=True)

    def _sample(self, max_tokens: int = 200, seconds: float = 1.0) -> Sampled:
        from anert.events import Text
        from anert.sample import Limits, tell
        from anert.sampler import Sampler

        start = time.perf_counter()
        settings = Sampler(temperature=0.8, top_k=50, seed=self.options.seed)
        told = tell(self.sampler, self.data.tokenizer, self.options.sample_prompt, settings, Limits(max_tokens, seconds))
        text = "".join(event.text for event in told if isinstance(event, Text))
        return Sampled(self.step, text, (time.perf_counter() - start) * 1e3)

    def _finish(self, reason: str) -> Iterator[Event]:
        if reason != "diverged" and self.step > self.saved_step:
            if reason != "interrupted":
                yield from self._validate()
            if self.step > self.saved_step:
                yield self.save(best=False)
            if reason != "interrupted" and self.options.sample_every:
                yield self._sample(seconds=5.0)
        yield RunDone(reason, self.summary())
        self.rt.close()

    def summary(self) -> dict[str, Any]:
        """The keys of design.md section 11."""
        from anert.runtime import rss_bytes

        settled = sorted(self.step_ms[min(2, len(self.step_ms) - 1) :]) if self.step_ms else [math.nan]
        median = settled[len(settled) // 2]
        tokens = self.options.batch * self.options.grad_accum * self.config.seq_len
        return {
            "steps": self.step, "train_loss": self.train_loss, "val_loss_first": self.val_first,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val, "compiles": self.rt.backend.compiles,
            "kernels": self.net.kernels + self.sampler.kernels,
            "tokens_per_s": tokens / median * 1e3, "ms_per_step": median, "skipped_steps": self.skipped,
            "checkpoint": self.saved_path, "backend": self.rt.backend.name, "precision": self.rt.precision,
            "threads": self.rt.pool.threads, "rss_mb": rss_bytes() / 2**20, "out": str(self.out),
        }  # fmt: skip


def train(plugin: Plugin, preset: str, config: Any, options: TrainOptions, stop: Callable[[], bool]) -> Iterator[Event]:
    """Train a preset of a plugin; yields events until RunDone. `stop` turning true ends the run after a step, saved.

    Raises AnertError subclasses for bad input before the first step; divergence is a RunDone with reason `diverged`.
    """
    return Trainer(plugin, preset, config, options, stop).run()
