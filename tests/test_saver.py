"""Saves from a worker thread: what is written is what was, whatever the training loop does meanwhile, and it hardly
waits."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import checkpoint, saver
from anert.errors import NonFiniteError, StateError
from anert.param import ParamStore, Spec
from anert.runtime import Runtime
from anert.saver import Saver


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu", precision="fp32", threads=1)


def store_of(runtime, rows=64, cols=32, n=3):
    specs = {f"w{i}": Spec.normal(rows, cols) for i in range(n)} | {"norm": Spec.ones(rows)}
    store = ParamStore(runtime.heap, runtime.pool, specs, train=True)
    store.initialise(1)
    for moment in store.flats[1:]:
        moment[...] = np.random.default_rng(2).standard_normal(moment.shape)
    return store


def test_what_is_saved_is_what_was(runtime, tmp_path):
    store = store_of(runtime, 512, 512)
    saves = Saver(store, tmp_path, None, keep=9)
    wanted = {}
    for step in range(1, 6):
        wanted[step] = [flat.copy() for flat in store.flats]
        saves.save(step, {"n": step})
        saves.settle()
        for flat in store.flats:  # the optimizer steps while the worker writes
            flat += 1
        done = saves.finished(wait=True)
        assert done.error is None and done.path.name == f"step-{step:08d}" and saves.finished() is None
    saves.close()
    for step, flats in wanted.items():
        found = checkpoint.load(tmp_path / f"step-{step:08d}")
        model, optim = store.named(flats)
        assert found.model.keys() == model.keys() and found.optim.keys() == optim.keys()
        for name, value in {**model, **optim}.items():
            assert np.array_equal({**found.model, **found.optim}[name], value), (step, name)


def test_training_waits_for_a_save_that_has_no_memory_for_a_snapshot(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "memory_available", lambda: 0)
    store = store_of(runtime)
    saves = Saver(store, tmp_path, None, keep=3)
    wanted = store.master.copy()
    saves.save(1, {})
    saves.settle()
    assert (tmp_path / "step-00000001").exists(), "it was written from the live weights: nobody may have changed them"
    store.master[...] += 1
    done = saves.finished(wait=True)
    assert done.stall_ms > 0
    assert np.array_equal(checkpoint.load(tmp_path).model["w0"], store.named([wanted])[0]["w0"])
    saves.close()


def test_one_save_at_a_time(runtime, tmp_path):
    saves = Saver(store_of(runtime), tmp_path, None, keep=3)
    saves.save(1, {})
    with pytest.raises(StateError, match="a save is under way"):
        saves.save(2, {})
    assert saves.finished(wait=True).step == 1
    saves.close()
    saves.close()


@pytest.mark.slow
def test_the_loop_stalls_for_less_than_a_twentieth_of_a_save(runtime, tmp_path):
    """8.4 M weights, a 100 MB checkpoint. Forward and backward of such a model take several times as long as a copy of
    its weights and moments, on any machine; the best of five, since a busy one can only add to it."""
    store = store_of(runtime, 2048, 1024, 4)
    saves = Saver(store, tmp_path, None, keep=2)
    room = [np.zeros_like(flat) for flat in store.flats]
    shares = []
    for step in range(1, 6):
        start = time.perf_counter()
        for copy, flat in zip(room, store.flats, strict=True):
            np.copyto(copy, flat)
        copying = time.perf_counter() - start
        saves.save(step, {})
        time.sleep(4 * copying)
        saves.settle()
        while (done := saves.finished()) is None:
            time.sleep(0.01)
        shares.append(done.stall_ms / done.ms)
    saves.close()
    assert min(shares) < 0.05, shares


BAD = [np.nan, np.inf, -np.inf]
ACTIONS = st.lists(st.one_of(st.just("step"), st.just("save"), st.tuples(st.integers(0, 10**6), st.sampled_from(BAD))))


@settings(max_examples=40)
@given(ACTIONS)
def test_no_checkpoint_with_a_weight_that_is_not_finite_becomes_last(tmp_path_factory, runtime, actions):
    out = tmp_path_factory.mktemp("run")
    store = store_of(runtime, 8, 4)
    saves, last_good = Saver(store, out, None, keep=2), None
    for step, action in enumerate([*actions, "save"], 1):
        if action == "save":
            finite = all(np.isfinite(t).all() for named in store.named(store.flats) for t in named.values())
            saves.save(step, {})
            done = saves.finished(wait=True)
            assert (done.error is None) == finite and done.sick == (not finite)
            assert finite or isinstance(done.error, NonFiniteError)
            last_good = step if finite else last_good
        elif action == "step":
            saves.settle()
            store.flats[step % 3][...] = 0.5 * step
        else:
            at, value = action
            store.flats[at % 3][at % store.size] = value
        if last_good is not None:
            found = checkpoint.load(out / "last")
            assert found.step == last_good == checkpoint.load(out).step
            assert all(np.isfinite(t).all() for t in (*found.model.values(), *found.optim.values()))
    saves.close()
