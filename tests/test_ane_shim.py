"""The Neural Engine's shim against the stand-in that enforces the framework's contract (tests/fake_apple)."""

from __future__ import annotations

import numpy as np
from shim_run import Engine

from anert.mil.graph import Function
from anert.mil.text import print_module


def difference(a: str = "i00_a", b: str = "i01_b", width: int = 32) -> str:
    """out = a - 2 b, declared in this order, over [1, 4, 1, width]."""
    f = Function()
    x, y = f.input(a, (1, 4, 1, width)), f.input(b, (1, 4, 1, width))
    out = x - y * 2.0
    f.rename(out, "o00_out")
    return print_module(f.returns(out))


def test_numbers_flow(fake_ane):
    fake = fake_ane()
    engine = Engine(fake.path)
    program = engine.compile(difference()).load()
    a, b, out = (engine.surface(16384) for _ in range(3))
    x, y = np.arange(128.0), np.arange(128.0)[::-1]
    binding = program.bind({"i00_a": a.write(x), "i01_b": b.write(y)}, {"o00_out": out})
    binding.run()
    assert np.array_equal(out.read(128), (x - 2 * y).astype(np.float16))
    counts = fake.counts()
    assert (counts.compiles, counts.loads, counts.evaluates, counts.requests) == (1, 1, 1, 1)
