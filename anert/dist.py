"""Several processes, one training run: data parallel over MPI (extra `mpi`), on one machine or many.

    mpiexec -n 2 python -m mpi4py -m anert run plugins/stories.py

Every rank holds all weights and computes its share of each step's sequences; gradients are summed, so all ranks take
the same step. Rank 0 alone reads and writes checkpoints, samples and is shown. A rank that dies ends the job by its
launcher; one that raises aborts it; one that is not heard from for SILENCE_S is lost, and the job ends too.

Order of summation: a rank adds its micro-batches in order (micro-batch i of rank r is number i * size + r of the step);
ranks are added by MPI_Allreduce, bucket by bucket, to the same bits on every rank.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

import numpy as np

from anert.errors import InputError, StateError
from anert.files import publish, sha256

SILENCE_S = 12
"""Seconds without a sign of life after which a rank is lost; each sends one a second, whatever it computes."""

PATIENCE_S = 600.0
"""Seconds that a rank waits in a collective for ranks that are alive: past it they do not follow the same program."""

DRAIN_S = 0.5
"""Seconds that the launcher has to pass on what was said before it is told to end all."""

BUCKET = 16 << 20
"""Bytes of gradients that are summed at a time."""

COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE")
"""Where launchers (MPICH and its kin, Open MPI) say how many ranks they started."""


class World(Protocol):
    """What a training run asks of its ranks; `Solo` and `Mpi` answer."""

    rank: int
    size: int
    local_size: int
    """Ranks on this machine."""
    hint: str
    """What to do when a rank is lost: said as the job ends."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Elementwise sum over the ranks, in float64, the same on each."""

    def broadcast(self, array: np.ndarray) -> None:
        """Overwrite `array` with rank 0's."""

    def share(self, value: Any) -> Any:
        """Rank 0's value (what JSON holds) on every rank, however long rank 0 takes to have it."""

    def share_file(self, path: Path | None, into: Path) -> Path:
        """A file of rank 0 where this rank can read it: the same path if it is there, else a copy in `into`."""

    def require_equal(self, what: str, text: str) -> None:
        """StateError on every rank, with the ranks that differ, unless `text` is the same on all."""

    def gradient_sum(self, grads: np.ndarray) -> GradientSum | None:
        """What sums `grads` over the ranks while the backward pass goes on; None where there is one rank."""

    def wait_for_all(self) -> None:
        """Until every rank is here, however long that takes."""

    def close(self) -> None:
        """The end: wait for the others, so that none is missed while it still works."""


class Solo:
    """One process."""

    rank, size, local_size, hint = 0, 1, 1, ""

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def broadcast(self, array: np.ndarray) -> None:
        pass

    def share(self, value: Any) -> Any:
        return value

    def share_file(self, path: Path | None, into: Path) -> Path:
        assert path is not None
        return path

    def require_equal(self, what: str, text: str) -> None:
        pass

    def gradient_sum(self, grads: np.ndarray) -> GradientSum | None:
        return None

    def wait_for_all(self) -> None:
        pass

    def close(self) -> None:
        pass


class Mpi:
    """The ranks of MPI_COMM_WORLD. InputError if the launcher started more processes than MPI sees."""

    def __init__(self, expected: int) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise InputError(
                f"{expected} processes were started but MPI does not load ({error}): pip install 'anert[mpi]'"
            ) from None
        self.mpi = MPI
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size, self.hint = self.comm.rank, self.comm.size, ""
        if self.size != expected:
            raise InputError(
                f"the launcher started {expected} processes, MPI sees {self.size}: mpiexec and mpi4py are of two "
                "MPIs, use the mpiexec beside this python"
            )
        self.local_size = self.comm.Split_type(MPI.COMM_TYPE_SHARED).size
        sys.excepthook = self._excepthook
        self._pulse = Pulse(MPI, self)
        self._pulse.start()

    # ---- collectives

    def wait(self, requests: Sequence[Any], patience: float = PATIENCE_S) -> None:
        """Until all requests are done. The pulse ends the job meanwhile if a rank falls silent."""
        start = time.monotonic()
        while not self.mpi.Request.Testall(requests):
            waited = time.monotonic() - start
            time.sleep(min(waited / 20, 1e-2))  # a twentieth late at most, and no spinning beside the ranks at work
            if waited > patience:
                self.abort(
                    1, f"{patience:.0f} s in one collective though every rank is alive: they do not run the same"
                )

    def sum(self, values: Sequence[float]) -> list[float]:
        total = np.array(values, np.float64)
        self.wait([self.comm.Iallreduce(self.mpi.IN_PLACE, total)])
        return [float(x) for x in total]

    def broadcast(self, array: np.ndarray) -> None:
        flat = array.reshape(-1)
        step = BUCKET // array.itemsize
        self.wait([self.comm.Ibcast(flat[at : at + step]) for at in range(0, flat.size, step)])

    def share(self, value: Any) -> Any:
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy() if self.rank == 0 else None
        size = np.array([data.size if data is not None else 0], np.int64)
        self.wait([self.comm.Ibcast(size)], patience=float("inf"))
        if data is None:
            data = np.empty(size[0], np.uint8)
        self.wait([self.comm.Ibcast(data)])
        return json.loads(data.tobytes())

    def share_file(self, path: Path | None, into: Path) -> Path:
        about = self.share({"path": str(path), "size": path.stat().st_size, "sha256": sha256(path)} if path else None)
        here = Path(about["path"])
        mine = here.is_file() and here.stat().st_size == about["size"] and sha256(here) == about["sha256"]
        if self.sum([not mine])[0] == 0:
            return here
        target, part = into / here.name, into / f".{here.name}.{os.getpid()}.tmp"
        block = np.empty(BUCKET, np.uint8)
        if not mine:
            into.mkdir(parents=True, exist_ok=True)
        with open(here if self.rank == 0 else os.devnull if mine else part, "rb" if self.rank == 0 else "wb") as f:
            for at in range(0, about["size"], BUCKET):
                piece = block[: min(BUCKET, about["size"] - at)]
                if self.rank == 0:
                    f.readinto(piece.data)  # type: ignore[attr-defined]
                self.wait([self.comm.Ibcast(piece)])
                if self.rank:
                    f.write(piece.data)
        if not mine:
            publish(part, target)
        return here if mine else target

    def require_equal(self, what: str, text: str) -> None:
        mine = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).copy()
        every = np.empty((self.size, mine.size), np.uint8)
        self.wait([self.comm.Iallgather(mine, every)], patience=float("inf"))
        others = [r for r in range(self.size) if not np.array_equal(every[r], every[0])]
        if others:
            ranks = ", ".join(map(str, others))
            raise StateError(
                f"{what} of rank {ranks} differ from rank 0's: all ranks need the same anert, options and data"
            )

    def gradient_sum(self, grads: np.ndarray) -> GradientSum | None:
        return GradientSum(self, grads)

    def wait_for_all(self) -> None:
        self.wait([self.comm.Ibarrier()], patience=float("inf"))

    def close(self) -> None:
        self.wait_for_all()
        self._pulse.stop()
        sys.excepthook = sys.__excepthook__

    # ---- the end

    def abort(self, code: int, text: str = "") -> NoReturn:
        """End every process of the job."""
        if text:
            sys.stderr.write(f"anert: rank {self.rank}: {text}{self.hint and '; ' + self.hint}\n")
        sys.stderr.flush()
        sys.stdout.flush()
        time.sleep(DRAIN_S)
        self.mpi.COMM_WORLD.Abort(code)
        os._exit(code)

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        self.abort(1, f"stopped by {kind.__name__}")


class Pulse:
    """A sign of life to the next rank every second, and an ear for that of the rank before.

    Its own thread and communicator: it beats while the rank computes, however long a step takes.
    """

    def __init__(self, mpi: Any, world: Mpi) -> None:
        self.mpi, self.world = mpi, world
        self.comm = mpi.COMM_WORLD.Dup()
        self.next, self.before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="anert-pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After a barrier: every rank stops, so nobody misses a beat that never comes."""
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        out, heard = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
        sent: list[Any] = []
        awaited = self.comm.Irecv(heard, self.before)
        silent = 0
        while not self._end.wait(1.0):
            sent = [request for request in sent if not request.Test()]
            if len(sent) < SILENCE_S:
                sent.append(self.comm.Isend(out, self.next))
            silent += 1  # own seconds: a machine that slept did not hear anybody either
            while awaited.Test():
                silent, awaited = 0, self.comm.Irecv(heard, self.before)
            if silent > SILENCE_S:
                self.world.abort(1, f"rank {self.before} was not heard for {SILENCE_S} s: it is cut off or has stopped")
        awaited.Cancel()


class GradientSum:
    """Sums gradients over the ranks in buckets, from the buffer's end to its start, as the backward pass ends them."""

    def __init__(self, world: Mpi, grads: np.ndarray, bucket: int = BUCKET) -> None:
        self.world, self.grads, self.step = world, grads, max(1, bucket // grads.itemsize)
        self.armed = False
        """Set for the last micro-batch of a step: what `ready` is told then is final."""
        self._top, self._requests = grads.size, list[Any]()

    def ready(self, offset: int) -> None:
        """Gradients from element `offset` on are final, if this is the last micro-batch."""
        if not self.armed:
            return
        while self._top - offset >= self.step:
            self._begin(self._top - self.step)
        if self._requests:
            self.world.mpi.Request.Testall(self._requests)  # lets MPI move on with what is under way

    def _begin(self, low: int) -> None:
        piece = self.grads[low : self._top]
        self._requests.append(self.world.comm.Iallreduce(self.world.mpi.IN_PLACE, piece))
        self._top = low

    def finish(self) -> float:
        """Sum what is left and wait for all of it; milliseconds that this took: the part that nothing hid."""
        start = time.perf_counter()
        self.ready(0)
        if self._top:
            self._begin(0)
        self.world.wait(self._requests)
        self._top, self.armed, self._requests = self.grads.size, False, []
        return (time.perf_counter() - start) * 1e3


def portion(batch: int, grad_accum: int, size: int) -> tuple[int, int]:
    """(batch, grad_accum) of one rank of `size`: accumulation is divided, or else the batch.

    InputError where neither divides: the tokens of a step do not depend on the number of ranks.
    """
    if grad_accum % size == 0:
        return batch, grad_accum // size
    if batch % size == 0:
        return batch // size, grad_accum
    raise InputError(
        f"{size} ranks share a step of --batch {batch} and --grad-accum {grad_accum}: one of them must divide by {size}"
    )


@functools.cache
def world() -> World:
    """The ranks that this process was started with: opened once, at the first call."""
    expected = max((int(os.environ[name]) for name in COUNTS if os.environ.get(name, "").isdigit()), default=1)
    return Mpi(expected) if expected > 1 else Solo()


def label() -> str:
    """What an error's line begins with: "rank 1: ", or nothing where there is one rank.

    Ranks other than 0 wait: an error of all ranks is rank 0's to tell, and ends the job before they do.
    """
    if not (world.cache_info().currsize and world().size > 1):
        return ""
    if world().rank:
        time.sleep(DRAIN_S * 2)
    return f"rank {world().rank}: "


def leave(code: int) -> None:
    """End all ranks where this one ends early: with an error the others would wait for it for ever."""
    if world.cache_info().currsize and isinstance(found := world(), Mpi):
        found.abort(code)
