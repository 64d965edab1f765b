"""`anert verify resume` says yes to a run that resumes to the bit, and finds what is left out of a checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest
from small_run import OPTIONS, SHAPE, STORIES, flags, write_text

from anert import train, verify
from anert.cli import main
from anert.data import TrainBatches
from anert.errors import InputError
from anert.health import Health
from anert.optim import LossScale
from anert.param import ParamStore
from anert.plugin import load
from anert.train import TrainOptions


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "small.txt")


def checks_of(text, steps=12, **options):
    plugin = load(str(STORIES))
    o = TrainOptions(**{**OPTIONS, "data": str(text), "steps": steps, **options})
    run = verify.resume(plugin, "tiny", dataclasses.replace(plugin.preset("tiny").config, **SHAPE), o)
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def test_every_kind_of_moment_is_interrupted_and_bits_are_equal(text):
    checks = checks_of(text, steps=20)
    assert all(c.ok for c in checks), checks
    said = " ".join(c.value for c in checks)
    for moment in ("about to grow", "just grown", "inside its accumulation window", "just turned", "at a validation"):
        assert moment in said, moment
    assert "1 and 2 threads are equal: 20 steps" in said


def nothing(self, state):
    pass


MUTANTS = {
    "data cursor": (TrainBatches, "load_state_dict", nothing, "loss of step"),
    "loss scale": (LossScale, "load_state_dict", nothing, "loss scale of step"),
    "moments": (ParamStore, "load_moments", nothing, "loss of step|gradient norm of step"),
    "health": (Health, "load_state_dict", nothing, "state health differs"),
}


@pytest.mark.parametrize("what", MUTANTS)
def test_what_a_resumed_run_forgets_is_found(text, monkeypatch, what):
    import re

    owner, name, mutant, says = MUTANTS[what]
    monkeypatch.setattr(owner, name, mutant)
    wrong = [c for c in checks_of(text) if not c.ok]
    assert wrong and any(re.search(says, c.value) for c in wrong), wrong
    assert not any(c.id == "threads" for c in wrong)


def test_a_result_that_depends_on_the_thread_count_is_found(text, monkeypatch):
    real = train.Trainer.train_step

    def step(self):
        if self.rt.pool.threads == 2 and self.step == 5:
            self.store.master[7] += 1e-7
        return real(self)

    monkeypatch.setattr(train.Trainer, "train_step", step)
    assert [c.id for c in checks_of(text) if not c.ok] == ["threads"]


def arguments(text, out, **more):
    words = flags(text, out, **more)
    at = words.index("--ui")
    return ["verify", "resume", *words[:at], *words[at + 2 :]]


def test_the_verb(text, tmp_path, capsys, monkeypatch):
    assert main([*arguments(text, tmp_path, steps=8), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["steps"] == 8 and {c["id"] for c in found["checks"]} >= {"interrupted", "threads"}
    monkeypatch.setattr(LossScale, "load_state_dict", nothing)
    assert main(arguments(text, tmp_path, steps=8)) == 1
    assert "BAD  interrupted  loss scale of step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "usage"),
        (["resume"], "expected: anert verify resume PLUGIN"),
        (["resume", "nowhere.py"], "nowhere.py"),
        (["resume", str(STORIES), "--steps", "2"], "--steps 2: 4 at least"),
        (["resume", str(STORIES), "--resume", "x"], "starts from scratch"),
        (["bits", str(STORIES)], "expected: anert verify resume"),
    ],
)
def test_bad_input(words, says, capsys):
    assert main(["verify", *words]) == 2
    assert says in "".join(capsys.readouterr())


def test_data_that_are_too_few(tmp_path):
    (tmp_path / "few.txt").write_text("only a few words " * 8)
    with pytest.raises(InputError, match="tokens"):
        checks_of(tmp_path / "few.txt")
