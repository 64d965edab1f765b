"""Surfaces: zeroed, aligned, owned by the arrays made from them, locked by the rules."""

import gc
import itertools
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import ffi as native
from anert.errors import InputError, NativeError, ShapeError, StateError
from anert.kernel import Slot
from anert.param import ParamStore, Spec
from anert.surface import Heap, ReadOnlySurface, Surface

SLAB = HUGE_PAGE = 2 << 20


def mapped(path: Path, content: bytes, dtype=np.uint8, offset=0):
    """An array over a file of this content, mapped read-only."""
    path.write_bytes(content)
    return np.frombuffer(np.memmap(path, np.uint8, "r"), dtype, offset=offset)


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


# ---- a surface to be read alone


def test_a_surface_over_a_file_is_read_alone(tmp_path):
    values = np.arange(1000, dtype=np.float16)
    surface = ReadOnlySurface(mapped(tmp_path / "v", b"x" + values.tobytes(), np.uint8, offset=1))
    array = surface.array(np.float16)
    assert np.array_equal(array, values) and surface.nbytes == 2000 and surface.read_only and not surface.shared
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.flags.writeable = True
    for held in (surface.lock, surface.access):
        with pytest.raises(StateError, match="read alone; write to a copy"), held():
            pass
        with held(read_only=True), surface.lock(read_only=True):
            pass
    surface.touch()
    assert surface.seed == 0
    with pytest.raises(ShapeError, match="does not fit"):
        surface.array(np.float16, 1001)
    with pytest.raises(StateError, match="to be written, the surface is read-only"):
        ParamStore(Heap(), native.Pool(1), {"w": Spec.normal(2, 2)}, True)["w"].place(surface, Slot("w", 2, 2, 0, 2, 1))
    given = ParamStore(Heap(), native.Pool(1), {"w": Spec.normal(10, 100)}, False, {"w": values})["w"]
    with pytest.raises(StateError, match="no master to change"):
        given.master *= 2
    del surface
    gc.collect()
    (tmp_path / "v").unlink()
    assert np.array_equal(array, values), "an array keeps the map"


def test_bad_memory():
    for array in (np.zeros((4, 4))[:, 1], np.zeros(0), np.zeros((4, 4)).T):
        with pytest.raises(ShapeError, match="over bytes in a row"):
            ReadOnlySurface(array)
    out = native.ffi.new("anert_surface **")
    for arguments in ((native.ffi.NULL, 4, out), (out, 0, out), (out, 4, native.ffi.NULL)):
        with pytest.raises(InputError, match=r"no surface can be|out is NULL"):
            native.call(native.lib.anert_surface_over, *arguments)


# ---- huge pages


def settle(array: np.ndarray) -> int:
    settled = native.ffi.new("size_t *")
    native.call(native.lib.anert_pages_settle, native.ffi.cast("void *", array.ctypes.data), array.nbytes, settled)
    return settled[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot move pages: nothing happens there")
def test_bytes_and_addresses_stay_when_pages_become_huge(tmp_path):
    """Readers go on meanwhile; afterwards the file may change, and nobody can write the pages."""
    content = np.random.default_rng(0).integers(0, 256, 5 * HUGE_PAGE + 12_345, np.uint8)
    array = mapped(tmp_path / "v", content.tobytes())
    wrong, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            wrong.extend([] if np.array_equal(array, content) else [1])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    moved = [settle(array[77:]) for _ in range(3)]
    done.set()
    for reader in readers:
        reader.join()
    assert moved == [moved[0]] * 3 and 4 * HUGE_PAGE <= moved[0] <= 5 * HUGE_PAGE
    assert not wrong and np.array_equal(array, content)
    first = 77 + -(array.ctypes.data + 77) % HUGE_PAGE
    with open(tmp_path / "v", "r+b") as f:
        f.write(bytes(content.size))
    assert np.array_equal(array[first : first + moved[0]], content[first : first + moved[0]])
    lines = Path("/proc/self/maps").read_text().splitlines()
    address = array.ctypes.data + first
    spans = [(*(int(x, 16) for x in line.split()[0].split("-")), line.split()[1]) for line in lines]
    assert [rights for start, end, rights in spans if start <= address < end] == ["r--p"]


def test_a_small_map_stays(tmp_path):
    array = mapped(tmp_path / "v", bytes(HUGE_PAGE - 1))
    assert settle(array) == 0
    with pytest.raises(InputError, match="no map can be"):
        native.call(native.lib.anert_pages_settle, native.ffi.NULL, 1, native.ffi.NULL)


@pytest.mark.parametrize("at", [0, 2046, 5000])
def test_infinities_are_clamped_where_a_file_is_mapped(tmp_path, at):
    """Those of one array, on whatever pages it lies; its neighbours and the file stay."""
    content = np.random.default_rng(at).integers(0, 1 << 16, 12_000, np.uint16)
    content[::7] = 0x7C00
    content[3::11] = 0xFC00
    content[5::13] = 0x7E01  # NaN
    whole = mapped(tmp_path / "v", content.tobytes(), np.uint16)
    want, n = content.copy(), 4100
    part = want[at : at + n]
    past = (part & 0x7FFF) == 0x7C00
    part[past] = part[past] & 0x8000 | 0x7BFF
    count = native.ffi.new("uint64_t *")
    for expected in (np.count_nonzero(past), 0):
        pointer = native.ffi.from_buffer("uint16_t[]", whole[at : at + n])
        native.call(native.lib.anert_pages_clamp, pointer, n, count)
        assert count[0] == expected and np.array_equal(whole, want)
    assert (tmp_path / "v").read_bytes() == content.tobytes()
    for address, size in ((native.ffi.NULL, 1), (pointer, 1 << 63)):
        with pytest.raises(InputError, match="no map can be"):
            native.call(native.lib.anert_pages_clamp, address, size, count)
