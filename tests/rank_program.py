"""What a rank does in tests: collectives with known results, or `anert run` with a fault at step 8. argv: what, then
the arguments of anert."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from anert import cli, dist, train


def collectives(folder: Path) -> None:
    world = dist.world()
    assert isinstance(world, dist.Mpi)
    rank, size = world.rank, world.size
    assert world.sum([1.0, rank]) == [size, sum(range(size))]
    assert world.share({"a": [1, 0.1 + 0.2, None]} if rank == 0 else None) == {"a": [1, 0.1 + 0.2, None]}
    flat = np.full(5_000_000, rank + 1, np.float32)
    world.broadcast(flat)
    assert (flat == 1).all()
    world.require_equal("texts", "the same")
    rng = np.random.default_rng(7)
    parts = [rng.standard_normal(1_000_003, dtype=np.float32) for _ in range(size)]
    for bucket in (1 << 12, 1 << 20, 1 << 30):
        mine = parts[rank].copy()
        summing = dist.GradientSum(world, mine, bucket)
        for _ in range(2):  # the second one only if the first left everything in order
            mine[...] = parts[rank]
            summing.ready(500)  # not armed: an earlier micro-batch
            summing.armed = True
            for offset in (990_000, 989_999, 400_000, 7):
                summing.ready(offset)
            summing.finish()
            total = parts[0].copy()
            for part in parts[1:]:
                total += part
            assert np.array_equal(mine, total) if size == 2 else np.allclose(mine, total, atol=1e-5)
            world.require_equal("sums", hashlib.sha256(mine.data).hexdigest())
    own = folder / f"host{rank}"
    own.mkdir(exist_ok=True)
    os.chdir(own)
    source = Path("only/here.bin")
    if rank == 0:
        source.parent.mkdir()
        source.write_bytes(np.arange(9_000_000, dtype=np.uint32).tobytes())
    found = world.share_file(source if rank == 0 else None, Path("cache"))
    assert found == (source if rank == 0 else Path("cache/here.bin"))
    assert np.array_equal(np.fromfile(found, np.uint32), np.arange(9_000_000, dtype=np.uint32))
    assert [p.name for p in found.parent.iterdir()] == ["here.bin"]
    everywhere = folder / "shared.bin"
    if rank == 0:
        everywhere.write_bytes(b"x" * 10)
    assert world.share_file(everywhere if rank == 0 else None, Path("cache")) == everywhere
    world.close()
    print("rank done", flush=True)


def differ() -> None:
    world = dist.world()
    try:
        world.require_equal("weights", "these" if world.rank != 1 else "others")
    except Exception as error:
        print(f"rank {world.rank}: {error}", flush=True)
    world.close()


def with_fault(what: str) -> None:
    """Rank 1 fails in its eighth step."""
    real = train.Trainer.train_step

    def step(self):
        if self.step == 7 and self.world.rank == 1:
            while not (self.out / "last").exists():  # rank 0 saves step 4 behind its steps
                time.sleep(0.01)
            match what:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "raise":
                    raise RuntimeError("a bug on rank 1")
                case "error":
                    raise train.InputError("something of rank 1 is wrong")
                case "drift":
                    self.store.master[5] += 1
        if what == "astray" and self.step == 9 and not self.rolled_back:
            self.saver.settle()
            self.store.master.fill(3e4)
            self.store.sync()
        if what == "slow" and self.step == 3 and self.world.rank == 1:
            time.sleep(dist.SILENCE_S + 5)
        return real(self)

    train.Trainer.train_step = step
    if what == "broken-sum":
        dist.GradientSum.finish = lambda self: 0.0
    if what == "overlap":
        begin, finish = dist.GradientSum.__init__, dist.GradientSum.finish

        def small(self, world, grads):
            begin(self, world, grads, bucket=1 << 14)

        def told(self):
            print(f"rank {self.world.rank}: {len(self._requests)} buckets under way when the backward pass ends")
            return finish(self)

        dist.GradientSum.__init__, dist.GradientSum.finish = small, told


if __name__ == "__main__":
    what = sys.argv[1]
    if what == "collectives":
        collectives(Path(sys.argv[2]))
    elif what == "differ":
        differ()
    else:
        with_fault(what)
        sys.exit(cli.main(sys.argv[2:]))
