"""Nothing is allocated in the step loop: what allocators hold after the second step is what they hold at the end."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

from anert.network import Network
from anert.optim import AdamW
from anert.param import ParamStore
from anert.plugin import load_file
from anert.runtime import Runtime

STORIES = Path(__file__).resolve().parents[1] / "plugins" / "stories.py"


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def native_bytes() -> int:
    """What malloc has handed out, in arenas and by mmap."""
    info = ctypes.CDLL(None).mallinfo2
    info.restype = MallInfo
    now = info()
    return int(now.uordblks + now.hblkhd)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts with glibc's mallinfo2")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_allocated_after_the_second_step(precision):
    preset = load_file(STORIES).preset("tiny")
    model = preset.model(preset.config)
    rt = Runtime("cpu", precision, threads=2)
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=True)
    store.initialise(0)
    net = Network(rt, model, store, 64, 2, True)
    store.sync()
    optimizer = AdamW(store, 0.9, 0.95, 1e-8, 0.1)
    tokens = np.random.default_rng(0).integers(0, preset.config.vocab_size, 128).astype(np.int32)
    targets = np.roll(tokens, -1)

    def step() -> None:
        net.ms.clear()
        net.zero_grad()
        net.loss_backward(tokens, targets, 1024.0)
        norm, finite = optimizer.grad_norm()
        assert finite
        optimizer.step(1e-3, min(1.0, 1.0 / norm))

    step()
    step()
    grown = []
    for _ in range(3):  # threads that other tests left allocate too, now and then
        held, blocks, surfaces = native_bytes(), sys.getallocatedblocks(), rt.heap.nbytes
        for _ in range(40):
            step()
        assert rt.heap.nbytes == surfaces
        grown.append((native_bytes() - held, sys.getallocatedblocks() - blocks))
    assert min(native for native, _ in grown) < 4096, f"malloc holds more after 40 steps than before: {grown}"
    assert min(objects for _, objects in grown) < 40, f"Python holds more objects after 40 steps than before: {grown}"
