"""Proofs. `resume`: a run that is interrupted and resumed has the bits of the one that is not. `tokens`: token files
are to the last bit what was written.

What `resume` compares: the loss, gradient norm and loss scale of every step, every validation, and at the end the
sha256 of every weight and moment and of what else a checkpoint carries on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anert.errors import InputError
from anert.events import Event, Notice, Progress, RunDone, StepDone, Validated

if TYPE_CHECKING:
    from anert.plugin import Plugin
    from anert.train import TrainOptions

EPOCHS = 2.3
"""How often a verified run sees its data: the epoch turns inside an accumulation window."""

OWN = ("plugin", "preset", "config", "options", "trained_s")
"""Of a checkpoint's state, what says where a run comes from and how long it took, not how it goes on."""


@dataclass(frozen=True, slots=True)
class Check:
    """One sentence that held or did not; `value` says what was seen."""

    id: str
    ok: bool
    value: str


@dataclass(slots=True)
class Trace:
    """What a run did: figures by step, and where it left its last checkpoint."""

    steps: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """step -> (loss scale, skipped, loss, gradient norm): a wrong scale is told before the loss that it makes wrong"""
    validated: dict[int, float] = field(default_factory=dict)
    out: Path = Path()
    digests: dict[str, str] = field(default_factory=dict)

    def first_difference(self, other: Trace) -> str:
        """Where two runs part, in words; "" where they do not."""
        for step, figures in self.steps.items():
            for name, a, b in zip(("loss scale", "skipped", "loss", "gradient norm"), figures,
                                  other.steps.get(step, ()), strict=False):  # fmt: skip
                if a != b and (a == a or b == b):
                    return f"{name} of step {step} is {b!r}, not {a!r}"
            if step not in other.steps:
                return f"step {step} is missing"
        for step, loss in self.validated.items():
            if other.validated.get(step) != loss:
                return f"validation at step {step} is {other.validated.get(step)!r}, not {loss!r}"
        for name, digest in self.digests.items():
            if other.digests.get(name) != digest:
                return f"{name} differs at the end"
        return ""


def resume(
    plugin: Plugin, preset: str, config: Any, options: TrainOptions, work: Path | None = None
) -> Generator[Event, None, list[Check]]:
    """Train a few steps straight and interrupted, with 1 and with 2 threads; returns the checks.

    options: of the run to verify; the data are cut so that epochs turn, the loss scale moves every few steps, and
    gradients are accumulated. Works in `work`, or in a directory of its own that goes at the end.
    """
    with tempfile.TemporaryDirectory(prefix="anert-verify-") as folder:
        base = work or Path(folder)
        options = yield from _arranged(plugin, preset, config, options, base)

        def run(name: str, stops: list[int], threads: int) -> Generator[Event, None, Trace]:
            yield Notice("info", f"{name}: {threads} thread{'s'[: threads != 1]}, {len(stops)} interruptions")
            o = dataclasses.replace(options, out=str(base / name), threads=threads)
            return (yield from _run(plugin, preset, config, o, stops))

        straight = yield from run("straight", [], 1)
        cuts = _cuts(straight, options, _windows(options, config))
        interrupted = yield from run("interrupted", sorted(cuts), 1)
        two = yield from run("two-threads", [], 2)
        return _checks(straight, interrupted, two, cuts)


def _arranged(
    plugin: Plugin, preset: str, config: Any, options: TrainOptions, base: Path
) -> Generator[Event, None, TrainOptions]:
    """`options` with little data and much happening: epochs, loss scale, accumulation, validation, in a few steps."""
    from anert.data import TokenWriter, open_tokens
    from anert.inputs import Weights, open_data

    if options.steps < 4:
        raise InputError(f"--steps {options.steps}: 4 at least are needed for something to happen in them")
    accum = max(2, options.grad_accum)
    data = yield from open_data(plugin, plugin.preset(preset), config, options, base, Weights(config))
    kind, seq_len = data.tokenizer, config.seq_len
    n = max(2, int(options.steps * options.batch * accum / EPOCHS))
    n += n % (options.batch * accum) == 0
    tokens = open_tokens(data.dataset.path, options.data_dtype).tokens
    if len(tokens) < 3 * seq_len + 2:
        raise InputError(f"{data.name} has {len(tokens):,} tokens: {3 * seq_len + 2:,} at least are needed")
    n = min(n, (len(tokens) - 1) // seq_len - 1)
    parts = {"train": tokens[: n * seq_len + 1], "val": tokens[-2 * seq_len - 1 :]}
    for name, ids in parts.items():
        with TokenWriter(base / f"{name}.bin", kind.vocab_size, kind.bos_id, kind.eos_id, kind.hash) as writer:
            writer.write(ids.tolist())
    vocabulary = base / f"tokenizer{kind.suffix}"
    kind.save(vocabulary)
    return dataclasses.replace(
        options, data=str(base / "train.bin"), val=str(base / "val.bin"), data_dtype="auto",
        tokenizer=str(vocabulary), grad_accum=accum,
        loss_scale="dynamic", scale_window=2, eval_every=3, eval_tokens=2 * seq_len, save_every=0, sample_every=0,
        time_budget_s=0.0, init="scratch",
    )  # fmt: skip


def _windows(options: TrainOptions, config: Any) -> int:
    """Training windows in the data of `_arranged`."""
    from anert.data import open_tokens

    return (len(open_tokens(options.data).tokens) - 1) // config.seq_len


def _run(
    plugin: Plugin, preset: str, config: Any, options: TrainOptions, stops: list[int]
) -> Generator[Event, None, Trace]:
    """Train, stopping after each of the steps `stops` and resuming from the checkpoint."""
    from anert.train import train

    trainer: Callable[..., Iterator[Event]] = plugin.train_with or train
    trace = Trace(out=Path(options.out))
    for n, until in enumerate([*stops, options.steps]):
        reached = 0

        def stop(until: int = until) -> bool:
            return reached >= until  # noqa: B023

        o = dataclasses.replace(options, init="resume") if n else options
        for event in trainer(plugin, preset, config, o, stop):
            match event:
                case StepDone():
                    reached = event.step
                    trace.steps[event.step] = (event.loss_scale, float(event.skipped), event.loss, event.grad_norm)
                    yield Progress(trace.out.name, event.step, options.steps, "steps")
                case Validated():
                    trace.validated[event.step] = event.loss
                case RunDone(reason=reason) if reason not in ("steps", "interrupted"):
                    raise InputError(f"the run itself ended as {reason!r} after step {reached}: nothing to verify")
    trace.digests = _digests(trace.out)
    return trace


def _digests(run_dir: Path) -> dict[str, str]:
    """sha256 of everything that the last checkpoint carries on, by name."""
    from anert import checkpoint

    found = checkpoint.load(run_dir)
    tensors = {f"weight {name}": t for name, t in found.model.items()}
    tensors |= {f"moment {name}": t for name, t in found.optim.items()}
    digests = {name: hashlib.sha256(t.tobytes()).hexdigest() for name, t in tensors.items()}
    return digests | {f"state {name}": repr(value) for name, value in found.state.items() if name not in OWN}


def _cuts(straight: Trace, options: TrainOptions, windows: int) -> dict[int, str]:
    """Steps to interrupt after, and what each interruption lies across."""
    steps = sorted(straight.steps)
    per_step = options.batch * options.grad_accum
    cuts: dict[int, str] = {}

    def cut(step: int, why: str) -> None:
        if 0 < step < options.steps:
            cuts[step] = f"{cuts[step]}, {why}" if step in cuts else why

    scales = [straight.steps[s][0] for s in steps]
    change = next((s for s, a, b in zip(steps, scales, scales[1:], strict=False) if b > a), 0)
    cut(change, "the loss scale has just grown")
    cut(change - 1, "the loss scale is about to grow")
    cut(next((s for s in steps if straight.steps[s][1]), 0), "the step was skipped for overflow")
    turn = next((s for s in steps if s * per_step // windows and s * per_step % windows), 0)
    cut(turn - 1, "the epoch turns in the next step, inside its accumulation window")
    cut(turn, "the epoch has just turned")
    cut(next((s for s in steps if s > turn and s % options.eval_every == 0), 0), "at a validation")
    cut(next((s for s in steps if s > turn and s not in cuts), 0), "nothing in particular")
    return cuts


def _checks(straight: Trace, interrupted: Trace, two: Trace, cuts: dict[int, str]) -> list[Check]:
    checks = []
    bounds = sorted(cuts)
    for at, then in zip(bounds, [*bounds[1:], max(straight.steps)], strict=True):
        part = Trace({s: f for s, f in straight.steps.items() if at < s <= then})
        wrong = part.first_difference(interrupted)
        checks.append(Check(f"resume.{at}", not wrong, wrong or f"interrupted after step {at}: {cuts[at]}"))
    for name, other in (("interrupted", interrupted), ("threads", two)):
        wrong = straight.first_difference(other)
        what = "interrupted and straight runs" if name == "interrupted" else "1 and 2 threads"
        count = f"{len(straight.steps)} steps, {len(straight.validated)} validations, {len(straight.digests)} hashes"
        checks.append(Check(name, not wrong, wrong or f"{what} are equal: {count}"))
    return checks


def tokens(path: Path) -> Generator[Event, None, list[Check]]:
    """Read all of a directory of shards, or of a token file; returns the checks, a file each.

    Shards: sha256 of every file against the manifest. A file of ours: every id is of its vocabulary, documents begin in
    order. Raises InputError where header or manifest cannot be read, or the file has neither.
    """
    from anert.data.shards import damaged, is_shards, read_manifest
    from anert.data.token_file import check_ids, open_tokens

    if is_shards(path):
        total, done, checks = sum(f["bytes"] for f in read_manifest(path)[1]["files"]), 0, list[Check]()
        for name, wrong, size in damaged(path):
            done += size
            checks.append(Check(name, not wrong, wrong or f"{size:,} bytes, sha256 as written"))
            yield Progress("verify", done, total, "B")
        return checks
    file = open_tokens(path)
    if not file.vocab_size:
        raise InputError(f"{path}: {file.kind} tokens, which say neither vocabulary nor checksum: nothing to verify by")
    n, starts = len(file.tokens), file.documents
    try:
        check_ids(file.tokens, file.vocab_size, path)
    except InputError as error:
        return [Check(path.name, False, str(error))]
    if starts is not None and (bool((starts[1:] < starts[:-1]).any()) or int(starts[-1]) > n):
        return [Check(path.name, False, "its documents do not begin in order: damaged token file")]
    return [Check(path.name, True, f"{n:,} ids, all of the vocabulary of {file.vocab_size:,}")]
