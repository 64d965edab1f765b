"""Schedules: whatever the lanes' timing, a step computes the serial order's bits, and every declaration is true."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_network import batch_of, gradients, model_of, network, stories  # noqa: F401

from anert.errors import StateError
from anert.optim import AdamW
from anert.schedule import ENGINE, HOST, Schedule, Task, waits
from anert.surface import Heap, Surface


@pytest.fixture(scope="module")
def engine():
    with ThreadPoolExecutor(1) as executor:
        yield executor


def nothing() -> None: ...


resources = st.lists(st.integers(0, 3), max_size=2).map(tuple)
tasks = st.lists(
    st.builds(
        lambda lane, host, reads, writes: Task("k", lane, nothing, reads, writes, lane == ENGINE and not host),
        st.sampled_from([ENGINE, HOST]), st.booleans(), resources, resources,
    ),
    max_size=12,
)  # fmt: skip


def conflict(a: Task, b: Task) -> bool:
    """Whether the order of two tasks matters: the definition, pair by pair."""
    if set(a.writes) & {*b.reads, *b.writes} or set(b.writes) & {*a.reads, *a.writes}:
        return True
    return bool(set(a.reads) & set(b.reads)) and a.evaluates != b.evaluates


@given(tasks, st.lists(st.sampled_from([ENGINE, HOST])))
def test_no_timing_reorders_a_conflict_and_none_gets_stuck(program, timing):
    needs = waits(program)
    lanes = [[i for i, t in enumerate(program) if t.lane == lane] for lane in (ENGINE, HOST)]
    order, at = [], [0, 0]
    choices = iter(timing)
    while len(order) < len(program):
        left = [lane for lane in (ENGINE, HOST) if at[lane] < len(lanes[lane])]
        ready = [lane for lane in left if needs[lanes[lane][at[lane]]] <= at[1 - lane]]
        assert ready, "both lanes wait"
        lane = next(choices, ready[0])
        lane = lane if lane in ready else ready[0]
        order.append(lanes[lane][at[lane]])
        at[lane] += 1
    place = {i: n for n, i in enumerate(order)}
    for j, later in enumerate(program):
        for i in range(j):
            if program[i].lane == later.lane or conflict(program[i], later):
                assert place[i] < place[j]


@given(tasks)
def test_nobody_waits_for_what_does_not_conflict(program):
    for j, need in enumerate(waits(program)):
        others = [t for t in program[:j] if t.lane != program[j].lane]
        assert need <= len(others) and (need == 0 or conflict(others[need - 1], program[j]))


# ---- lanes


def test_lanes_overlap_and_their_times_are_their_own(engine):
    schedule = Schedule([Task("a", ENGINE, lambda: time.sleep(0.4)), Task("b", HOST, lambda: time.sleep(0.3))], engine)
    assert schedule.overlaps
    ms: dict[str, float] = {}
    start = time.perf_counter()
    schedule.run(ms)
    wall = (time.perf_counter() - start) * 1e3
    assert ms["a"] >= 400 and ms["b"] >= 300
    assert 0 < ms["a"] + ms["b"] - wall <= ms["overlapped"] < ms["a"]
    once = dict(ms)
    schedule.run(ms)
    assert ms["a"] >= once["a"] + 400 and once["overlapped"] < ms["overlapped"] < ms["a"]


def test_waiting_counts_for_no_kind(engine):
    start = Task("slow", ENGINE, lambda: time.sleep(0.3), writes=(1,))
    schedule = Schedule([start, Task("more", ENGINE, nothing), Task("quick", HOST, nothing, reads=(1,))], engine)
    ms: dict[str, float] = {}
    schedule.run(ms)
    assert schedule.overlaps and ms["quick"] < 150 < 300 <= ms["slow"]


def test_chains_and_schedules_without_an_engine_stay_on_the_callers_thread(engine):
    seen = []

    def note() -> None:
        seen.append(threading.get_ident())

    chain = [Task("k", lane, note, writes=(0,)) for lane in (ENGINE, HOST, ENGINE)]
    free = [Task("k", lane, note) for lane in (ENGINE, HOST)]
    Schedule(chain, engine).run({})
    Schedule(free).run({})
    assert set(seen) == {threading.get_ident()}
    Schedule(free, engine).run({})
    assert len(set(seen)) == 2


@pytest.mark.parametrize("lane", [ENGINE, HOST])
def test_an_error_in_either_lane_ends_both_and_comes_out(engine, lane):
    ran = []
    broken = [True]

    def fail() -> None:
        if broken[0]:
            raise StateError("out of order")

    program = [
        Task("k", lane, fail, writes=(0,)),
        Task("k", 1 - lane, lambda: ran.append("free")),
        Task("k", 1 - lane, lambda: ran.append("waits"), reads=(0,)),
    ]
    schedule = Schedule(program, engine)
    assert schedule.overlaps
    with pytest.raises(StateError, match="out of order"):
        schedule.run({})
    assert "waits" not in ran
    broken[0] = False
    ran.clear()
    schedule.run({})
    assert ran == ["free", "waits"]


class Shared(Surface):
    """A surface that wants locks and notes them."""

    shared = True

    def __init__(self, heap: Heap, log: list[str], name: str) -> None:
        super().__init__(heap, 64)
        self.log, self.name = log, name

    def acquire(self, read_only: bool) -> None:
        super().acquire(read_only)
        self.log.append(f"{'read' if read_only else 'write'} {self.name}")

    def release(self, read_only: bool) -> None:
        super().release(read_only)
        self.log.append(f"free {self.name}")


def test_host_tasks_hold_shared_surfaces_and_evaluations_do_not():
    heap, log = Heap(), []
    a, b = (Shared(heap, log, name) for name in "ab")
    plain = Surface(heap, 64)
    tasks = [
        Task("k", HOST, lambda: log.append("host"), reads=(a, plain, "weights"), writes=(b,)),
        Task("k", ENGINE, lambda: log.append("engine"), reads=(b,), writes=(a,), evaluates=True),
        Task("k", HOST, lambda: log.append("both"), reads=(a,), writes=(a,)),
        Task("k", HOST, lambda: log.append("plain"), reads=(plain,)),
    ]
    Schedule(tasks).run({})
    assert log == [
        "write b", "read a", "host", "free a", "free b", "engine", "write a", "both", "free a", "plain",
    ]  # fmt: skip
    a.acquire(True)
    log.clear()
    with pytest.raises(StateError, match="readers"):
        Schedule(tasks[2:]).run({})
    with pytest.raises(StateError):
        Schedule([Task("k", HOST, nothing, writes=(b, a))]).run({})
    assert log == ["write b", "free b"]  # what was taken is given back


# ---- a training step


def delayed(task: Task, rng: random.Random, longest: float) -> Task:
    def run() -> None:
        time.sleep(rng.random() ** 4 * longest)
        task.run()

    return replace(task, run=run)


def step_of(net, tasks, engine, waits_of=None):
    net._training = Schedule(tasks, engine)
    if waits_of is not None:
        for lane in net._training._lanes:
            lane[:] = [(kind, run, waits_of(need)) for kind, run, need in lane]
    return gradients(net)


def equal(a, b) -> bool:
    return a[0] == b[0] and all(np.array_equal(a[1][name], b[1][name]) for name in a[1])


@pytest.mark.parametrize("layout", ["ports", "packed"])
@pytest.mark.parametrize("over", [{}, {"n_layers": 5, "n_kv_heads": 4}], ids=["gqa", "deep"])
def test_random_delays_change_no_bit(stories, engine, layout, over):  # noqa: F811
    model = model_of(stories, **over)
    serial = gradients(network(model, layout=layout))
    net = network(model, layout=layout, engine=engine)
    tasks = net._training.tasks
    assert net._training.overlaps
    for seed in range(6):
        rng = random.Random(seed)
        slow = (None, ENGINE, HOST)[seed % 3]  # let each lane lag behind in turn
        some = [delayed(t, rng, 0.004) if slow in (None, t.lane) else t for t in tasks]
        assert equal(step_of(net, some, engine), serial), seed


def test_the_delays_would_show_a_race(stories, engine):  # noqa: F811
    model = model_of(stories, n_layers=4)
    net = network(model, engine=engine)
    serial = gradients(network(model))
    lagging = [replace(t, run=lambda run=t.run: (time.sleep(0.001), run())[1]) if t.lane == HOST else t
               for t in net._training.tasks]  # fmt: skip
    assert equal(step_of(net, lagging, engine), serial)
    assert not equal(step_of(net, lagging, engine, waits_of=lambda need: 0), serial)


@pytest.mark.parametrize("layout", ["ports", "packed"])
def test_tasks_touch_what_they_declare_and_nothing_else(stories, engine, layout):  # noqa: F811
    """Every surface that a task does not declare is filled with NaN while it runs: its results stay the same, and so
    does the NaN. An update is due, so that its tasks have something to do."""

    def due():
        net = network(model_of(stories, seq_len=8), batch=1, layout=layout, engine=engine)
        gradients(net)
        net.update(AdamW(net.store, 0.9, 0.95, 1e-8, 0.1), 1e-2, 1.0)
        return net

    net, want = due(), gradients(due())
    tasks = net._training.tasks
    surfaces = [s for s in dict.fromkeys(r for t in tasks for r in (*t.reads, *t.writes)) if isinstance(s, Surface)]

    def alone(task: Task):
        hidden = [s.array(np.uint8) for s in surfaces if s not in (*task.reads, *task.writes)]
        kept = [s.array(np.uint8) for s in task.reads if isinstance(s, Surface) and s not in task.writes]

        def run() -> None:
            saved = [a.copy() for a in hidden]
            before = [a.copy() for a in kept]
            for a in hidden:
                a.fill(0x7E)
            task.run()
            assert all((a == 0x7E).all() for a in hidden), task.kind
            assert all(np.array_equal(a, b) for a, b in zip(kept, before, strict=True)), task.kind
            for a, b in zip(hidden, saved, strict=True):
                a[:] = b

        return replace(task, run=run)

    assert len(surfaces) > 20
    assert equal(step_of(net, [alone(t) for t in tasks], None), want)


def steps_of(net, updates=3, tasks=None, engine=None):
    """Losses and clamped weights of training steps with an AdamW update each, then all masters, moments and copies."""
    if tasks is not None:
        net._training = Schedule(tasks, engine)
    optimizer = AdamW(net.store, 0.9, 0.95, 1e-8, 0.1)
    losses = []
    for seed in range(updates):
        net.zero_grad()
        losses += [net.loss_backward(*batch_of(net, n), 256.0) for n in (seed, seed + 1)]  # a window of two
        norm, finite = optimizer.grad_norm()
        assert finite
        net.update(optimizer, 1e-2 / (seed + 1), 1.0 / (norm + 1e-6))
    net.settle()
    losses.append(net.loss(*batch_of(net, 9))[0])
    copies = [s.array(np.uint8).tobytes() for p in net.store.values() for s, _ in p.placements]
    return losses, [(p.master.tobytes(), p.m.tobytes(), p.v.tobytes()) for p in net.store.values()], copies


@pytest.mark.parametrize("layout", ["ports", "packed"])
def test_updates_go_along_with_the_next_step_and_change_no_bit(stories, engine, layout):  # noqa: F811
    model = model_of(stories, n_layers=3)
    serial = steps_of(network(model, layout=layout))
    for seed in range(4):
        net = network(model, layout=layout, engine=engine)
        rng, slow = random.Random(seed), (None, ENGINE, HOST)[seed % 3]
        tasks = [delayed(t, rng, 0.002) if slow in (None, t.lane) else t for t in net._training.tasks]
        assert sum(t.kind == "optimizer" for t in tasks) == len(net.store)
        losses, weights, _ = steps_of(net, 3, tasks, engine)
        assert (losses, weights) == serial[:2], seed
    optimizer = AdamW(net.store, 0.9, 0.95, 1e-8, 0.1)
    net.zero_grad()
    net.loss_backward(*batch_of(net), 256.0)
    before = {name: p.master.copy() for name, p in net.store.items()}
    net.ms.clear()
    net.update(optimizer, 1e-2, 1.0)
    assert all(np.array_equal(before[name], p.master) for name, p in net.store.items()), "nothing is due at once"
    net.zero_grad()
    assert net.store["norm"].grad.any(), "what is still to be read is not cleared"
    net.loss_backward(*batch_of(net), 256.0)
    assert not any(np.array_equal(before[name], p.master) for name, p in net.store.items())
    assert net.ms["optimizer"] > 0 and not net._due and not net._unclear


def test_an_update_that_is_due_is_done_before_anything_else_reads_weights(stories, engine):  # noqa: F811
    model = model_of(stories)
    now, later = network(model), network(model, engine=engine)
    results = []
    for net in (now, later):
        optimizer = AdamW(net.store, 0.9, 0.95, 1e-8, 0.1)
        gradients(net)
        net.update(optimizer, 1e-2, 1.0)
        results.append([net.loss(*batch_of(net))])
        net.update(optimizer, 1e-2, 1.0)
        results[-1].append(net.forward(batch_of(net)[0]).array().copy())
        net.update(optimizer, 1e-2, 1.0)
        net.update(optimizer, 1e-2, 1.0)  # the one before is done first
        net.settle()
        results[-1] += [optimizer.t, net.store["norm"].master.copy()]
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)


def test_an_optimizer_with_a_step_of_its_own_takes_it_at_once(stories, engine):  # noqa: F811
    class Whole(AdamW):
        def step(self, lr, grad_scale):
            self.stepped = lr
            return 7

    net = network(model_of(stories), engine=engine)
    optimizer = Whole(net.store, 0.9, 0.95, 1e-8, 0.1)
    assert net.update(optimizer, 0.5, 1.0) == 7 and optimizer.stepped == 0.5 and not net._due


def test_both_sets_of_scratch_are_counted(stories, engine):  # noqa: F811
    model = model_of(stories)
    one, two = network(model), network(model, engine=engine)
    assert two.nbytes() > one.nbytes()
    tokens, targets = batch_of(one)
    assert one.loss(tokens, targets) == two.loss(tokens, targets)
    assert np.array_equal(one.forward(tokens).array(), two.forward(tokens).array())
    assert not two._loss.overlaps
