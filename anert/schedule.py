"""Schedule: the tasks of a step in program order, each with what it reads and writes, and two lanes that run them.

A task of the engine lane may run beside one of the host lane whenever neither touches what the other writes. Lanes keep
program order, so that a task waits for one number alone: how many tasks of the other lane must have ended. It follows
from the declarations when the schedule is made. A host task never has a surface locked that an evaluation is using:
between the lanes, two reads exclude each other too if one of them is an evaluation's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from threading import Condition
from typing import TYPE_CHECKING

from anert.surface import locked, shared

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from anert.backend.base import Binding
    from anert.backend.gradient import WeightGradient

ENGINE, HOST = 0, 1
"""Lanes."""


@dataclass(frozen=True, slots=True)
class Task:
    """`run` reads `reads` and writes `writes` (surfaces, or whatever else tells resources apart) and nothing else.

    kind: the part of a step that its time counts for. evaluates: the engine itself uses the surfaces; else the host
    does, under lock where the surface asks for one.
    """

    kind: str
    lane: int
    run: Callable[[], None]
    reads: tuple[Hashable, ...] = ()
    writes: tuple[Hashable, ...] = ()
    evaluates: bool = False
    locks: bool = False
    """Whether `run` takes the locks that it needs itself."""
    link: Binding | WeightGradient | None = None
    """What `run` runs, where a Chain may do so in its stead."""


@dataclass(slots=True)
class _Touched:
    """How many tasks of a lane had begun when this resource was last touched so by that lane; 0: never."""

    write: int = 0
    host_read: int = 0
    engine_read: int = 0


def waits(tasks: Iterable[Task]) -> list[int]:
    """For each task, how many tasks of the other lane must have ended before it may begin."""
    touched: dict[Hashable, tuple[_Touched, _Touched]] = {}
    begun = [0, 0]
    result = []
    for task in tasks:
        need, other = 0, 1 - task.lane
        for resource in task.reads:
            seen = touched.setdefault(resource, (_Touched(), _Touched()))[other]
            need = max(need, seen.write, seen.host_read if task.evaluates else seen.engine_read)
        for resource in task.writes:
            seen = touched.setdefault(resource, (_Touched(), _Touched()))[other]
            need = max(need, seen.write, seen.host_read, seen.engine_read)
        begun[task.lane] += 1
        for resource in task.reads:
            mine = touched[resource][task.lane]
            if task.evaluates:
                mine.engine_read = begun[task.lane]
            else:
                mine.host_read = begun[task.lane]
        for resource in task.writes:
            touched[resource][task.lane].write = begun[task.lane]
        result.append(need)
    return result


Timed = Callable[[dict[str, float]], None]
Join = Callable[[Sequence[Task]], Sequence[Timed]]


def _timed(kind: str, run: Callable[[], None], ms: dict[str, float]) -> None:
    start = time.perf_counter()
    run()
    ms[kind] = ms.get(kind, 0.0) + (time.perf_counter() - start) * 1e3


class Schedule:
    """Tasks made ready to run: in order on the caller's thread, or, given an executor, the engine lane on that.

    A chain, where no two tasks may overlap, runs in order in either case.
    """

    def __init__(self, tasks: Iterable[Task], engine: Executor | None = None, join: Join | None = None) -> None:
        """join: makes one call of tasks that follow each other, have a `link` and want no locks, where they run in
        order."""
        self.tasks = tuple(tasks)
        self.waits = waits(self.tasks)
        self._engine = engine if engine is not None and not self._is_chain() else None
        runs = [self._guarded(task) for task in self.tasks]
        self._lanes: tuple[list[tuple[str, Callable[[], None], int]], ...] = ([], [])
        for task, run, need in zip(self.tasks, runs, self.waits, strict=True):
            self._lanes[task.lane].append((task.kind, run, need))
        self._calls = self._in_order(runs, join) if self._engine is None else []
        self._ended = [0, 0]
        self._moved = Condition()
        self._failed: BaseException | None = None

    def _in_order(self, runs: list[Callable[[], None]], join: Join | None) -> list[Timed]:
        """All tasks as few calls, each of which adds the time that it took to a table by kind."""
        calls: list[Timed] = []
        joins = [join is not None and t.link is not None and r is t.run for t, r in zip(self.tasks, runs, strict=True)]
        for joined, group in groupby(zip(joins, self.tasks, runs, strict=True), key=lambda item: item[0]):
            members = list(group)
            if joined and join:
                calls += join([task for _, task, _ in members])
            else:
                calls += [partial(_timed, task.kind, run) for _, task, run in members]
        return calls

    @property
    def overlaps(self) -> bool:
        """Whether the lanes run side by side."""
        return self._engine is not None

    def _is_chain(self) -> bool:
        """Whether every change of lane waits for all that was begun in the other one."""
        begun, last = [0, 0], -1
        for task, need in zip(self.tasks, self.waits, strict=True):
            if last == 1 - task.lane and need < begun[last]:
                return False
            begun[task.lane] += 1
            last = task.lane
        return True

    @staticmethod
    def _guarded(task: Task) -> Callable[[], None]:
        """`task.run` between lock and unlock of the surfaces that want it."""
        if task.evaluates or task.locks:
            return task.run
        written = shared(task.writes)
        read = [s for s in shared(task.reads) if s not in written]
        if not written and not read:
            return task.run
        run = task.run

        def guarded() -> None:
            with locked(written, read):
                run()

        return guarded

    def run(self, ms: dict[str, float]) -> None:
        """Run every task once. `ms` gains the time spent in each kind, waiting left out, and where lanes ran side by
        side `overlapped`: by how much these times exceed the wall's.

        The first exception of a task ends the run after the task that the other lane is in, and is raised here.
        """
        if self._engine is None:
            for call in self._calls:
                call(ms)
            return
        self._ended[:] = 0, 0
        self._failed = None
        before, start = sum(ms.values()), time.perf_counter()
        engine = self._engine.submit(self._run_lane, ENGINE, ms)
        try:
            self._run_lane(HOST, ms)
        finally:
            engine.result()
        if self._failed is not None:
            raise self._failed
        wall = (time.perf_counter() - start) * 1e3
        ms["overlapped"] = ms.get("overlapped", 0.0) + max(0.0, sum(ms.values()) - before - wall)

    def _run_lane(self, lane: int, ms: dict[str, float]) -> None:
        moved, ended, other = self._moved, self._ended, 1 - lane
        try:
            for kind, run, need in self._lanes[lane]:
                if ended[other] < need:
                    with moved:
                        while ended[other] < need and self._failed is None:
                            moved.wait()
                if self._failed is not None:
                    return
                start = time.perf_counter()
                run()
                spent = (time.perf_counter() - start) * 1e3
                with moved:
                    ms[kind] = ms.get(kind, 0.0) + spent
                    ended[lane] += 1
                    moved.notify()
        except BaseException as error:  # raised again in run, when the other lane has stopped
            with moved:
                self._failed = self._failed or error
                moved.notify()
