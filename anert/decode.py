"""Session: a model that goes on from the tokens it has seen, by programs for a few widths and a key-value cache.

    session = Session(runtime, model, store)
    logits = session.extend(prompt)          # prefill, then token by token
    logits = session.extend([token])

A program of width T takes T new positions beside the cache, the rotation and the mask as ports, and returns their keys
and values, which the host writes into the cache. Weights are the placements that training programs read: no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anert import ffi
from anert.backend.base import Binding, Chain, Positions, Program
from anert.blocks import BlockKernels, build_cached_blocks, mixing_block
from anert.errors import InputError, StateError, UnsupportedError
from anert.ffi import Pool, call
from anert.head import Head
from anert.kernel import Kernel, Slot, round_up
from anert.model import Decoder
from anert.network import Location, Network
from anert.nn import MASKED, halves
from anert.param import ParamStore
from anert.runtime import Runtime, memory_available
from anert.surface import Surface, locked, shared

WEIGHTS = ("fp16", "int8")
WIDTHS = (1, 8, 32, 256)
"""New positions that a program takes; an engine's own least width takes the place of smaller ones."""
THIN, FEW = 8, 24
"""A program of up to THIN positions multiplies weights as they lie (native/gemm.c), wider ones pack them first: FEW
positions by several thin runs cost no more than by one wide."""

LEAST_CAPACITY = 256
"""Of a text that is known to be short: attention to fewer positions is no longer what a token waits for."""

Matrix = tuple[Any, int, int, int]
"""Of fp16: pointer, rows, columns, row stride."""


class Moves:
    """Columns of some matrices into columns of others of as many rows, in one native call."""

    def __init__(self, pool: Pool, pairs: Sequence[tuple[Matrix, Matrix]], keep: object) -> None:
        self._items, self._n = ffi.ffi.new("anert_columns[]", max(1, len(pairs))), len(pairs)
        self._pool, self._keep = pool, keep
        self._err = ffi.error()
        for item, ((src, rows, src_cols, src_stride), (dst, _, dst_cols, dst_stride)) in zip(
            self._items, pairs, strict=False
        ):
            item.src, item.dst, item.rows = src, dst, rows
            item.src_cols, item.dst_cols, item.src_stride, item.dst_stride = src_cols, dst_cols, src_stride, dst_stride

    @property
    def items(self) -> tuple[Any, int]:
        """anert_columns, and how many."""
        return self._items, self._n

    def run(self, source: int, target: int, count: int) -> None:
        """Columns [source, source + count) of each source become [target, target + count) of its target."""
        call(ffi.lib.anert_columns_move, self._pool.ptr, self._items, self._n, source, target, count, err=self._err)


@dataclass(slots=True)
class _Width:
    """All that runs `size` new positions (the last of them may be padding)."""

    size: int
    head: Head
    x: list[Location]
    run: Chain
    before: Moves
    """cos and sin of each head size, out of their tables (2 hd, S) into ports (2 hd, T)."""
    after: Moves
    """The new keys and values of all layers into their caches, and into the mask that they can be seen."""
    tokens: np.ndarray
    flops: int = 0
    """Executed by the blocks in one run."""
    touched: list[Surface] = field(default_factory=list)
    """What the host writes around a run."""
    filled: list[Surface] = field(default_factory=list)
    """What the host writes before a run; it reads `made` and writes `kept` behind one. Those alone that want locks."""
    made: list[Surface] = field(default_factory=list)
    kept: list[Surface] = field(default_factory=list)
    at_once: Positions | None = None
    """All of it, and logits, in one native call: where nothing wants locks."""
    keep: object = None

    def join(self) -> None:
        """Make `at_once`, if that can be."""
        if self.filled or self.made or self.kept:
            return
        args = ffi.ffi.new("anert_positions *")
        handles = ffi.ffi.new("anert_surface *[]", [surface.handle for surface in self.touched])
        self.head.embeds(args, self.tokens, self.x[0])
        args.head = self.head.classifies(self.x[-1])
        (args.before, args.n_before), (args.after, args.n_after) = self.before.items, self.after.items
        args.touched, args.n_touched = handles, len(handles)
        self.keep, self.at_once = (args, handles), self.run.positions(args)


class Session:
    """A model on a runtime with room for `capacity` positions (seq_len unless given), its weights in `store`.

    weights: `int8` encodes matrices in groups of 32 columns, the classifier too, on `cpu` alone. All programs are
    compiled here. `position`: how many positions the cache holds. Raises DoesNotFit before anything
    big is allocated, CompileError past the compile budget.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: Decoder,
        store: ParamStore,
        capacity: int = 0,
        widths: Sequence[int] = WIDTHS,
        weights: str = "fp16",
        on_compile: Callable[[int, int], None] | None = None,
    ) -> None:
        self.runtime, self.model, self.store = runtime, model, store
        self.capacity = capacity or model.config.seq_len
        self.layers = model.config.n_layers if model.blocks else 0
        if weights not in WEIGHTS:
            raise InputError(f"weights {weights!r}: expected {' or '.join(WEIGHTS)}")
        self.weights = weights
        self.caps = runtime.backend.capabilities
        self.cached = round_up(self.capacity, self.caps.width_multiple)
        self.position, self.kernels = 0, 0
        self.widths: list[_Width] = []
        self._programs: dict[str, Program] = {}
        self._caches: dict[tuple[int, int, str], Location] = {}
        self._scratch: dict[tuple[object, ...], Surface] = {}
        self._tables: dict[str, np.ndarray] = {}
        self.add_widths(widths, on_compile)

    def add_widths(self, widths: Sequence[int], on_compile: Callable[[int, int], None] | None = None) -> None:
        """Make programs for more widths. The first of them give all weights their copies; `store.sync` writes these."""
        least = self.caps.width_multiple
        sizes = {max(least, min(round_up(w, least), self.cached)) for w in widths} - {w.size for w in self.widths}
        if not sizes:
            return
        built = {size: build_cached_blocks(self.model, size, self.cached, self.caps) for size in sorted(sizes)}
        kernels = [(k, b) for blocks in built.values() for b in blocks for k in b.forward]
        self.runtime.check_memory(self._estimate(built), "the key-value cache")
        for i, (kernel, block) in enumerate(kernels):
            self._compile(kernel, block)
            if on_compile:
                on_compile(i + 1, len(kernels))
        self.kernels = len(self._programs)
        if not self.widths:
            self._past = self._location("past", 1, self.cached)
            self._mask = self._past.array()
            with self._past.surface.access():
                self._mask[...] = MASKED
            self._place_head()
        made = [self._bind_width(size, blocks) for size, blocks in built.items()]
        self.widths = sorted([*self.widths, *made], key=lambda width: width.size)

    def _estimate(self, built: dict[int, list[BlockKernels]]) -> int:
        blocks = next(iter(built.values()))
        cache = sum(k.sizes[s.port] for b in blocks for k in b.forward for n, s in k.inputs.items() if _is_cache(n))
        return cache * self.layers + max(built) * 2 * self.model.config.dim * 4

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values: what memory grows by with the context, all of it allocated at the start."""
        return sum(c.surface.nbytes for c in self._caches.values())

    def _encoded(self, kernel: Kernel, block: BlockKernels) -> dict[str, str]:
        """The ports whose weights are int8: matrices of columns in groups of 32, where those are asked for."""
        if self.weights == "fp16":
            return {}
        params = [(name, slot) for name, slot in kernel.inputs.items() if name in block.params]
        return {s.port: self.weights for _, s in params if ffi.lib.anert_q8_bytes(s.rows, s.cols)}

    def _compile(self, kernel: Kernel, block: BlockKernels) -> Program:
        """Its Program; `_programs` spares the backend's lookup, which hashes text and blobs, at every layer."""
        program = self._programs.get(kernel.text)
        if program is None:
            program = self.runtime.backend.compile(kernel.text, kernel.blobs, self._encoded(kernel, block))
            self._programs[kernel.text] = program
        return program

    # ---- surfaces and bindings

    def _surface(self, nbytes: int) -> Surface:
        return self.runtime.backend.surface(max(self.caps.min_surface, round_up(nbytes, self.caps.surface_multiple)))

    def _location(self, name: str, rows: int, cols: int) -> Location:
        width = round_up(cols, self.caps.width_multiple)
        return Location(self._surface(2 * rows * width), Slot(name, rows, cols, 0, width, 1))

    def _place_head(self) -> None:
        for name in ("tok_embeddings", "output"):
            if name in self.store:
                p = self.store[name]
                slot = Slot(name, p.rows, p.cols, 0, p.cols, 1)
                self.store.copy_of(
                    name, slot, p.spec.size * 2, lambda n: Surface(self.runtime.heap, n), any_memory=True
                )

    def _bind_width(self, size: int, blocks: list[BlockKernels]) -> _Width:
        rt, store = self.runtime, self.store
        embedding = store["tok_embeddings"]
        head = Head(rt.heap, rt.pool, embedding, store.get("output", embedding), store.get("norm"), self.model.norm_eps,
                    size, rt.precision)  # fmt: skip
        if self.weights == "int8" and ffi.lib.anert_q8_bytes(head.vocab, head.dim):
            classes = store.encoded_copy("output" if "output" in store else "tok_embeddings", self._surface)
            head.args.table_q8 = ffi.ffi.cast("uint8_t *", classes.ptr)
        ports = {f"x{i}": self._location("x", self.model.config.dim, size) for i in range(2)}
        x, bindings = [ports["x0"]], []
        new: list[tuple[Location, Location]] = []
        common: dict[str, Location] = {"past": self._past}
        for i in range(self.layers * len(blocks)):
            layer, j = divmod(i, len(blocks))
            env = {**common, "x": x[-1]}
            bindings += [self._bind(kernel, env, blocks[j], layer, j, i % 2) for kernel in blocks[j].forward]
            common |= {n: where for n, where in env.items() if n.startswith(("cos", "sin"))}
            new += [(env[n], self._caches[layer, j, n.removesuffix("_new")]) for n in env if n.endswith("_new")]
            x.append(env["y"])
        seen = np.zeros(size, np.float16)
        after = [(_matrix(source, size), _matrix(cache, self.capacity)) for source, cache in new]
        after.append((_rows(seen.reshape(1, -1)), _matrix(self._past, self.capacity)))
        rotations = [where for n, where in common.items() if n.startswith(("cos", "sin"))]
        before = [(_rows(self._table(n)), _matrix(w, size)) for n, w in common.items() if w in rotations]
        touched = [where.surface for where in (*common.values(), *(cache for _, cache in new))]
        filled = shared(where.surface for where in (x[0], *rotations))
        made, kept = (shared(pair[side].surface for pair in new) for side in range(2))
        flops = self.layers * sum(self._compile(k, b).stats.flops_executed for b in blocks for k in b.forward)
        width = _Width(size, head, x, rt.backend.chain(bindings), Moves(rt.pool, before, self._tables),
                       Moves(rt.pool, after, seen), np.zeros(size, np.int32), flops, touched, filled, made,
                       [*kept, *shared([self._past.surface])])  # fmt: skip
        width.join()
        return width

    def _bind(self, kernel: Kernel, env: dict[str, Location], block: BlockKernels, layer: int, j: int,
              turn: int) -> Binding:  # fmt: skip
        """Surfaces on all ports of a kernel; what it makes joins `env`: keys and values in surfaces of their own, all
        else in scratch that layers take turns at."""
        surfaces: dict[str, Surface] = {}
        encoded = self._encoded(kernel, block)
        for name, slot in kernel.inputs.items():
            size = kernel.sizes[slot.port]
            if slot.port in encoded:
                surfaces[slot.port] = self.store.encoded_copy(f"layers.{layer}.{name}", self._surface)
                continue
            if name in block.params:
                any_memory = self.runtime.backend.any_memory
                surfaces[slot.port] = self.store.copy_of(
                    f"layers.{layer}.{name}", slot, size, self._surface, any_memory
                )
                continue
            if _is_cache(name):
                if (layer, j, name) not in self._caches:
                    self._caches[layer, j, name] = Location(self._surface(size), slot)
                env[name] = self._caches[layer, j, name]
            elif name not in env:
                env[name] = Location(self._surface(size), slot)  # rotation
            surfaces[slot.port] = env[name].surface
        for name, slot in kernel.outputs.items():
            size = kernel.sizes[slot.port]
            if name.endswith("_new"):
                surfaces[slot.port] = self._surface(size)
            else:
                key = (kernel.name, slot.port, turn)
                if key not in self._scratch:
                    self._scratch[key] = self._surface(size)
                surfaces[slot.port] = self._scratch[key]
            env[name] = Location(surfaces[slot.port], slot)
        return self._compile(kernel, block).bind(surfaces)

    def _table(self, name: str) -> np.ndarray:
        """cos or sin of every position, (2 hd, S) fp16 halves, by name of their port: cos<hd>, sin<hd>."""
        if name not in self._tables:
            angle = self.model.positions(self.capacity, 1).angles(int(name[3:]))
            self._tables[name] = np.concatenate(halves(getattr(np, name[:3])(angle)))
        return self._tables[name]

    def flops(self, n: int) -> int:
        """Executed by a call of `extend` with n tokens, classifier included."""
        head, total = 2 * self.widths[0].head.vocab * self.model.config.dim, 0
        while n > 0:
            width = self._width(n)
            total, n = total + width.flops, n - width.size
        return total + head

    def settle(self) -> None:
        """Begin to move weights that are read where a file is mapped to huge pages, from which many tokens come faster;
        running goes on."""
        if self.weights == "fp16" and self.runtime.backend.any_memory:
            self.store.settle_ahead(memory_available())

    # ---- running

    def reset(self) -> None:
        """Forget all positions."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Forget the positions from `position` on; StateError if it has not been reached."""
        if not 0 <= position <= self.position:
            raise StateError(f"cannot go back to position {position}: the cache holds {self.position}")
        with self._past.surface.access():
            self._mask[:, position : self.position] = MASKED
        self.position = position

    def extend(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append tokens to what has been seen; fp32 logits (vocab,) of what comes next.

        Raises InputError for no tokens, ids outside the vocabulary, or more than the cache has room for.
        """
        ids = np.ascontiguousarray(tokens, np.int32)
        if ids.ndim != 1 or ids.size == 0:
            raise InputError(f"expected a list of at least one token, got shape {ids.shape}")
        if ids.size > self.capacity - self.position:
            raise InputError(
                f"{ids.size} tokens do not fit: the context of {self.capacity} positions holds {self.position} already"
            )
        low, high = (int(ids[0]),) * 2 if ids.size == 1 else (int(ids.min()), int(ids.max()))
        if low < 0 or high >= self.model.config.vocab_size:
            worst = low if low < 0 else high
            raise InputError(f"token {worst} is outside the vocabulary of {self.model.config.vocab_size}")
        start = 0
        while True:
            width = self._width(ids.size - start)
            count = min(width.size, ids.size - start)
            logits = self._run(width, ids[start : start + count], start + count == ids.size)
            start += count
            if logits is not None:
                return logits

    def _width(self, n: int) -> _Width:
        """The narrowest program that takes n tokens, or the widest there is; of FEW tokens the widest thin one takes
        some."""
        if n <= self.widths[0].size:
            return self.widths[0]
        found = next((w for w in self.widths if w.size >= n), self.widths[-1])
        thin = [w for w in self.widths if w.size <= THIN]
        return thin[-1] if thin and found.size > THIN and n <= FEW else found

    def _run(self, width: _Width, ids: np.ndarray, last: bool) -> np.ndarray | None:
        """One program's worth of tokens; logits behind the last of all."""
        n, at = ids.size, self.position
        width.tokens[:n] = ids
        if n < width.size:
            width.tokens[n:] = 0  # padding comes after: nobody looks back at it
        if width.at_once is not None:
            logits = np.empty(width.head.vocab, np.float32) if last else None
            width.at_once(at, n, ffi.ffi.NULL if logits is None else ffi.ffi.from_buffer("float[]", logits))
            self.position = at + n
            return logits
        with locked(width.filled):
            width.head.embed(width.tokens, width.x[0])
            width.before.run(at, 0, n)
        width.run.run()
        with locked(width.kept, width.made):
            width.after.run(0, at, n)
        for surface in width.touched:
            surface.touch()
        self.position = at + n
        return width.head.logits(width.x[-1], np.array([n - 1], np.int32))[0] if last else None


class Windowed:
    """What a Session offers, for a model whose blocks let positions see each other by other ways than attention: every
    token runs the whole window again."""

    WINDOW = 32

    def __init__(self, runtime: Runtime, model: Decoder, store: ParamStore,
                 on_compile: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
        self.capacity, self._seen = model.config.seq_len, list[int]()
        sizes = sorted({min(self.WINDOW, self.capacity), self.capacity})
        self.networks = [Network(runtime, model, store, n, 1, False, on_compile) for n in sizes]
        self.kernels = sum(net.kernels for net in self.networks)

    @property
    def position(self) -> int:
        return len(self._seen)

    def rewind(self, position: int) -> None:
        """Forget the positions from `position` on; StateError if it has not been reached."""
        if not 0 <= position <= self.position:
            raise StateError(f"cannot go back to position {position}: {self.position} are seen")
        del self._seen[position:]

    def extend(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """As Session.extend."""
        ids = [int(t) for t in tokens]
        if not ids or len(ids) > self.capacity - self.position:
            raise InputError(f"{len(ids)} tokens do not fit: {self.position} of {self.capacity} positions are taken")
        seen = [*self._seen, *ids]
        net = next(net for net in self.networks if net.n >= len(seen))
        padded = np.zeros(net.n, np.int32)  # what stands behind the last token cannot reach it
        padded[: len(seen)] = seen
        logits = net.head.logits(net.forward(padded), np.array([len(seen) - 1], np.int32))[0]
        self._seen = seen
        return logits


def widths_for(longest: int) -> list[int]:
    """Those of WIDTHS that run when no prompt is longer than `longest` tokens."""
    return [width for width, past in zip(WIDTHS, (0, 1, FEW, WIDTHS[2]), strict=True) if longest > past]


def capacity_for(positions: int, seq_len: int) -> int:
    """The cache of a text of at most so many positions, which every token reads whole: a power of two, so that
    there are few different programs, or the model's context. 0 positions: all of it."""
    fitting = max(LEAST_CAPACITY, 1 << max(positions - 1, 0).bit_length())
    return min(fitting, seq_len) if positions else seq_len


def open_session(
    runtime: Runtime, model: Decoder, store: ParamStore, widths: Sequence[int] = WIDTHS, weights: str = "fp16",
    on_compile: Callable[[int, int], None] | None = None, positions: int = 0,
) -> Session | Windowed:  # fmt: skip
    """A Session where a key-value cache can stand for the past, else Windowed. positions: what a text takes at most;
    0: the model's context. UnsupportedError: int8 weights there."""
    mixing = mixing_block(model)
    if not mixing:
        capacity = capacity_for(positions, model.config.seq_len)
        return Session(runtime, model, store, capacity, widths, weights, on_compile)
    if weights != "fp16":
        raise UnsupportedError(
            f"block {mixing!r} mixes positions outside attention: it decodes with fp16 weights alone"
        )
    return Windowed(runtime, model, store, on_compile)


def _matrix(where: Location, cols: int) -> Matrix:
    """The first `cols` columns of a location."""
    return where.pointer, where.slot.rows, cols, where.slot.row_stride


def _rows(array: np.ndarray) -> Matrix:
    """A C-contiguous fp16 array (rows, cols); it must live as long as the pointer."""
    return ffi.ffi.cast("uint16_t *", array.ctypes.data), array.shape[0], array.shape[1], array.shape[1]


def _is_cache(name: str) -> bool:
    """k0, v0, k1, ...: the caches among a kernel's inputs."""
    return name[0] in "kv" and name[1:].isdigit()
