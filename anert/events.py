"""Typed events: what a verb yields and all else (dashboard, JSONL, tests, notebooks) reads. No prints to parse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events; `as_dict` is the JSONL form, with the class name under `event`."""

    def as_dict(self) -> dict[str, Any]:
        return {"event": type(self).__name__, **{name: getattr(self, name) for name in self.__dataclass_fields__}}


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """A sentence for the log. level: `info`, `warning` or `error`."""

    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """A wait of over a second: `done` of `total` (0: unknown) `unit`s of `task`."""

    task: str
    done: float
    total: float
    unit: str = ""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """Everything is compiled and loaded; the first step comes next."""

    plugin: str
    preset: str
    config: dict[str, Any]
    n_params: int
    backend: str
    precision: str
    threads: int
    isa: str
    layout: str
    kernels: int
    compiles: int
    compile_budget: int
    compile_ms: float
    dataset: str
    train_tokens: int
    val_tokens: int
    tokenizer: str
    tokens_per_step: int
    steps: int
    first_step: int
    """0, or the step that a resumed run continues from."""
    time_budget_s: float
    out_dir: str
    memory_bytes: int
    """Estimate of what the run needs."""
    peak_gflops: float
    """Measured on this machine at this precision, times the ranks; 0 where it was not measured."""
    ranks: int = 1
    """Processes that share the run; `threads` are those of each."""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer step. `ms` splits `step_ms` into report.PARTS: data, forward, head, backward, ..., dashboard.

    Where engine and host work side by side, the parts together exceed `step_ms` by `ms["overlapped"]`. An update of
    weights that goes along with the next step's forward counts there.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    skipped: bool
    tokens: int
    step_ms: float
    ms: dict[str, float]
    flops: int
    """Executed by the programs, GEMMs and head of this step."""
    tokens_per_s: float
    elapsed_s: float
    eta_s: float
    rss_bytes: int
    compiles: int
    amax: float = 0.0
    """Largest magnitude on the residual stream in this step."""
    clamped: int = 0
    """Weights that were clamped to +-65504 when written as fp16."""
    rank_ms: tuple[float, ...] = ()
    """Of several ranks: how long each took to its gradients; who waits for whom."""


@dataclass(frozen=True, slots=True)
class Validated(Event):
    step: int
    loss: float
    tokens: int
    best: bool
    ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Sampled(Event):
    """A story from the model as it is now."""

    step: int
    text: str
    ms: float


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """A checkpoint is whole on disk. `ms`: how long it took; `stall_ms`: how long training waited for it."""

    step: int
    path: str
    best: bool
    ms: float
    stall_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class RunDone(Event):
    """The end, however it came. reason: `steps`, `time`, `interrupted` or `diverged`; `summary`: design.md 11."""

    reason: str
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text(Event):
    """A piece of sample `index`, as it comes."""

    text: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Told(Event):
    """The end of a text. reason: `length`, `end` (bos or eos), `stop` or `time`; slid: how often the context slid."""

    index: int
    seed: int
    prompt_tokens: int
    tokens: int
    """New ones."""
    reason: str
    slid: int
    prefill_ms: float
    """0: the prompt had been read, for a text before."""
    decode_ms: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_ms * 1e3 if self.prefill_ms else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the tokens behind the first: that one comes from the prefill."""
        return (self.tokens - 1) / self.decode_ms * 1e3 if self.tokens > 1 and self.decode_ms else 0.0


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """Loss (nats) of a model on a text, with its 95 % interval (NaN from a single window)."""

    loss: float
    loss_low: float
    loss_high: float
    perplexity: float
    bits_per_byte: float
    """NaN where the predicted ids stand for no text."""
    tokens: int
    bytes: int
    windows: int
