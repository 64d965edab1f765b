"""Training when things go wrong: a disk that refuses, a directory that vanishes, weights that are led astray."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from power import Disk, build_shim
from small_run import ROOT, bits, events, flags, notices, trainer, write_text

from anert import checkpoint, train
from anert import events as ev
from anert.cli import main
from anert.errors import NativeError
from anert.health import SETTLED, Health
from anert.report import EventLog, Off, follow


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "small.txt")


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    list(trainer(text, out, steps=40).run())
    return bits(out)


# ---- disks

CHILD = """
import json, os, shutil, sys, time
from pathlib import Path
from anert import checkpoint, train
from anert import events as ev
import small_run
train.RETRY_S = 0.01
text, out, refusal, code, until = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5])
run = small_run.trainer(text, out, steps=40)
for event in run.run():
    if isinstance(event, ev.StepDone) and event.step == 11:
        run.saver._idle.wait()  # step 10 is on the disk
        if code == "vanish":
            shutil.rmtree(out)
        else:
            Path(refusal + ".part").write_text(code)
            os.rename(refusal + ".part", refusal)
    if isinstance(event, ev.StepDone) and event.step in (13, until):
        run.saver._idle.wait()  # the save before has been refused
    if isinstance(event, ev.StepDone) and event.step in (until - 1, until + 5):
        time.sleep(0.1)  # longer than RETRY_S
    if isinstance(event, ev.StepDone) and event.step == until:
        found = checkpoint.load(out).step if code != "vanish" else 0
        print(json.dumps({"event": "Older", "step": found}))
        Path(refusal).unlink(missing_ok=True)
    if not isinstance(event, (ev.StepDone, ev.Progress)):
        print(json.dumps(event.as_dict(), default=str))
"""


def with_disk(shim, text, tmp_path, code, until=25):
    """(events, run directory): from step 11 until `until` the disk refuses with `code`, or the directory vanishes."""
    disk = Disk(shim, tmp_path / "run", tmp_path)
    env = {**os.environ, **disk.env, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-c", CHILD, str(text), str(disk.root), str(disk.refusal), str(code), str(until)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], disk.root


SAYS = {
    errno.ENOSPC: "no space for a checkpoint",
    errno.EIO: "Input/output error",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
}


@pytest.mark.parametrize("code", SAYS, ids=lambda code: errno.errorcode[code])
def test_training_goes_on_when_the_disk_refuses(shim, text, straight, tmp_path, code):
    found, out = with_disk(shim, text, tmp_path, code)
    refused = [e["text"] for e in found if e["event"] == "Notice" and "is not saved" in e["text"]]
    assert len(refused) >= 2, "it is tried again"
    assert all(SAYS[code] in t and "older checkpoints are untouched" in t and "training goes on" in t for t in refused)
    older = next(e["step"] for e in found if e["event"] == "Older")
    assert older == 10
    saved = [e["step"] for e in found if e["event"] == "Saved"]
    assert any(25 <= step < 40 for step in saved) and saved[-1] == 40 and not [s for s in saved if 12 < s < 25]
    assert found[-1]["event"] == "RunDone" and found[-1]["reason"] == "steps"
    assert bits(out) == straight


def test_a_disk_that_refuses_to_the_end_is_an_error_and_the_older_checkpoint_stays(shim, text, tmp_path):
    found, out = with_disk(shim, text, tmp_path, errno.ENOSPC, until=99)
    assert found[-1]["reason"] == "unsaved"
    assert len([e for e in found if e["event"] == "Notice" and "step 40 is not saved" in e["text"]]) >= train.LAST_TRIES
    assert checkpoint.load(out).step == 10
    assert found[-1]["summary"]["checkpoint"].endswith(checkpoint.load(out).path.name)


def test_a_directory_that_vanishes_is_made_anew(shim, text, straight, tmp_path):
    found, out = with_disk(shim, text, tmp_path, "vanish")
    assert any("has vanished with the checkpoints in it: made anew" in e.get("text", "") for e in found)
    assert found[-1]["reason"] == "steps" and bits(out) == straight


def test_resume_takes_the_newest_that_verifies_and_says_what_it_skipped(text, straight, tmp_path):
    out = tmp_path / "run"
    list(trainer(text, out, steps=40, stop=lambda: False).run())
    for step in (out / "step-00000040", out / "step-00000038"):
        data = bytearray((step / "model.safetensors").read_bytes())
        data[-5] ^= 1
        (step / "model.safetensors").write_bytes(data)
    (out / "step-00000038" / "state.json").write_text("{")
    found = list(trainer(text, out, steps=40, init="resume").run())
    said = notices(found)
    assert any("step-00000040: model.safetensors differs from its sha256" in t for t in said)
    assert any("step-00000038: state.json is damaged" in t for t in said)
    assert any("resuming" in t and "after step 36" in t for t in said)
    assert bits(out) == straight


def test_a_disk_that_goes_on_refusing_is_not_asked_at_every_save(text, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise NativeError("the disk is full")

    monkeypatch.setattr(checkpoint, "save", refuse)
    found = list(trainer(text, tmp_path / "run", steps=30, eval_every=5).run())
    said = [t for t in notices(found) if "is not saved: the disk is full; training goes on, next try in 30 s" in t]
    assert len(said) == 1 and found[-1].reason == "unsaved"


def test_saves_that_take_longer_than_the_steps_between_them_are_said_so(text, tmp_path, monkeypatch):
    real = checkpoint.save

    def slow(*args, **kwargs):
        time.sleep(0.2)
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(train, "WAITED_MS", 20.0)
    said = [t for t in notices(trainer(text, tmp_path / "often", steps=8, save_every=2).run()) if "--save-every" in t]
    assert len(said) == 1 and said[0].startswith("training waited 0."), said
    assert not [t for t in notices(trainer(text, tmp_path / "once", steps=8, save_every=0).run()) if "waited" in t]


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(text, tmp_path, out, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", *flags(text, tmp_path / out, steps=3)]) == 2
    assert capsys.readouterr().err.startswith(f"anert: {tmp_path / out / 'data'}: cannot write there: Not a directory")


def test_a_log_that_the_disk_refuses_is_no_crash(tmp_path):
    """/dev/full takes every write into its buffer and refuses it at the end, and once more when it is closed."""
    shown = []
    ui = Off()
    ui.show = shown.append
    done = follow(iter([ev.Notice("info", "x"), ev.RunDone("steps", {})]), ui, EventLog(Path("/dev/full")))
    assert done.reason == "steps"
    assert any("event log is off from here on" in e.text for e in shown if isinstance(e, ev.Notice))


# ---- divergence


def poisoned(run, at, value=3e4, times=1):
    """`run` with its weights led astray (finite, hopeless) right before each of the steps `at`, `times` times each."""
    real, left = run.train_step, dict.fromkeys(at, times)

    def step():
        if left.get(run.step, 0) > 0:
            left[run.step] -= 1
            run.saver.settle()
            for p in run.store.values():
                p.master[...] = value
            run.store.sync()
        return real()

    run.train_step = step
    return run


def test_weights_led_astray_go_back_to_the_last_good_checkpoint(text, tmp_path):
    run = poisoned(trainer(text, tmp_path, steps=40, patience=3), [13])
    found = list(run.run())
    done = found[-1]
    assert done.reason == "steps" and done.summary["rollbacks"] == 1 and done.summary["skipped_steps"] == 4
    assert sum(e.skipped for e in found if isinstance(e, ev.StepDone)) == 4
    back = [t for t in notices(found) if "on with the data that follow (1 of 2 times)" in t]
    assert len(back) == 1 and "step 17: 4 steps in a row were not usable (the loss is" in back[0]
    assert "first in layer" in back[0] and "back to" in back[0] and "step-00000012" in back[0]
    assert [e.step for e in found if isinstance(e, ev.StepDone)] == [*range(1, 18), *range(13, 41)]
    assert np.isfinite(done.summary["val_loss"]) and checkpoint.load(tmp_path).step == 40
    # 5 steps went into the blue: their data are not read again
    assert checkpoint.load(tmp_path).state["data"]["windows"] == (40 + 5) * 4


def test_a_checkpoint_that_leads_nowhere_is_set_aside(text, tmp_path):
    """Weights go bad after the last usable step and before its checkpoint: that one is finite and useless."""
    run = trainer(text, tmp_path, steps=30, patience=2)
    real = run.save

    def save(best=False):
        if run.step == 12 and not run.rolled_back:
            for p in run.store.values():
                p.master[...] = 3e4
            run.store.sync()
        yield from real(best)

    run.save = save
    found = list(run.run())
    assert found[-1].reason == "steps" and found[-1].summary["rollbacks"] == 2
    said = notices(found)
    assert any("step-00000012, on with" in t for t in said) and any("step-00000010, on with" in t for t in said)
    assert (tmp_path / "diverged-00000012").is_dir() and checkpoint.load(tmp_path).step == 30


def test_weights_that_never_recover_stop_the_run_with_a_good_checkpoint(text, tmp_path):
    run = poisoned(trainer(text, tmp_path, steps=40, patience=3), [13], times=9)
    found = list(run.run())
    assert found[-1].reason == "diverged"
    error = next(e for e in found if isinstance(e, ev.Notice) and e.level == "error")
    assert "after going back 2 times" in error.text and "the last good checkpoint stays at" in error.text
    assert "lower --lr" in error.text
    last = checkpoint.load(tmp_path / "last")
    assert last.step == 12 and all(np.abs(t).max() < 100 for t in last.model.values())


def test_without_a_checkpoint_there_is_no_way_back(text, tmp_path):
    run = poisoned(trainer(text, tmp_path, steps=40, patience=3, save_every=0, eval_every=0), [5])
    found = list(run.run())
    assert found[-1].reason == "diverged" and "no checkpoint was saved yet" in notices(found)[-1]


def test_weights_that_are_not_finite_go_back_at_once(text, tmp_path):
    run = poisoned(trainer(text, tmp_path, steps=40, spike=0), [])
    real = run.save

    def save(best=False):
        if run.step == 12 and not run.rolled_back:
            run.store["norm"].master[3] = np.nan
        yield from real(best)

    run.save = save
    found = list(run.run())
    assert found[-1].reason == "steps" and found[-1].summary["rollbacks"] == 1
    assert any("norm[3] is nan" in t and "step-00000010" in t for t in notices(found))


def test_overflow_is_skipped_and_halves_the_scale(text, tmp_path):
    run = trainer(text, tmp_path, steps=30, patience=3)
    prepared = run.prepare

    def prepare():
        yield from prepared()
        real, calls = run.optimizer.grad_norm, iter(range(10**6))
        run.optimizer.grad_norm = lambda: (float("inf"), False) if next(calls) in (10, 11) else real()

    run.prepare = prepare
    steps = events(run, ev.StepDone)
    assert [e.step for e in steps if e.skipped] == [11, 12]
    assert [e.loss_scale for e in steps[9:13]] == [1024, 1024, 512, 256]
    assert run.rolled_back == 0 and run.skipped == 2


def test_a_storm_of_overflows_goes_back_and_stops(text, tmp_path):
    run = trainer(text, tmp_path, steps=60, patience=3)
    prepared = run.prepare

    def prepare():
        yield from prepared()
        real = run.optimizer.grad_norm
        run.optimizer.grad_norm = lambda: (float("inf"), False) if run.step >= 10 else real()

    run.prepare = prepare
    found = list(run.run())
    assert found[-1].reason == "diverged" and found[-1].summary["rollbacks"] == 2
    assert "gradients overflow" in notices(found)[-1]


def test_a_spike_is_left_out_and_moves_no_weight(text, tmp_path):
    run = trainer(text, tmp_path, steps=SETTLED + 20, save_every=0, eval_every=0)
    real, seen = run.train_step, []

    def step():
        if run.step == SETTLED + 5:
            forward = run.net.loss_backward
            run.net.loss_backward = lambda *a: forward(*a) + 9.0
            before = run.store.master.copy()
            event = real()
            run.net.loss_backward = forward
            seen.append(np.array_equal(before, run.store.master))
            return event
        return real()

    run.train_step = step
    found = list(run.run())
    assert seen == [True] and [e.step for e in found if isinstance(e, ev.StepDone) and e.skipped] == [SETTLED + 6]
    assert any("is left out: the loss" in t and "far above its running mean" in t for t in notices(found))


def test_ordinary_noise_is_no_spike():
    rng = np.random.default_rng(0)
    health = Health(30, 8.0)
    losses = 3 + 6 * np.exp(-np.arange(5000) / 300) + 0.4 * rng.standard_normal(5000)
    assert not any(health.judge(float(x), True) for x in losses)
    assert health.judge(20.0, True) and health.suspect and health.bad == 1
    assert not health.judge(3.0, True) and not health.suspect and health.bad == 0
    assert Health(30, 0.0).judge(1e9, True) == ""


def test_a_validation_that_is_not_finite_is_never_the_best(text, tmp_path):
    run = trainer(text, tmp_path, steps=10, save_every=0, eval_every=5)
    prepared = run.prepare

    def prepare():
        yield from prepared()
        run.net.loss = lambda *a: (float("nan"), 64)

    run.prepare = prepare
    found = list(run.run())
    assert not any(e.best for e in found if isinstance(e, ev.Validated)) and not (tmp_path / "best").exists()
    shutil.rmtree(tmp_path)
