"""Models that several test files write and read."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st

from anert.errors import AnertError
from anert.formats import LlamaConfig, Pretrained, Tensors

SMALL = LlamaConfig(8, 12, 2, 2, 1, 5, 4)

few = st.integers(1, 3)
configs = st.builds(
    lambda half, group, kv, layers, hidden, vocab, seq, tied: LlamaConfig(
        2 * half * group * kv, hidden, layers, group * kv, kv, vocab, seq, tied
    ),
    *[few] * 4,
    *[st.integers(1, 9)] * 3,
    st.booleans(),
)


def draw(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """fp32 tensors of a model."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in config.shapes()}


def model(config: LlamaConfig, tensors: dict[str, np.ndarray] | None = None) -> Pretrained:
    arrays = draw(config) if tensors is None else tensors
    return Pretrained("drawn", Path("drawn"), config.describe(), Tensors.of(arrays))


def same_tensors(a: Pretrained, b: Pretrained) -> bool:
    """Whether both have the same names and, bit for bit, the same values."""
    return a.tensors.keys() == b.tensors.keys() and all(
        (x := a.tensors[n]).dtype == (y := b.tensors[n]).dtype and x.tobytes() == y.tobytes() for n in a.tensors
    )


def refused(path: Path, read: Callable[[Path], object], limit: int = 0) -> None:
    """`read` raises one of our errors, in one line that names the file, and allocates no more than `limit` bytes (1 MiB
    and four times the file)."""
    tracemalloc.start()
    try:
        with pytest.raises(AnertError) as caught:
            read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert path.name in message and len(message) < 600, message
    size = path.stat().st_size if path.is_file() else 0
    assert peak < (limit or (1 << 20) + 4 * size), f"{peak} bytes for a file of {size}: {message}"


def damaged(content: bytes, seed: int, n: int) -> list[bytes]:
    """`content` with a few bytes, biased to its beginning, set to values that hurt."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 4)):
            at = int(len(content) * rng.random() ** 6)
            changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", rng.randbytes(4)])
        out.append(bytes(changed[: len(content)]))
    return out
