"""Surfaces: zeroed memory that NumPy, the CPU engine and the ANE all see, through arrays that own it.

heap = Heap()
surface = Surface(heap, 768 * 256 * 2)
with surface.lock():
    surface.array(np.float16, (768, 256))[:] = x
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from anert.errors import ShapeError, StateError
from anert.ffi import call, error, load


class Heap:
    """Where surfaces come from: 2 MiB-aligned slabs, on huge pages where the kernel grants them.

    A heap may go before its surfaces; their memory stays.
    """

    __slots__ = ("ptr",)

    def __init__(self) -> None:
        native = load()
        out = native.ffi.new("anert_heap **")
        call(native.lib.anert_heap_new, out)
        self.ptr = native.ffi.gc(out[0], native.lib.anert_heap_free)

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped now."""
        return int(load().lib.anert_heap_bytes(self.ptr))


class Surface:
    """`nbytes` of zeroed shared memory, aligned to 16 KiB when that large, else to 64 bytes.

    The memory lives as long as the Surface or any array made from it, and there is no way to end it sooner.
    ptr: its address (`void *`); handle: the `anert_surface *`. Raises InputError or NativeError if it cannot be had.

    `shared`: another device uses the memory too, so that every access of this process needs a lock. `read_only`: nobody
    writes it.
    """

    __slots__ = ("_base", "handle", "nbytes")
    shared: ClassVar[bool] = False
    read_only: ClassVar[bool] = False

    def __init__(self, heap: Heap, nbytes: int) -> None:
        native = load()
        if nbytes < 1:
            raise ShapeError(f"a surface holds at least 1 byte, not {nbytes}")
        out = native.ffi.new("anert_surface **")
        call(native.lib.anert_surface_new, heap.ptr, nbytes, out)
        handle, free = out[0], native.lib.anert_surface_free
        self.handle = handle
        # The address is the owner: buffers, hence arrays, hold it, so a slice outlives this object.
        self._base = native.ffi.gc(native.lib.anert_surface_base(handle), lambda _: free(handle), size=nbytes)
        self.nbytes = nbytes

    @property
    def ptr(self) -> Any:
        return self._base

    @property
    def seed(self) -> int:
        """A counter that advances whenever somebody may have written: at each write-unlock and native write."""
        return int(load().lib.anert_surface_seed(self.handle))

    def array(
        self,
        dtype: DTypeLike = np.float16,
        shape: Sequence[int] | int | None = None,
        offset: int = 0,
        strides: Sequence[int] | None = None,
    ) -> NDArray[Any]:
        """A view that owns the memory. offset and strides are in bytes, as in numpy.ndarray.

        Without a shape: all that is left behind `offset`, one-dimensional. Raises ShapeError if the view does not fit.
        """
        kind = np.dtype(dtype)
        if shape is None:
            if strides is not None:
                raise ShapeError("strides need a shape: pass both or neither")
            shape = max(0, self.nbytes - offset) // kind.itemsize
        try:
            if not 0 <= offset <= self.nbytes:
                raise ValueError("the offset lies outside")
            if min(np.atleast_1d(shape), default=0) < 0:  # numpy.ndarray takes it for a size
                raise ValueError("a dimension is negative")
            return np.ndarray(shape, kind, self._buffer(), offset, strides)
        except (TypeError, ValueError) as error:
            raise ShapeError(
                f"a view of shape {shape}, dtype {kind}, offset {offset}, strides {strides} "
                f"does not fit a surface of {self.nbytes} bytes: {error}"
            ) from None

    def _buffer(self) -> Any:
        return load().ffi.buffer(self._base, self.nbytes)

    def acquire(self, read_only: bool) -> None:
        """Lock for reading (shared) or writing (exclusive); `lock` and `locked` pair it with its release.

        Raises StateError at once if the surface is held otherwise, nobody waits, or if it is `read_only`.
        """
        call(load().lib.anert_surface_lock, self.handle, int(read_only))

    def release(self, read_only: bool) -> None:
        """Unlock with the flag that `acquire` had; after writing the seed advances."""
        call(load().lib.anert_surface_unlock, self.handle, int(read_only))

    @contextmanager
    def lock(self, read_only: bool = False) -> Iterator[Surface]:
        """Hold the surface while the block runs: see `acquire`."""
        self.acquire(read_only)
        try:
            yield self
        finally:
            self.release(read_only)

    def access(self, read_only: bool = False) -> AbstractContextManager[Surface]:
        """As `lock` where the surface is `shared`; elsewhere nothing, but that what is read alone is not written."""
        return self.lock(read_only) if self.shared or self.read_only else nullcontext(self)

    def touch(self) -> None:
        """Say that memory was written without a lock: the seed advances."""
        load().lib.anert_surface_touch(self.handle)

    def __repr__(self) -> str:
        return f"Surface({self.nbytes} bytes, seed {self.seed})"


class ReadOnlySurface(Surface):
    """A surface over the memory of an array, which a mapped file may own: nothing is copied, nobody writes.

    The array, hence the map, lives as long as the surface or any array made from it. ShapeError unless it is
    C-contiguous and holds at least one byte.
    """

    __slots__ = ()
    read_only: ClassVar[bool] = True

    def __init__(self, memory: NDArray[Any]) -> None:
        native = load()
        if not memory.flags.c_contiguous or not memory.nbytes:
            raise ShapeError(
                f"a surface lies over bytes in a row, at least 1, not over {memory.shape} of {memory.dtype}"
            )
        out = native.ffi.new("anert_surface **")
        address = native.ffi.cast("void *", memory.ctypes.data)
        call(native.lib.anert_surface_over, address, memory.nbytes, out)
        handle, free = out[0], native.lib.anert_surface_free

        self.handle = handle
        self._base = native.ffi.gc(native.lib.anert_surface_base(handle), lambda _, kept=memory: free(handle))
        self.nbytes = memory.nbytes

    def _buffer(self) -> Any:
        return np.frombuffer(memoryview(super()._buffer()).toreadonly(), np.uint8)


def shared(resources: Iterable[object]) -> list[Surface]:
    """Those among them that are surfaces and want locks, each once."""
    return [r for r in dict.fromkeys(resources) if isinstance(r, Surface) and r.shared]


def locked(written: Sequence[Surface], read: Sequence[Surface] = ()) -> AbstractContextManager[None]:
    """Hold surfaces, those to be written first, while the block runs; let go of them in reverse. StateError if one is
    held otherwise; then none is."""
    return _locked(written, read) if written or read else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def _locked(written: Sequence[Surface], read: Sequence[Surface]) -> Iterator[None]:
    held: list[tuple[Surface, bool]] = []
    try:
        for surfaces, read_only in ((written, False), (read, True)):
            for surface in surfaces:
                surface.acquire(read_only)
                held.append((surface, read_only))
        yield
    finally:
        for surface, read_only in reversed(held):
            surface.release(read_only)


class Hold:
    """The surfaces of a run, taken together: `reads` shared, `writes` exclusive, all or none.

    One that is read and written counts as written. Names are for the error.
    """

    __slots__ = ("_args", "_err", "_keep", "_lib", "_names", "_which")

    def __init__(self, reads: Mapping[str, Surface], writes: Mapping[str, Surface]) -> None:
        native = load()
        self._lib, self._err = native.lib, error()
        written = {s.handle: name for name, s in writes.items()}
        read = {s.handle: name for name, s in reads.items() if s.handle not in written}
        handles = native.ffi.new("anert_surface *[]", [*read, *written])
        self._args = (handles, len(handles), len(read))
        self._names = [*read.values(), *written.values()]
        self._which = native.ffi.new("int32_t *")
        self._keep = (dict(reads), dict(writes))

    def take(self) -> None:
        """Raises StateError, with the name of a surface that somebody holds, and takes none then."""
        if self._lib.anert_surface_hold(*self._args, self._which, self._err):
            text = load().ffi.string(self._err.message).decode()
            raise StateError(f"port {self._names[self._which[0]]!r}: {text}")

    def release(self) -> None:
        """Let go; the seeds of what was written advance."""
        self._lib.anert_surface_release(*self._args)
