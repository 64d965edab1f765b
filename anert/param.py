"""Param: an fp32 master, its gradient and moments, and the fp16 copies that programs read.

All masters lie in one buffer, all gradients in another, so that a norm or a checkpoint is one pass. A copy is written
when the optimizer steps or weights are loaded, and at no other time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anert import ffi
from anert.errors import InputError, ShapeError, StateError
from anert.ffi import Pool, call
from anert.kernel import Slot
from anert.mapped import Ahead, clamp, finite_ahead, map_of, settle_ahead
from anert.surface import Heap, ReadOnlySurface, Surface, locked, shared

Progress = Callable[[float, float], None]
"""(done, total) of something that takes a while."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a model declares of a parameter: shape (rows, cols), initial values, whether weight decay applies.

    `std`: normal with this deviation; None: constant `fill`.
    """

    shape: tuple[int, int]
    std: float | None = 0.02
    fill: float = 0.0
    decay: bool = True

    @classmethod
    def normal(cls, rows: int, cols: int, std: float = 0.02) -> Spec:
        """A weight matrix (out, in), N(0, std), decayed."""
        return cls((rows, cols), std)

    @classmethod
    def ones(cls, n: int) -> Spec:
        """A gain (n, 1), not decayed."""
        return cls((n, 1), None, 1.0, decay=False)

    @classmethod
    def zeros(cls, n: int) -> Spec:
        """A bias (n, 1), not decayed."""
        return cls((n, 1), None, 0.0, decay=False)

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a Param keeps in its store's tables."""

    record: Any
    """anert_param *"""
    squares: np.ndarray
    """(1,) float64 view."""
    shared: dict[Surface, None]
    """Surfaces of all Params that want locks."""


class Param:
    """A named parameter; `master` and, in training, `grad`, `m`, `v` are fp32 (rows, cols) views of the store's
    buffers. One that does not change may have `halves` instead, fp16 (rows, cols) as a file holds them."""

    def __init__(self, name: str, spec: Spec, master: np.ndarray | None, halves: np.ndarray | None = None) -> None:
        self.name, self.spec, self._master, self.halves = name, spec, master, halves
        self.rows, self.cols = spec.shape
        self.grad: np.ndarray | None = None
        self.m: np.ndarray | None = None
        self.v: np.ndarray | None = None
        self.placements: list[tuple[Surface, Slot]] = []
        self.encoded: Surface | None = None
        """An int8 copy (anert_q8_encode); optimizers do not write it, `ParamStore.sync` does."""
        self.given: Surface | None = None
        """`halves` as the dense copy that programs read."""
        self.shared: list[Surface] = []
        """Where those placements lie that want locks."""
        self._native: Any = None
        self._entry: _Entry | None = None

    def enter(self, entry: _Entry) -> None:
        """Be what optimizers update: `entry` is kept true from now on."""
        self._entry = entry
        self._describe()

    @property
    def squares(self) -> float:
        """Sum of squares of `grad`, if what wrote it last has summed them up; whoever else writes it says NaN."""
        return float(self._entry.squares[0]) if self._entry else math.nan

    @squares.setter
    def squares(self, value: float) -> None:
        assert self._entry is not None
        self._entry.squares[0] = value

    @property
    def squares_at(self) -> Any:
        """`squares` as a double *."""
        assert self._entry is not None
        return ffi.ffi.from_buffer("double[]", self._entry.squares)

    @property
    def master(self) -> np.ndarray:
        """fp32 (rows, cols); of halves, widened anew each time."""
        if self._master is None:
            assert self.halves is not None
            return self.halves.astype(np.float32)
        return self._master

    @master.setter
    def master(self, values: np.ndarray) -> None:
        if self._master is None:
            raise StateError(f"{self.name} has no master to change: it is read where a file holds it; load it to train")
        self._master = values
        self._describe()

    def place(self, surface: Surface, slot: Slot) -> None:
        """Keep an fp16 copy at `slot` of `surface` from now on. ShapeError if the slot has another shape or leaves the
        surface, StateError if nobody may write that."""
        if surface.read_only:
            raise StateError(
                f"{self.name}: a copy of it is to be written, the surface is read-only: take one of a heap"
            )
        if (slot.rows, slot.cols) != (self.rows, self.cols):
            raise ShapeError(f"{self.name} is {self.spec.shape}, its slot in {slot.port} is ({slot.rows}, {slot.cols})")
        last = slot.offset + (self.rows - 1) * slot.row_stride + (self.cols - 1) * slot.col_stride + slot.broadcast
        if last * 2 > surface.nbytes:
            raise ShapeError(
                f"{self.name}: slot of {slot.port} ends at byte {last * 2}, the surface has {surface.nbytes}"
            )
        self.placements.append((surface, slot))
        if surface.shared and surface not in self.shared:
            self.shared.append(surface)
        self._native = None
        self._describe()

    @property
    def native(self) -> tuple[Any, int]:
        """The placements as anert_placement[], and their number."""
        if self._native is None:
            array = ffi.ffi.new("anert_placement[]", max(1, len(self.placements)))
            for item, (surface, slot) in zip(array, self.placements, strict=False):
                item.base = ffi.ffi.cast("uint16_t *", surface.ptr) + slot.offset
                item.row_stride, item.col_stride, item.broadcast = slot.row_stride, slot.col_stride, slot.broadcast
                if not surface.shared:  # there an unlock advances the seed
                    item.surface = surface.handle
            self._native = array
        return self._native, len(self.placements)

    @property
    def record(self) -> Any:
        """Itself as an optimizer's anert_param."""
        assert self._entry is not None
        return self._entry.record

    def _describe(self) -> None:
        """Write what has changed into the entry."""
        if self._entry is None:
            return
        record, (placements, n) = self._entry.record, self.native
        for name, x in (("master", self.master), ("m", self.m), ("v", self.v), ("grad", self.grad)):
            if x is not None:
                setattr(record, name, ffi.ffi.cast("float *", x.ctypes.data))
        record.rows, record.cols, record.decays = self.rows, self.cols, self.spec.decay
        record.placements, record.n_placements = placements, n
        self._entry.shared.update(dict.fromkeys(self.shared))

    @property
    def surfaces(self) -> list[Surface]:
        """Where its copies lie, those that are written."""
        encoded = [self.encoded] if self.encoded is not None else []
        return [*(surface for surface, _ in self.placements), *encoded]

    @property
    def copies(self) -> int:
        return len(self.placements) + (self.encoded is not None)

    def __repr__(self) -> str:
        return f"<Param {self.name} {self.spec.shape}>"


class ParamStore(Mapping[str, Param]):
    """All parameters of a model, in declaration order."""

    ALIGN = 16  # fp32 elements: 64 bytes

    def __init__(self, heap: Heap, pool: Pool, specs: Mapping[str, Spec], train: bool,
                 tensors: Mapping[str, np.ndarray] | None = None) -> None:  # fmt: skip
        """tensors: weights that will not change. Then masters are views of these, where they are float32, so that a
        mapped file is read once, on its way into the fp16 copies; and a file's matrices of float16 are what programs
        read, where these take them as they lie. InputError names what is missing or misshapen."""
        self.heap, self.pool = heap, pool
        self.offsets: dict[str, int] = {}
        at = 0
        for name, spec in specs.items():
            if min(spec.shape) < 1:
                raise ShapeError(f"parameter {name} has shape {spec.shape}: both sides must be at least 1")
            self.offsets[name] = at
            at += math.ceil(spec.size / self.ALIGN) * self.ALIGN
        self.size = at
        self.flats = [] if tensors is not None else [self._buffer() for _ in range(3 if train else 1)]
        """What a checkpoint holds: masters and, in training, both moments; flat, fp32."""
        self.grads = self._buffer() if train else None
        self._params: dict[str, Param] = {}
        for name, spec in specs.items():
            if tensors is not None:
                self._params[name] = _unchanging(name, spec, _tensor(tensors, name, spec))
                continue
            p = self._params[name] = Param(name, spec, self._view(self.flats[0], name, spec))
            if self.grads is not None:
                p.grad = self._view(self.grads, name, spec)
                p.m, p.v = self._view(self.flats[1], name, spec), self._view(self.flats[2], name, spec)
        self.n_params = sum(spec.size for spec in specs.values())
        self.squares = np.full(len(specs), math.nan)
        """`Param.squares` of all."""
        table: Any = ffi.ffi.new("anert_param[]", len(specs))
        self.table = table if train else None
        """In training `Param.record` of all, in order."""
        self.shared: dict[Surface, None] = {}
        """In training, the surfaces of copies that want locks."""
        for i, p in enumerate(self.values() if train else ()):
            p.enter(_Entry(table + i, self.squares[i : i + 1], self.shared))
        self._copies: dict[tuple[str, Slot, int], Surface] = {}
        self._ahead: _Ahead | None = None
        self._mapped = {n: p.halves for n, p in self._params.items() if p.halves is not None and map_of(p.halves)}
        self._finite = finite_ahead(pool, self._mapped) if self._mapped else None
        self._settling: Ahead[int] | None = None

    @property
    def master(self) -> np.ndarray:
        """All masters, flat; a store of given tensors has none."""
        return self.flats[0]

    def _buffer(self) -> np.ndarray:
        return Surface(self.heap, max(1, self.size) * 4).array(np.float32, (self.size,))

    def _view(self, flat: np.ndarray, name: str, spec: Spec) -> np.ndarray:
        start = self.offsets[name]
        return flat[start : start + spec.size].reshape(spec.shape)

    def __getitem__(self, name: str) -> Param:
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    @property
    def copy_bytes(self) -> int:
        """Bytes that fp16 copies of all weights take, one of each that is not there already."""
        return sum(2 * p.spec.size for name, p in self.items() if name not in self._mapped)

    def copy_of(self, name: str, slot: Slot, nbytes: int, make: Callable[[int], Surface],
                any_memory: bool = False) -> Surface:  # fmt: skip
        """The surface that holds parameter `name` alone, laid out as `slot`: one for all programs that read it so.
        any_memory: it may be one that nobody made for the purpose and nobody writes, over a file's halves."""
        if any_memory and slot.dense and nbytes <= 2 * self[name].spec.size and (given := self._given(name)):
            return given
        key = (
            name,
            Slot("", slot.rows, slot.cols, slot.offset, slot.row_stride, slot.col_stride, slot.broadcast),
            nbytes,
        )
        surface = self._copies.get(key)
        if surface is None:
            surface = self._copies[key] = make(nbytes)
            self[name].place(surface, slot)
        return surface

    def _given(self, name: str) -> Surface | None:
        """The surface over a parameter's halves in a file. Before programs read it, `sync` says whether it may."""
        p = self[name]
        if p.given is None and name in self._mapped:
            p.given = ReadOnlySurface(self._mapped[name])
        return p.given

    def settle_ahead(self, available: int) -> None:
        """Begin to move a file's halves to huge pages, where programs read them faster; they may read meanwhile, from
        the same addresses. Not unless `available` bytes of memory hold them twice."""
        self._clamp_given()
        if self._mapped and 2 * sum(a.nbytes for a in self._mapped.values()) <= available:
            self._settling = settle_ahead(self._mapped.values())

    def encoded_copy(self, name: str, make: Callable[[int], Surface]) -> Surface:
        """The surface that holds parameter `name` in int8. ShapeError if its columns are no groups of 32."""
        p = self[name]
        if p.encoded is None:
            nbytes = int(ffi.lib.anert_q8_bytes(p.rows, p.cols))
            if not nbytes:
                raise ShapeError(f"{name} is {p.spec.shape}: int8 weights have columns in groups of 32")
            p.encoded = make(nbytes)
        return p.encoded

    def initialise(self, seed: int, progress: Progress | None = None) -> None:
        """Draw initial values; each parameter has its own stream, so that adding one changes no other.
        progress(weights set, all)."""
        for p in self._told(progress):
            if p.spec.std is None:
                p.master[...] = p.spec.fill
            else:
                rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(p.name.encode())]))
                p.master[...] = rng.standard_normal(p.spec.shape, dtype=np.float32) * np.float32(p.spec.std)

    def load(self, tensors: Mapping[str, np.ndarray], progress: Progress | None = None) -> None:
        """Copy tensors of the same names and sizes into the masters. InputError names what is missing or misshapen.
        progress(weights set, all)."""
        for p in self._told(progress):
            p.master[...] = _tensor(tensors, p.name, p.spec)

    def _told(self, progress: Progress | None) -> Iterator[Param]:
        """Every Param; after each, how many weights are done."""
        done = 0
        for p in self.values():
            yield p
            done += p.spec.size
            if progress:
                progress(done, self.n_params)

    def tensors(self) -> dict[str, np.ndarray]:
        """Name -> master, as saved: vectors (n, 1) as (n,)."""
        return self.named(self.flats)[0]

    def named(self, flats: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(weights, moments `<name>.m` and `<name>.v`) as views of buffers laid out as `flats`: vectors (n, 1) as
        (n,)."""

        def view(flat: np.ndarray, p: Param) -> np.ndarray:
            found = self._view(flat, p.name, p.spec)
            return found[:, 0] if p.cols == 1 else found

        weights = {name: view(flats[0], p) for name, p in self.items()}
        kinds = list(zip(("m", "v"), flats[1:], strict=False))
        return weights, {f"{name}.{kind}": view(flat, p) for name, p in self.items() for kind, flat in kinds}

    def grads_written(self) -> None:
        """Say that gradients were written by other than what sums their squares on the way."""
        self.squares.fill(math.nan)

    def load_moments(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Copy moments that `named` gave back. InputError names what is missing or misshapen."""
        for name, moment in self.named(self.flats)[1].items():
            if name not in tensors or tensors[name].size != moment.size:
                raise InputError(f"the checkpoint has no optimizer state {name!r} of {moment.size:,} numbers")
            moment[...] = tensors[name].reshape(moment.shape)

    def sync(self) -> int:
        """Write every master to its copies, and make sure of those that a file holds; returns how many weights were
        clamped to +-65504. After `sync_ahead`: wait for that, and write those alone that have got more copies since."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return _Writing(self.pool, list(self.values())).run() + self._clamp_given()
        clamped = ahead.result() + self._clamp_given()
        return clamped + _Writing(self.pool, [p for p in self.values() if p.copies != ahead.copies[p.name]]).run()

    def _clamp_given(self) -> int:
        finite = self._finite.result() if self._finite is not None else {}
        return sum(clamp(self._mapped[name]) for name, ok in finite.items() if not ok and self[name].given is not None)

    def sync_ahead(self) -> None:
        """Begin a `sync` on a thread of its own; whoever reads a copy calls `sync` first."""
        self._ahead = _Ahead(self.pool, list(self.values()))


class _Writing:
    """Params on their way to their copies: one native call."""

    def __init__(self, pool: Pool, params: Sequence[Param]) -> None:
        self.pool, self.params = pool, [p for p in params if p.copies]
        self.table = ffi.ffi.new("anert_param[]", max(1, len(self.params)))
        self.kept: list[object] = []
        for item, p in zip(self.table, self.params, strict=False):
            placements, n = p.native
            if p.halves is not None:
                item.halves = source = ffi.ffi.from_buffer("uint16_t[]", p.halves)
            else:
                item.master = source = ffi.ffi.from_buffer("float[]", p.master)
            self.kept += [placements, source]
            item.rows, item.cols = p.rows, p.cols
            item.placements, item.n_placements = placements, n
            if p.encoded is not None:
                item.encoded = ffi.ffi.cast("uint8_t *", p.encoded.ptr)

    def run(self) -> int:
        surfaces = [s for p in self.params for s in p.surfaces]
        clamped = ffi.ffi.new("uint64_t *")
        with locked(shared(surfaces)):
            call(ffi.lib.anert_params_sync, self.pool.ptr, self.table, len(self.params), clamped)
        for p in self.params:
            if p.encoded is not None:
                p.encoded.touch()
        return int(clamped[0])


class _Ahead(Ahead[int]):
    """A _Writing on a thread. copies: by name, how many a Param had then."""

    def __init__(self, pool: Pool, params: Sequence[Param]) -> None:
        self.copies = {p.name: p.copies for p in params}
        super().__init__(_Writing(pool, params).run, "anert-sync")


def _unchanging(name: str, spec: Spec, source: np.ndarray) -> Param:
    """A Param of weights that will not change: matrices of float16 as they are, all else as float32, copied where that
    is needed (an odd address is no fp16 array for native code)."""
    if source.dtype == np.float16 and spec.shape[1] > 1:
        return Param(name, spec, None, np.require(source, np.float16, ("C", "A")))
    return Param(name, spec, np.ascontiguousarray(source, np.float32))


def _tensor(tensors: Mapping[str, np.ndarray], name: str, spec: Spec) -> np.ndarray:
    """The tensor of this name in its parameter's shape."""
    if name not in tensors:
        raise InputError(f"the checkpoint has no tensor {name!r} that this model needs")
    source = np.asarray(tensors[name])
    if source.dtype.kind not in "fiu" and source.dtype.name != "bfloat16":
        raise InputError(f"tensor {name!r} is {source.dtype} in the checkpoint: expected floating-point numbers")
    if source.size != spec.size:
        raise InputError(f"tensor {name!r} is {source.shape} in the checkpoint, the model needs {spec.shape}")
    return source.reshape(spec.shape)
