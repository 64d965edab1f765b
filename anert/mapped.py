"""Weights that a mapped file holds as fp16: which arrays lie in one, whether they are finite, and giving them pages of
our own, at the same addresses, where that is better."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from anert import ffi
from anert.errors import NativeError
from anert.ffi import Pool, call

T = TypeVar("T")
HUGE_PAGE = 2 << 20


class Ahead(Generic[T]):
    """Work on a thread of its own, most of it one native call."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._outcome: list[tuple[T | None, BaseException | None]] = []
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._outcome.append((work(), None))
        except BaseException as error:  # raised again in `result`
            self._outcome.append((None, error))

    def result(self) -> T:
        """Waits; what the work gave, or raised."""
        self._thread.join()
        found, error = self._outcome[0]
        if error is not None:
            raise error
        return cast(T, found)


def map_of(array: NDArray[Any]) -> mmap.mmap | None:
    """The map that an array is a view of, where nobody can write it; None for other memory."""
    held: Any = array
    while isinstance(held, np.ndarray | memoryview):
        held = held.base if isinstance(held, np.ndarray) else held.obj
    return held if isinstance(held, mmap.mmap) and memoryview(held).readonly else None


def finite_ahead(pool: Pool, arrays: Mapping[str, NDArray[np.float16]]) -> Ahead[dict[str, bool]]:
    """Of each array whether it is finite; by the way, a file's pages are here when the first program reads them."""
    sources = [ffi.ffi.from_buffer("uint16_t[]", a) for a in arrays.values()]
    pointers = ffi.ffi.new("uint16_t *[]", sources)
    sizes = ffi.ffi.new("size_t[]", [a.size for a in arrays.values()])
    finite = ffi.ffi.new("int32_t[]", len(arrays))

    def work() -> dict[str, bool]:
        call(ffi.lib.anert_f16_finite, pool.ptr, pointers, sizes, len(sources), finite)
        return {name: bool(ok) for name, ok in zip(arrays, finite, strict=True)}

    return Ahead(work, "anert-pages")


def clamp(array: NDArray[np.float16]) -> int:
    """Make infinities of a read-only map +-65504, as every fp16 copy of weights has them; the file stays. Gives how
    many there were."""
    clamped = ffi.ffi.new("uint64_t *")
    call(ffi.lib.anert_pages_clamp, ffi.ffi.from_buffer("uint16_t[]", array), array.size, clamped)
    return int(clamped[0])


def settle_ahead(arrays: Iterable[NDArray[Any]]) -> Ahead[int]:
    """Move arrays of read-only maps to huge pages while they are read, where the system can do that: addresses and
    bytes stay. Gives the bytes moved; where memory is refused, they stay where they are."""
    spans = _spans(arrays)

    def work() -> int:
        total, settled = 0, ffi.ffi.new("size_t *")
        for start, end, _ in spans:
            try:
                call(ffi.lib.anert_pages_settle, ffi.ffi.cast("void *", start), end - start, settled)
            except NativeError:  # as before: small pages of the file
                break
            total += settled[0]
        return total

    return Ahead(work, "anert-settle")


def _spans(arrays: Iterable[NDArray[Any]]) -> list[tuple[int, int, mmap.mmap]]:
    """(first address, end, map) of arrays in maps; those of one map with less than a huge page between them are one."""
    spans: list[tuple[int, int, mmap.mmap]] = []
    found = ((a.ctypes.data, a.ctypes.data + a.nbytes, held) for a in arrays if (held := map_of(a)) is not None)
    for start, end, held in sorted(found, key=lambda span: span[0]):
        if spans and spans[-1][2] is held and start - spans[-1][1] < HUGE_PAGE:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end), held)
        else:
            spans.append((start, end, held))
    return spans
