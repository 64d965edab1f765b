"""The training loop: a generator of events. Nothing is drawn or printed here."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anert.errors import AnertError, EngineError, InputError, NonFiniteError
from anert.events import Event, Notice, Progress, RunDone, RunStarted, Sampled, Saved, StepDone, Validated
from anert.health import Health
from anert.waiting import waited

if TYPE_CHECKING:
    from anert.checkpoint import Checkpoint
    from anert.plugin import Plugin
    from anert.saver import Saver

SAMPLE_WIDTHS = (1, 32)
"""Programs for the samples during training: prompts are short."""
RETRY_S = 30.0
"""Seconds until a save that the disk refused is tried again."""

WAITED_MS = 1000.0
"""Training that waited longer for a save says so, once."""

LAST_TRIES = 3
"""Tries of a run's last save, a second apart."""


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
    scale_window: int = 500
    """Steps without overflow after which the dynamic loss scale doubles."""
    patience: int = 30
    """Steps in a row that may be skipped (overflow, nan, spike) before the run goes back to its last checkpoint."""
    spike: float = 8.0
    """Skip a step whose loss is this many deviations, and a quarter, above its running mean; 0: none."""
    rollbacks: int = 2
    """How often a run may go back before it stops as diverged."""
    seed: int = 1337
    data: str = ""
    """Text or token file; empty: the plugin's own corpus."""
    val: str = "0.05"
    """A fraction of the data's tail, or a file."""
    data_dtype: str = "auto"
    """Of raw token files without a header: uint16, uint32, or auto: uint32 where the numbers show it."""
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
    fusion: str = "auto"
    """`blocks` (each its programs), a number of layers in one, or auto: on the ANE by predicted time, else `blocks`."""
    threads: int = 0
    """0: ANERT_NUM_THREADS, else what the cgroup and affinity grant."""
    compile_budget: int = 0
    """0: the backend's own."""
    strategy: str = "tensors"
    """Weights are inputs (`tensors`), or constants compiled anew after each step (`baked`, to compare)."""


class Trainer:
    """One run: prepares data and model, steps, validates, samples, saves. `run` is what `train` returns."""

    def __init__(
        self, plugin: Plugin, preset: str, config: Any, options: TrainOptions, stop: Callable[[], bool]
    ) -> None:
        self.plugin, self.preset = plugin, plugin.preset(preset)
        self.config, self.options, self.stop = config, options, stop
        self.step = self.skipped = self.rolled_back = 0
        self.val_first = self.val_loss = self.best_val = self.train_loss = math.nan
        self.saved_step, self.saved_path, self.due_step = -1, "", -1
        self.best_on_disk = self.saving_best = math.nan
        """Validation loss of the best checkpoint, and of the one that is being written."""
        self.retry_at = math.inf
        self.health = Health(options.patience, options.spike)
        self.why = self.where = self.sick = ""
        """Of the last unusable step: what was wrong and where; and what is wrong with weights that were not saved."""
        self.ended = self.waited = False
        self.moved = True
        """A step was usable since the run began or went back."""
        self.trained_s = self.ui_ms = 0.0
        self.step_ms: list[float] = []

    saver: Saver

    # ---- preparation

    def prepare(self) -> Iterator[Event]:
        from anert.boundaries import settle
        from anert.dist import portion, world
        from anert.ffi import threads_granted
        from anert.inputs import estimate_run, open_inputs
        from anert.param import ParamStore
        from anert.runtime import open_runtime
        from anert.saver import Saver

        o = self.options
        self.world = world()
        self.batch, self.accum = portion(o.batch, o.grad_accum, self.world.size)
        threads = o.threads or (max(1, threads_granted() // self.world.local_size) if self.world.size > 1 else 0)
        self.rt = open_runtime(dataclasses.replace(o, threads=threads))
        if self.rt.baked and self.world.size > 1:
            raise InputError("--strategy baked trains as one process: leave out mpiexec")
        self.world.require_equal("options", repr((self.plugin.name, self.config, o, self.rt.precision)))
        yield Notice("info", self.rt.note)
        self._optimizer_kind()  # refuses what cannot be before anything is written or compiled
        inputs = yield from open_inputs(self.plugin, self.preset, self.config, o, self.world)
        self.out, self.data, self.config = inputs.out, inputs.data, inputs.data.config
        self.model = self.preset.model(self.config)
        specs = self.model.specs()
        if chosen := settle(self.rt, self.model, self.config.seq_len, self.batch, inputs.resumed):
            yield Notice("info", chosen)
        self.world.require_equal("kernel boundaries", repr(self.rt.boundaries))
        self.memory = estimate_run(self.rt, self.model, specs, o, self.out)
        self.store = ParamStore(self.rt.heap, self.rt.pool, specs, train=True)
        assert self.store.grads is not None
        self.gradient_sum = self.world.gradient_sum(self.store.grads)
        self.saver = Saver(self.store, self.out, self.data.tokenizer, o.keep)
        yield from waited("set weights", "weights", partial(self._set_weights, inputs.weights.tensors))
        yield from self._networks()
        self._optimizer()
        if inputs.resumed is not None:
            self._restore(inputs.resumed, inputs.weights.checkpoint)
            self.batches.load_state_dict(inputs.resumed["state"]["data"])
        for flat in self.store.flats:
            self.world.broadcast(flat)
        self.store.sync()

    def _set_weights(self, tensors: Any, progress: Callable[[float, float], None]) -> None:
        if tensors is None:
            self.store.initialise(self.options.seed, progress)
        else:
            self.store.load(tensors, progress)

    def _networks(self) -> Iterator[Event]:
        from anert.boundaries import accepted
        from anert.decode import Session, Windowed, open_session
        from anert.network import Network

        def build(progress: Callable[[float, float], None]) -> tuple[Network, Session | Windowed]:
            ready = self.gradient_sum.ready if self.gradient_sum else None
            args = (self.model, self.store, self.config.seq_len, self.batch, True, progress, ready)
            train, text = accepted(self.rt, partial(Network, self.rt, *args))
            refused.append(text)
            return train, open_session(self.rt, self.model, self.store, SAMPLE_WIDTHS, on_compile=progress)

        refused: list[str] = []
        self.net, self.sampler = yield from waited("compile kernels", "kernels", build)
        yield from (Notice("warning", text) for text in refused if text)

    def _optimizer_kind(self) -> Any:
        from anert.optim import OPTIMIZERS

        known: dict[str, Any] = {**OPTIMIZERS, **self.plugin.optimizers}
        if self.options.optimizer not in known:
            raise InputError(f"--optimizer {self.options.optimizer!r} is not known: choose {', '.join(known)}")
        return known[self.options.optimizer]

    def _optimizer(self) -> None:
        from anert.optim import LossScale, warmup_cosine

        o = self.options
        self.optimizer = self._optimizer_kind()(self.store, o.beta1, o.beta2, o.eps, o.weight_decay)
        self.schedule = warmup_cosine(o.lr, o.min_lr, o.warmup, o.steps)
        self.scale = LossScale(o.loss_scale, o.scale_window)
        self.batches = self.data.dataset.train_batches(self.batch, o.seed, self.world.rank, self.world.size)

    # ---- state

    def state(self) -> dict[str, Any]:
        """Everything but tensors that a resumed run needs to go on bit for bit."""
        from anert.boundaries import to_state

        return {
            "plugin": self.plugin.name, "preset": self.preset.name, "config": self.model.describe(),
            "options": dataclasses.asdict(self.options), "boundaries": to_state(self.rt.boundaries),
            "optimizer_t": self.optimizer.t,
            "scaler": self.scale.state_dict(), "health": self.health.state_dict(), "rolled_back": self.rolled_back,
            "data": self.batches.state_dict(), "skipped": self.skipped, "trained_s": self.trained_s,
            "train_loss": self.train_loss, "val_first": self.val_first, "val_loss": self.val_loss,
            "best_val": self.best_val,
        }  # fmt: skip

    def _restore(self, place: dict[str, Any], checkpoint: Checkpoint | None) -> None:
        """Everything of a checkpoint but its weights and its place in the data. place: its `path`, `step`, `state`;
        checkpoint: None on ranks other than 0, which are sent the moments."""
        state = place["state"]
        self.step = self.saved_step = int(place["step"])
        self.saved_path = place["path"]
        try:
            self.optimizer.t = int(state["optimizer_t"])
            self.scale.load_state_dict(state["scaler"])
            self.health.load_state_dict(state["health"])
            self.skipped, self.rolled_back = int(state["skipped"]), int(state["rolled_back"])
            self.trained_s = float(state["trained_s"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.saved_path}: state.json does not say how to go on ({error}): --init {self.saved_path} takes "
                "its weights alone"
            ) from None
        for name in ("train_loss", "val_first", "val_loss", "best_val"):
            value = state.get(name)
            setattr(self, name, math.nan if value is None else float(value))
        self.best_on_disk = self.best_val
        if checkpoint is not None:
            self.store.load_moments(checkpoint.optim)

    def save(self, best: bool = False) -> Iterator[Event]:
        """Begin a save; `_saved` tells what became of it. Weights under suspicion are not saved."""
        if self.world.rank:
            return
        yield from self._saved(wait=True)
        if self.health.suspect or self.sick:
            return
        if math.isfinite(self.retry_at) and time.monotonic() < self.retry_at and not self.ended:
            if best:  # the disk has refused a moment ago; the next validation that is better will be the best again
                self.best_val = self.best_on_disk
            return
        if self.saved_path and not self.out.is_dir():
            yield Notice("warning", f"{self.out} has vanished with the checkpoints in it: made anew")
        self.saving_best, self.retry_at = self.best_val, math.inf
        self.net.settle()
        self.saver.save(self.step, self.state(), best)
        self.due_step = self.step

    def _saved(self, wait: bool = False) -> Iterator[Event]:
        """How the save under way ended, if it did. One that failed is due again, with the weights as they then are."""
        done = self.saver.finished(wait)
        if done is None:
            return
        if done.path is not None:
            self.saved_step, self.saved_path = done.step, str(done.path)
            if done.best:
                self.best_on_disk = self.saving_best
            yield Saved(done.step, str(done.path), done.best, done.ms, done.stall_ms)
            if done.stall_ms > WAITED_MS and not (self.ended or self.waited):
                self.waited = True
                waited = f"training waited {done.stall_ms / 1e3:.1f} s for a save of {done.ms / 1e3:.1f} s"
                yield Notice("warning", f"{waited}: raise --save-every")
            return
        if not isinstance(done.error, AnertError):
            raise done.error or AssertionError("a save ended with neither path nor error")
        self.due_step = self.saved_step
        if done.best:
            self.best_val = self.best_on_disk
        if done.sick:
            self.sick = str(done.error)
            return
        self.retry_at = time.monotonic() + RETRY_S
        then = "trying again" if self.ended else f"training goes on, next try in {RETRY_S:.0f} s"
        yield Notice("warning", f"step {done.step} is not saved: {done.error}; {then}")

    def _roll_back(self) -> Iterator[Event]:
        """Go back to the last good checkpoint, and on with the data that follow. NonFiniteError when that is no use."""
        from anert.inputs import place_of

        yield from self._saved(wait=True)
        why = f"step {self.step}: {self.sick or f'{self.health.bad} steps in a row were not usable ({self.why})'}"
        found, error = None, ""
        if self.world.rank == 0:
            try:
                found = self._way_back(why)
            except AnertError as refused:
                error = str(refused)
        told = self.world.share({"error": error, "place": place_of(found)})
        if told["error"]:
            raise NonFiniteError(told["error"])
        skipped, again, trained_s = self.skipped, self.rolled_back + 1, self.trained_s
        self.net.settle()
        if found is not None:
            self.store.load(found.model)
        self._restore(told["place"], found)
        for flat in self.store.flats:
            self.world.broadcast(flat)
        self.store.sync()
        self.skipped, self.rolled_back, self.trained_s = skipped, again, trained_s
        self.due_step, self.sick, self.moved = self.step, "", False
        times = f"{again} of {self.options.rollbacks} times"
        yield Notice("warning", f"{why}: back to {self.saved_path}, on with the data that follow ({times})")

    def _way_back(self, why: str) -> Checkpoint:
        """The checkpoint to go back to, those after it set aside. One from which no step was usable is not good: the
        next time the one before it is taken."""
        from anert import checkpoint

        if self.rolled_back >= self.options.rollbacks or self.saved_step < 0:
            back = f" after going back {self.rolled_back} times" if self.rolled_back else ""
            raise NonFiniteError(f"{why}{back}. {self._kept()}: lower --lr or raise --warmup")
        try:
            found = checkpoint.load(self.out, before=None if self.moved else self.saved_step)
        except InputError as error:
            raise NonFiniteError(f"{why}, and there is no way back ({error}): lower --lr or raise --warmup") from None
        checkpoint.set_aside(self.out, found.step)
        return found

    # ---- the loop

    def run(self) -> Iterator[Event]:
        try:
            yield from self._run()
        finally:
            if hasattr(self, "saver"):
                self.saver.close()

    def _run(self) -> Iterator[Event]:
        yield from self.prepare()
        self.world.hint = f"the last checkpoint stays, go on from it by --resume {self.out}"
        yield self._started()
        if self.world.rank == 0:
            self.saver.reserve()
        reason = "steps"
        if math.isnan(self.val_first):
            yield from self._validate()
        begin = time.perf_counter() - self.trained_s
        self._begin = begin
        while self.step < self.options.steps:
            if asked := self._asked():
                reason = asked
                break
            try:
                if self.health.exhausted or self.sick:
                    yield from self._roll_back()
            except NonFiniteError as error:
                yield Notice("error", str(error))
                reason = "diverged"
                break
            try:
                event = self.train_step()
            except EngineError as error:
                raise EngineError(f"step {self.step + 1}: {error}; {self._kept()}") from None
            shown = time.perf_counter()
            yield event
            if self.health.suspect and self.health.bad == 1:
                yield Notice("warning", f"step {self.step} is left out: {self.why}")
            yield from self._between()
            self.ui_ms = (time.perf_counter() - shown) * 1e3 - self._between_ms
        self.trained_s = time.perf_counter() - begin
        yield from self._finish(reason)

    def _asked(self) -> str:
        """Why the run is to end now, if it is: any rank's wish and rank 0's clock, known to all ranks at once."""
        budget, first = self.options.time_budget_s, self.world.rank == 0
        late = bool(first and budget and time.perf_counter() - self._begin >= budget)
        stop, late, sick = map(bool, self.world.sum([self.stop(), late, first and bool(self.sick)]))
        if sick and not self.sick:
            self.sick = "a weight is not finite"
        spent = self.rt.baked is not None and not self.rt.baked.affords()
        return "interrupted" if stop else "time" if late else "budget" if spent else ""

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
            peak_gflops=rt.peak_gflops() * self.world.size, ranks=self.world.size,
            options=dataclasses.asdict(o),
        )  # fmt: skip

    def train_step(self) -> StepDone:
        """One optimizer step; its update is left out where the step is not usable (`health` says why)."""
        from anert.runtime import rss_bytes

        o, net, parts = self.options, self.net, self.accum * self.world.size
        start = time.perf_counter()
        loss, data_ms, rank_ms = self._gradients()
        begin = time.perf_counter()
        norm, finite = self.optimizer.grad_norm()
        norm /= parts
        lr, clamped, scale = self.schedule(self.step), 0, self.scale.scale
        why = self.health.judge(loss, finite)
        if why:
            self.why = why + (self.where if not math.isfinite(loss) else "")
            self.skipped += 1
        else:
            factor = min(1.0, o.clip / (norm + 1e-6)) if o.clip else 1.0
            self.saver.settle()
            clamped = net.update(self.optimizer, lr, factor / parts)
            self.train_loss, self.moved, self.where = loss, True, ""
        if math.isfinite(loss):
            self.scale.update(finite)
        self.step += 1
        now = time.perf_counter()
        step_ms = (now - start) * 1e3
        self.step_ms.append(step_ms)
        tokens_done = o.batch * o.grad_accum * self.config.seq_len
        optimizer_ms = net.ms.get("optimizer", 0.0) + (now - begin) * 1e3
        ms = {"data": data_ms, **net.ms, "optimizer": optimizer_ms, "dashboard": self.ui_ms}
        elapsed = now - self._begin
        return StepDone(
            step=self.step, loss=loss, lr=lr, grad_norm=norm, loss_scale=scale, skipped=bool(why),
            tokens=tokens_done, step_ms=step_ms, ms=ms, flops=net.flops * parts,
            tokens_per_s=tokens_done / step_ms * 1e3,
            elapsed_s=elapsed, eta_s=self._eta(elapsed), rss_bytes=rss_bytes(), compiles=self.rt.backend.compiles,
            amax=net.amax()[0], clamped=clamped, rank_ms=rank_ms,
        )  # fmt: skip

    def _gradients(self) -> tuple[float, float, tuple[float, ...]]:
        """Gradients of a step, summed over micro-batches and ranks: (mean loss, ms for data, ms by rank if several)."""
        net, world, summing = self.net, self.world, self.gradient_sum
        start = time.perf_counter()
        net.ms.clear()
        net.zero_grad()
        data_ms, losses = 0.0, 0.0
        for i in range(self.accum):
            fetch = time.perf_counter()
            tokens, targets = next(self.batches)
            data_ms += (time.perf_counter() - fetch) * 1e3
            if summing and i == self.accum - 1:
                summing.armed = True
            loss = net.loss_backward(tokens, targets, self.scale.scale)
            if not math.isfinite(loss) and math.isfinite(losses) and not self.health.bad:
                self.where = f", first in {net.name_nonfinite()}"
            losses += loss
        if summing is None:
            return losses / self.accum, data_ms, ()
        rank_ms = [0.0] * world.size
        rank_ms[world.rank] = (time.perf_counter() - start) * 1e3
        net.ms["allreduce"] = net.ms.get("allreduce", 0.0) + summing.finish()
        self.store.grads_written()
        losses, *rank_ms = world.sum([losses, *rank_ms])
        return losses / self.accum / world.size, data_ms, tuple(rank_ms)

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
        yield from self._saved()
        if due and o.eval_every and self.step % o.eval_every == 0:
            yield from self._validate()
        if due and o.sample_every and self.step % o.sample_every == 0 and self.world.rank == 0:
            yield self._sample()
        every = o.save_every and self.step % o.save_every == 0
        if due and (every or time.monotonic() >= self.retry_at) and self.due_step != self.step:
            yield from self.save()
        self._between_ms = (time.perf_counter() - start) * 1e3

    def _validate(self) -> Iterator[Event]:
        """Mean loss over the fixed validation windows; the best one so far is saved as `best`."""
        start, o, world = time.perf_counter(), self.options, self.world
        self.net.settle()
        if self.rt.baked and not self.rt.baked.affords():
            yield Notice("warning", f"step {self.step} is not validated: too few compiles are left to bake its weights")
            return
        total, count, number, n = 0.0, 0.0, 0, self.net.n
        whole, told = o.eval_tokens or self.data.dataset.val_tokens, start
        for tokens, targets in self.data.dataset.val_windows(o.batch, o.eval_tokens):
            for at in range(0, tokens.size, n):
                if number % world.size == world.rank:
                    loss, counted = self.net.loss(tokens[at : at + n], targets[at : at + n])
                    total, count = total + loss * counted, count + counted
                number += 1
                if time.perf_counter() - told > 0.5:
                    told = time.perf_counter()
                    yield Progress("validate", min(number * n, whole), whole, "tokens")
        total, count = world.sum([total, count])
        if world.size > 1:
            self.net.settle()
            world.require_equal("weights", hashlib.sha256(self.store.master.data).hexdigest())
        if not count:
            return
        self.val_loss = total / count
        if math.isnan(self.val_first):
            self.val_first = self.val_loss
        best = math.isfinite(self.val_loss) and not self.val_loss >= self.best_val
        if best:
            self.best_val = self.val_loss
        yield Validated(self.step, self.val_loss, int(count), best, (time.perf_counter() - start) * 1e3)
        if best and self.step:
            yield from self.save(best=True)

    def _sample(self, max_tokens: int = 200, seconds: float = 1.0) -> Sampled:
        from anert.events import Text
        from anert.sample import Limits, tell
        from anert.sampler import Sampler

        start = time.perf_counter()
        self.net.settle()
        settings = Sampler(temperature=0.8, top_k=50, seed=self.options.seed)
        told = tell(
            self.sampler, self.data.tokenizer, self.options.sample_prompt, settings, Limits(max_tokens, seconds)
        )
        text = "".join(event.text for event in told if isinstance(event, Text))
        return Sampled(self.step, text, (time.perf_counter() - start) * 1e3)

    def _finish(self, reason: str) -> Iterator[Event]:
        self.ended = True
        self.net.settle()
        yield from self._saved(wait=True)
        (moved,) = self.world.sum([self.world.rank == 0 and self.step > self.saved_step])
        if reason != "diverged" and moved:
            if reason not in ("interrupted", "budget"):
                yield from self._validate()
            yield from self._save_last()
            if math.isfinite(self.retry_at):
                reason = "unsaved"
            elif self.step > self.saved_step and self.world.rank == 0:
                yield Notice("warning", f"the last {self.health.bad} steps were not usable, so not saved ({self.why}). "
                                        f"{self._kept()}")  # fmt: skip
            if reason not in ("interrupted", "budget") and self.options.sample_every and self.world.rank == 0:
                yield self._sample(500, seconds=5.0)  # a whole story
        yield RunDone(reason, self.summary())
        self.rt.close()

    def _save_last(self) -> Iterator[Event]:
        """Save where the run ended; what the disk refuses is tried again, not for ever."""
        for left in reversed(range(LAST_TRIES)):
            yield from self._saved(wait=True)
            if self.step > self.saved_step:
                yield from self.save()
                yield from self._saved(wait=True)
            if self.step <= self.saved_step or not math.isfinite(self.retry_at) or not left:
                return
            time.sleep(1.0)

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
            "rollbacks": self.rolled_back, "ranks": self.world.size,
            "checkpoint": self.saved_path, "backend": self.rt.backend.name, "precision": self.rt.precision,
            "threads": self.rt.pool.threads, "rss_mb": rss_bytes() / 2**20, "out": str(self.out),
            **({"baked": self.rt.baked.compiles, "bake_ms": self.rt.baked.ms} if self.rt.baked else {}),
        }  # fmt: skip


def train(plugin: Plugin, preset: str, config: Any, options: TrainOptions, stop: Callable[[], bool]) -> Iterator[Event]:
    """Train a preset of a plugin; yields events until RunDone. `stop` turning true ends the run after a step, saved.

    Raises AnertError subclasses for bad input before the first step; divergence is a RunDone with reason `diverged`.
    """
    return Trainer(plugin, preset, config, options, stop).run()
