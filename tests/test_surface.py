"""Surfaces: zeroed, aligned, owned by the arrays made from them, locked by the rules."""

import gc
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import ffi as native
from anert.errors import InputError, NativeError, ShapeError, StateError
from anert.surface import Heap, Surface

SLAB = 2 << 20


@given(st.lists(st.integers(1, 3 * SLAB), min_size=1, max_size=12), st.data())
@settings(max_examples=40, deadline=None)
def test_disjoint_zeroed_aligned_and_reused(sizes, data):
    """A random mix of births and deaths: every new surface is zero, aligned, and overlaps no living one."""
    heap, living = Heap(), []
    for size in sizes:
        surface = Surface(heap, size)
        address = int(native.ffi.cast("uintptr_t", surface.ptr))
        assert address % (16384 if size >= 16384 else 64) == 0
        view = surface.array(np.uint8)
        assert view.shape == (size,)
        assert not view.any()
        view[:] = len(living) % 255 + 1
        living.append((surface, view, view[0]))
        if len(living) > 1 and data.draw(st.booleans()):
            del living[data.draw(st.integers(0, len(living) - 1))]
        del surface, view
    spans = sorted((int(native.ffi.cast("uintptr_t", s.ptr)), s.nbytes) for s, _, _ in living)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
    assert all((view == mark).all() for _, view, mark in living)
    assert heap.nbytes >= sum(n for _, n in spans)
    assert heap.nbytes % SLAB == 0
    living.clear()
    gc.collect()
    assert heap.nbytes == 0, "a slab without surfaces is unmapped"


def test_small_surfaces_share_a_slab_and_ranges_are_reused():
    heap = Heap()
    surfaces = [Surface(heap, 1000) for _ in range(100)]
    assert heap.nbytes == SLAB
    addresses = {int(native.ffi.cast("uintptr_t", s.ptr)) for s in surfaces}
    surfaces[50].array(np.uint8)[:] = 7
    freed = int(native.ffi.cast("uintptr_t", surfaces[50].ptr))
    surfaces[50] = None
    again = Surface(heap, 900)
    assert int(native.ffi.cast("uintptr_t", again.ptr)) == freed
    assert not again.array(np.uint8).any(), "a reused range is zeroed"
    assert len(addresses) == 100


def test_neighbours_merge():
    heap = Heap()
    keep = Surface(heap, 64)
    parts = [Surface(heap, SLAB // 8) for _ in range(4)]
    order = [1, 3, 0, 2]
    for i in order:
        parts[i] = None
    Surface(heap, SLAB // 2)
    assert heap.nbytes == SLAB
    assert keep.nbytes == 64


def test_a_slice_outlives_surface_and_heap():
    heap = Heap()
    surface = Surface(heap, 4 * SLAB)
    whole = surface.array(np.float32, (1024, 2048))
    whole[:] = np.arange(2048)
    part = whole.T[3:9, ::2].reshape(6, -1)[1:]
    strided = whole[::5, 7]
    del surface, whole, heap
    gc.collect()
    other = Heap()
    Surface(other, 4 * SLAB).array(np.uint8)[:] = 255  # would land on freed memory
    del part
    gc.collect()
    assert (strided == 7).all()


def test_views():
    surface = Surface(Heap(), 100)
    assert surface.array().shape == (50,)
    assert surface.array().dtype == np.float16
    assert surface.array(np.float32, offset=20).shape == (20,)
    assert surface.array(np.float16, ()).shape == ()
    whole = surface.array()
    whole[:] = np.arange(50)
    packed = surface.array(np.float16, (3, 4), offset=2, strides=(20, 2))
    assert packed.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14], [21, 22, 23, 24]]
    packed[1, 1] = -1
    assert whole[12] == -1
    assert packed.flags.writeable
    assert not packed.flags.owndata


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": (51,)},
        {"shape": (2, 26)},
        {"shape": (50,), "offset": 2},
        {"offset": -2},
        {"offset": 101},
        {"shape": (3, 4), "strides": (48, 2)},
        {"shape": (3, 4), "strides": (-8, 2)},
        {"shape": (3, 4), "strides": (8,)},
        {"shape": (-1,)},
        {"strides": (2,)},
        {"shape": (1 << 62, 4)},
    ],
)
def test_views_that_do_not_fit(arguments):
    surface = Surface(Heap(), 100)
    with pytest.raises(ShapeError, match=r"100 bytes|need a shape"):
        surface.array(**arguments)


def test_locks():
    surface = Surface(Heap(), 64)
    with surface.lock(read_only=True), surface.lock(read_only=True):
        with pytest.raises(StateError, match="2 readers"):
            surface.lock().__enter__()
        with surface.lock(read_only=True):
            pass
    assert surface.seed == 0
    with surface.lock() as held:
        assert held is surface
        with pytest.raises(StateError, match="by a writer"), surface.lock(read_only=True):
            pass
        with pytest.raises(StateError, match="by a writer"), surface.lock():
            pass
        assert surface.seed == 0
    assert surface.seed == 1
    with pytest.raises(ZeroDivisionError), surface.lock():
        raise ZeroDivisionError
    assert surface.seed == 2
    with surface.lock(read_only=True):
        pass
    assert surface.seed == 2
    surface.touch()
    assert surface.seed == 3


@pytest.mark.parametrize("read_only", [0, 1])
def test_unlock_without_lock(read_only):
    surface = Surface(Heap(), 64)
    with pytest.raises(StateError, match="not locked for"):
        native.call(native.lib.anert_surface_unlock, surface.handle, read_only)
    with surface.lock(read_only=not read_only), pytest.raises(StateError, match="not locked for"):
        native.call(native.lib.anert_surface_unlock, surface.handle, read_only)
    assert surface.seed == int(bool(read_only))


def test_bad_surfaces():
    heap = Heap()
    for size in (0, -5):
        with pytest.raises(ShapeError, match=f"at least 1 byte, not {size}"):
            Surface(heap, size)
    for size in (1 << 60, (1 << 64) - 1):
        with pytest.raises(NativeError, match=str(size)):
            Surface(heap, size)
    assert heap.nbytes == 0
    lib, ffi = native.lib, native.ffi
    for arguments in ((ffi.NULL, 8, ffi.new("anert_surface **")), (heap.ptr, 8, ffi.NULL)):
        with pytest.raises(InputError, match="NULL"):
            native.call(lib.anert_surface_new, *arguments)
    with pytest.raises(InputError, match="at least 1 byte"):
        native.call(lib.anert_surface_new, heap.ptr, 0, ffi.new("anert_surface **"))
    for function in (lib.anert_surface_lock, lib.anert_surface_unlock):
        with pytest.raises(InputError, match="surface is NULL"):
            native.call(function, ffi.NULL, 1)
    lib.anert_surface_free(ffi.NULL)
    lib.anert_heap_free(ffi.NULL)
    assert lib.anert_surface_base(ffi.NULL) == ffi.NULL
    assert (lib.anert_surface_size(ffi.NULL), lib.anert_surface_seed(ffi.NULL), lib.anert_heap_bytes(ffi.NULL)) == (
        0,
    ) * 3


def test_repr_and_size():
    surface = Surface(Heap(), 70_000)
    assert repr(surface) == "Surface(70000 bytes, seed 0)"
    assert native.lib.anert_surface_size(surface.handle) == surface.nbytes == 70_000
