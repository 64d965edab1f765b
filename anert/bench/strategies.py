"""Weights as tensors against weights baked into the programs: the same run of `anert run` by each strategy, one behind
the other in turns, read from its event log.

A baked run ends its process when the compile budget is spent, saved; a fresh process goes on. Its losses must be those
of the other run, to the bit: the programs are the same but for where the weights come from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anert.bench.measure import Result
from anert.bench.options import BenchOptions
from anert.errors import AnertError, InputError
from anert.events import Event, Progress

ROUNDS = 1
STEPS = 12
BUDGET = 100
STRATEGIES = ("tensors", "baked")
ABOUT = ("backend", "precision", "threads", "isa", "layout", "compile_budget")


@dataclass(frozen=True, slots=True)
class Run:
    """What the log of a run says, over all of its processes."""

    losses: tuple[float, ...]
    step_ms: tuple[float, ...]
    seconds: float
    """From the first process's being ready to the last step's end: saves and restarts are in it."""
    tokens: int
    compiles: int
    compile_ms: float
    """Of all compiles; for a baked run those of its weights, with text, weight files and binding."""
    steps_by_process: tuple[int, ...]
    n_params: int
    about: dict[str, Any]


def results(options: BenchOptions, rounds: int) -> Iterator[Event | Result]:
    """Raises AnertError for a run that failed, and where the losses of the two strategies differ."""
    if options.peers:
        raise InputError(f"bench strategies has no peer {options.peers[0][0]!r}")
    options.model()  # refuses what cannot be before anything is written
    runs: dict[str, list[Run]] = {name: [] for name in STRATEGIES}
    with tempfile.TemporaryDirectory(prefix="anert-strategies-") as folder:
        for turn in range(rounds):
            for i, name in enumerate(STRATEGIES):
                yield Progress("runs", turn * len(STRATEGIES) + i, rounds * len(STRATEGIES), "runs")
                runs[name].append(_train(options, name, Path(folder), turn))
    tensors, baked = (runs[name] for name in STRATEGIES)
    if any(run.losses != tensors[0].losses for run in (*tensors, *baked)):
        pairs = zip(tensors[0].losses, baked[0].losses, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
        raise AnertError(
            f"bench strategies: the losses differ from step {first + 1} on ({tensors[0].losses[first]} by tensors, "
            f"{baked[0].losses[first]} by baked weights): one of the two is wrong, so neither is reported"
        )
    yield from _table(tensors, baked, sync_ms(options))


def _train(options: BenchOptions, strategy: str, folder: Path, turn: int) -> Run:
    """A run in processes of its own."""
    out = folder / f"{strategy}-{turn}"
    given = {
        "strategy": strategy, "steps": options.steps or STEPS, "batch": options.batch, "backend": options.backend,
        "precision": options.precision, "layout": options.layout, "threads": options.threads, "out": out,
        "compile_budget": options.compile_budget or BUDGET, "eval_every": 0, "sample_every": 0, "save_every": 0,
        "eval_tokens": 512, "warmup": 2, "keep": 1, "time_budget": 0,
    }  # fmt: skip
    first = folder / f"{STRATEGIES[0]}-0" / "data"
    if options.data:
        given["data"] = options.data
    elif texts := sorted(first.glob("*.txt")):
        given["data"] = texts[0]
    if (first / "tokenizer.json").exists():
        given["tokenizer"] = first / "tokenizer.json"
    command = [sys.executable, "-m", "anert", "run", options.plugin, "--ui", "plain"]
    for name, value in given.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    for name, number in (*([("seq_len", options.seq_len)] if options.seq_len else []), *options.overrides):
        command += ["--set", f"{name}={number}"]
    env = {**os.environ, "ANERT_CACHE": "off"}  # a plan from an earlier run would be no compile
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise AnertError(
            f"bench strategies: the {strategy} run failed: {(done.stderr.splitlines() or ['no word'])[-1]}"
        )
    return read_run([json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()])


def read_run(events: Sequence[dict[str, Any]]) -> Run:
    """A Run of the lines of an event log."""
    started = [e for e in events if e["event"] == "RunStarted"]
    steps = [e for e in events if e["event"] == "StepDone"]
    ended = [e["summary"] for e in events if e["event"] == "RunDone"]
    first = [e["first_step"] for e in started]
    return Run(
        losses=tuple(e["loss"] for e in steps), step_ms=tuple(e["step_ms"] for e in steps),
        seconds=steps[-1]["time"] - started[0]["time"],
        tokens=sum(e["tokens"] for e in steps), compiles=sum(s["compiles"] for s in ended),
        compile_ms=sum(s.get("bake_ms", 0.0) for s in ended) or started[0]["compile_ms"],
        steps_by_process=tuple(s["steps"] - at for s, at in zip(ended, first, strict=True)),
        n_params=started[0]["n_params"],
        about={name: started[0][name] for name in ABOUT},
    )  # fmt: skip


def _table(tensors: Sequence[Run], baked: Sequence[Run], syncs: Sequence[float]) -> Iterator[Result]:
    for name, runs in zip(STRATEGIES, (tensors, baked), strict=True):
        base = tensors if runs is baked else None

        def row(what: str, unit: str, values: Sequence[float], than: Sequence[float] = (), faster: int = 0,
                said: str = "", label: str = name, of: Sequence[Run] = runs) -> Result:  # fmt: skip
            """faster: -1 where less is better, 1 where more is."""
            p10, median, p90 = (float(np.percentile(values, q)) for q in (10, 50, 90))
            ratio = (median / float(np.median(than))) ** faster if len(than) else None
            notes = {**of[0].about, **({"said": said} if said else {})}
            return Result(f"{label}: {what}", unit, median, p10, p90, len(values),
                          baseline=f"tensors: {what}" if len(than) else "", ratio=ratio, notes=notes)  # fmt: skip

        def each(field: str, of: Sequence[Run] | None) -> list[float]:
            return [x for run in of or () for x in getattr(run, field)]

        yield row("step", "ms", each("step_ms", runs), each("step_ms", base), -1)
        speed = [run.tokens / run.seconds for run in runs]
        yield row("whole run", "tok/s", speed, [r.tokens / r.seconds for r in base or ()], 1)
        yield row("compiles", "programs", [run.compiles for run in runs])
        if base is None:
            yield row("compile, once", "ms", [run.compile_ms for run in runs])
            yield row("compile an update", "ms", [0.0], said="none: weights are inputs")
            yield row("weight sync an update", "ms", syncs, said="every fp16 copy written from its master")
        else:
            yield row("compile an update", "ms", [run.compile_ms / len(run.losses) for run in runs])
            first = [float(run.steps_by_process[0]) for run in runs]
            spent = "" if len(runs[0].steps_by_process) > 1 else "the budget outlasted the run"
            yield row("steps until the budget is spent", "steps", first, said=spent)
        yield row("restarts", "", [len(run.steps_by_process) - 1.0 for run in runs])
    yield Result("losses equal to the bit", "steps", len(tensors[0].losses), len(tensors[0].losses),
                 len(tensors[0].losses), 1, notes=tensors[0].about)  # fmt: skip


def sync_ms(options: BenchOptions, n: int = 5) -> list[float]:
    """How long it takes to write every fp16 copy of the model's weights: what an update costs where they are inputs."""
    from anert.bench.model import Bench

    bench, found = Bench(replace(options, data=""), train=True), []
    for _ in range(n):
        start = time.perf_counter()
        bench.store.sync()
        found.append((time.perf_counter() - start) * 1e3)
    return found
