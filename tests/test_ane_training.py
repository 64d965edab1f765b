"""Whole runs of `tiny` through shim and stand-in: the losses of backend cpu, bit for bit, from the same MIL text."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anert import capabilities, checkpoint
from anert.backend.cpu import CpuBackend
from anert.capabilities import ANE
from anert.errors import EngineError
from anert.events import RunStarted, StepDone, Validated
from anert.plugin import load
from anert.runtime import Runtime
from anert.tokenizer import ByteBPETokenizer
from anert.train import TrainOptions, train

STEPS = int(os.environ.get("ANERT_TEST_STEPS", "200"))  # fewer where a step takes long: under an emulator


@pytest.fixture(scope="module")
def stories():
    return load(str(Path(__file__).resolve().parents[1] / "plugins" / "stories.py"))


@pytest.fixture(scope="module")
def corpus(stories, tmp_path_factory):
    """(text, tokenizer): a tenth of the plugin's own corpus and what it trains on it."""
    folder = tmp_path_factory.mktemp("corpus")
    text, tokenizer = folder / "tales.txt", folder / "tokenizer.json"
    stories.datasets["storybook"](text, 0.4, 1337, lambda done, total: None)
    ByteBPETokenizer.train(text.read_text("utf-8").split("\n\n"), 1024).save(tokenizer)
    return text, tokenizer


class Watched(CpuBackend):
    """Backend cpu that notes the MIL text of every compile."""

    texts: list[str]

    def _compile(self, text, blobs):
        self.texts.append(text)
        return super()._compile(text, blobs)


def run(stories, corpus, out, backend, layout, steps, precision="fp32", **over):
    """(losses, validation losses, RunStarted, summary) of a run."""
    text, tokenizer = corpus
    preset = stories.preset("tiny")
    options = TrainOptions(
        steps=steps, batch=1, warmup=20, lr=1e-3, data=str(text), tokenizer=str(tokenizer), out=str(out),
        eval_every=steps // 2, eval_tokens=1024, sample_every=steps // 2, save_every=steps * 7 // 10, backend=backend,
        layout=layout, precision=precision, threads=1, seed=7, **over,
    )  # fmt: skip
    events = list(train(stories, "tiny", preset.config, options, lambda: False))
    started = next(e for e in events if isinstance(e, RunStarted))
    return (
        [e.loss for e in events if isinstance(e, StepDone)],
        [e.loss for e in events if isinstance(e, Validated)],
        started,
        events[-1].summary,
    )


@pytest.fixture
def probed(monkeypatch, tmp_path):
    """A record of doctor's for this machine: the safe capabilities."""
    monkeypatch.setenv("ANERT_CAPABILITIES", str(tmp_path / "capabilities.json"))
    capabilities.write_record(replace(ANE, compile_budget=1000), {})


@pytest.mark.parametrize(
    ("layout", "fusion", "steps"),
    [("ports", "blocks", STEPS), ("packed", "blocks", STEPS), ("packed", "auto", min(STEPS, 60))],
    ids=["ports", "packed", "chosen"],
)
def test_a_run_has_the_losses_of_backend_cpu(
    fake_ane, stories, corpus, tmp_path, monkeypatch, probed, layout, fusion, steps
):
    """With blocks apart as any backend has them, and with the boundaries that a run chooses for an engine."""
    fake = fake_ane(seal=1)
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake.path)
    losses, validation, started, summary = run(stories, corpus, tmp_path / "ane", "ane", layout, steps, fusion=fusion)
    counts = fake.counts()
    assert started.backend == summary["backend"] == "ane" and started.layout == layout
    assert counts.compiles == summary["compiles"] == summary["kernels"] == len(set(fake.compiler.texts))
    assert counts.refused == 0 and counts.evaluates > steps * (4 * 7 if fusion == "blocks" else 12)

    texts: list[str] = []
    monkeypatch.setattr(Watched, "texts", texts, raising=False)
    same = replace(ANE, compile_budget=1000)
    if fusion == "auto":
        monkeypatch.setattr(Watched, "name", "ane")  # then a run chooses as for an engine
    monkeypatch.setattr(Runtime, "_open", lambda rt, asked: (
        Watched(rt.pool, rt.precision, rt.heap, capabilities=same), ""))  # fmt: skip
    wanted = run(stories, corpus, tmp_path / "cpu", "cpu", layout, steps, fusion=fusion)
    assert len(losses) == steps and losses == wanted[0]
    assert validation == wanted[1] and losses[-1] < losses[0] - min(1, steps / 200)
    for step in (f"step-{steps * 7 // 10:08}", f"step-{steps:08}"):
        mine, theirs = (checkpoint.load(tmp_path / backend / step) for backend in ("ane", "cpu"))
        for a, b in ((mine.model, theirs.model), (mine.optim, theirs.optim)):
            assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert set(texts) == set(fake.compiler.texts) and summary["compiles"] == wanted[3]["compiles"]


def test_an_engine_that_fails_ends_the_run_and_leaves_the_checkpoint(fake_ane, stories, corpus, tmp_path, monkeypatch,
                                                                     probed):  # fmt: skip
    fake = fake_ane()
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake.path)
    text, tokenizer = corpus
    options = TrainOptions(steps=20, data=str(text), tokenizer=str(tokenizer), out=str(tmp_path), eval_every=0,
                           eval_tokens=256, sample_every=0, save_every=2, backend="ane", threads=1)  # fmt: skip
    seen = []
    with pytest.raises(EngineError, match=r"step 6: the engine refuses to evaluate.*code 8.*stays at .*step-0000000"):
        for event in train(stories, "tiny", stories.preset("tiny").config, options, lambda: False):
            seen.append(event)
            if isinstance(event, StepDone) and event.step == 5:
                fake.set(evaluate_failures=1)
    assert [e.step for e in seen if isinstance(e, StepDone)] == [1, 2, 3, 4, 5]
    assert checkpoint.load(tmp_path).step in (2, 4)
