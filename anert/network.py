"""Network: a model compiled once and bound to surfaces: forward, backward, gradient recipes, head.

All layers share a block's Programs and differ in their Bindings. Activations that the backward needs stay in per-layer
surfaces; cotangents live in scratch that the layers share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from anert import ffi
from anert.backend.base import Binding, Program
from anert.blocks import BlockKernels, build_blocks
from anert.ffi import call
from anert.head import Head
from anert.kernel import Kernel, Slot, round_up
from anert.model import Decoder
from anert.param import ParamStore
from anert.runtime import Runtime
from anert.surface import Surface


@dataclass(frozen=True, slots=True)
class Location:
    """Where an fp16 tensor (rows, cols) lies: a slot of a surface."""

    surface: Surface
    slot: Slot

    @property
    def pointer(self) -> Any:
        return ffi.ffi.cast("uint16_t *", self.surface.ptr) + self.slot.offset

    def array(self) -> np.ndarray:
        """(rows, cols) fp16 view."""
        s = self.slot
        return self.surface.array(np.float16, (s.rows, s.cols), s.offset * 2, (s.row_stride * 2, s.col_stride * 2))

    def matrix(self, transposed: bool = False) -> Any:
        """An anert_matrix of it or of its transpose."""
        s = self.slot
        strides = (s.col_stride, s.row_stride) if transposed else (s.row_stride, s.col_stride)
        return ffi.ffi.new("anert_matrix *", (self.pointer, ffi.lib.ANERT_F16, *strides, 0))[0]

    def lies_at(self, slot: Slot) -> bool:
        s = self.slot
        return (s.offset, s.row_stride, s.col_stride) == (slot.offset, slot.row_stride, slot.col_stride)


@dataclass(slots=True)
class _Run:
    """One stage of one layer: copies into its packed inputs, then the binding."""

    binding: Binding
    copies: list[tuple[np.ndarray, np.ndarray]]

    def __call__(self) -> None:
        for target, source in self.copies:
            np.copyto(target, source)
        self.binding.run()


class Network:
    """A model on a runtime for `batch` sequences of `seq_len`, its weights in `store`; `train` adds the backward.

    Raises DoesNotFit before anything big is allocated, CompileError past the compile budget.
    """

    def __init__(self, runtime: Runtime, model: Decoder, store: ParamStore, seq_len: int, batch: int, train: bool,
                 on_compile: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
        self.runtime, self.model, self.store = runtime, model, store
        self.seq_len, self.batch, self.n, self.train = seq_len, batch, seq_len * batch, train
        self.layers = model.config.n_layers if model.blocks else 0
        self.ms: dict[str, float] = {}
        self._blocks = build_blocks(model, seq_len, batch, train, runtime.layout, runtime.backend.capabilities)
        self._programs: dict[str, Program] = {}
        runtime.check_memory(self.nbytes(), "activations")
        self._compile(on_compile)
        self._allocate()

    # ---- kernels

    def _compile(self, on_compile: Callable[[int, int], None] | None) -> None:
        kernels = [kernel for b in self._blocks for kernel in b.kernels]
        for done, kernel in enumerate(kernels, 1):
            self._programs[kernel.text] = self.runtime.backend.compile(kernel.text, kernel.blobs)
            if on_compile:
                on_compile(done, len(kernels))

    @property
    def kernels(self) -> int:
        """Distinct programs of this network."""
        return len(self._programs)

    def nbytes(self) -> int:
        """Bytes of all surfaces that binding will allocate, weights apart."""
        total = (self.layers + 2) * 2 * self.model.config.dim * self.n
        for b in self._blocks:
            for kernel in b.forward:
                total += sum(kernel.sizes[p] for p in {s.port for s in kernel.outputs.values()}) * (
                    self.layers if self.train else 2
                )
            for kernel in b.kernels:
                for port in {s.port for s in kernel.inputs.values()}:
                    names = [n for n, s in kernel.inputs.items() if s.port == port]
                    if len(names) > 1:
                        total += kernel.sizes[port] * (self.layers if any(n in b.params for n in names) else 1)
            total += sum(kernel.sizes[s.port] for kernel in b.backward for s in kernel.outputs.values())
        return total

    # ---- surfaces and bindings

    def _surface(self, nbytes: int) -> Surface:
        caps = self.runtime.backend.capabilities
        return self.runtime.backend.surface(max(caps.min_surface, round_up(nbytes, caps.surface_multiple)))

    def _dense(self, name: str) -> Location:
        dim = self.model.config.dim
        width = round_up(self.n, self.runtime.backend.capabilities.width_multiple)
        return Location(self._surface(2 * dim * width), Slot(name, dim, self.n, 0, width, 1))

    def _allocate(self) -> None:
        store = self.store
        for name in ("tok_embeddings", "output"):
            if name in store:
                p = store[name]
                store.copy_of(name, Slot(name, p.rows, p.cols, 0, p.cols, 1), p.spec.size * 2, self._surface)
        embedding = store["tok_embeddings"]
        self.head = Head(
            self.runtime.heap, self.runtime.pool, embedding, store.get("output", embedding), store.get("norm"),
            self.model.norm_eps, self.n, self.runtime.precision,
        )  # fmt: skip
        self._scratch: dict[tuple[Any, ...], Surface] = {}
        self.x = [self._dense("x")]
        self._forward: list[list[_Run]] = []
        envs: list[dict[str, Location]] = []
        for i in range(self.layers * len(self._blocks)):
            layer, j = divmod(i, len(self._blocks))
            block, env = self._blocks[j], {"x": self.x[-1]}
            keep: tuple[Any, ...] | None = (
                None if self.train else ("forward", j, layer % 2 if len(self._blocks) == 1 else 0)
            )
            self._forward.append([self._bind(k, env, block, layer, keep, j) for k in block.forward])
            self.x.append(env["y"])
            envs.append(env)
        self._backward: list[list[_Run]] = []
        self._recipes: list[list[Callable[[float], None]]] = []
        self._fresh: set[str] = set()
        self._gemm_params: set[str] = set()
        self.flops_recipes = 0
        self.dx = self._dense("dx")
        if self.train:
            self._allocate_backward(envs)
        self._plain = [p for name, p in store.items() if self.train and name not in self._gemm_params]

    def _allocate_backward(self, envs: list[dict[str, Location]]) -> None:
        dout = self.dx
        for i in reversed(range(len(envs))):
            layer, j = divmod(i, len(self._blocks))
            block, env = self._blocks[j], {**envs[i], "cot_y": dout}
            key = ("backward", j, layer % 2 if len(self._blocks) == 1 else 0)
            self._backward.append([self._bind(k, env, block, layer, key, j) for k in block.backward])
            self._recipes.append(self._bind_recipes(block, layer, env))
            dout = env["cot_x"]
        self.dx0 = dout

    def _bind(self, kernel: Kernel, env: dict[str, Location], block: BlockKernels, layer: int,
              shared: tuple[Any, ...] | None, j: int) -> _Run:  # fmt: skip
        """Surfaces on all ports of a stage. `env` names what exists; results join it, in scratch under `shared` or of
        their own."""
        surfaces: dict[str, Surface] = {}
        copies: list[tuple[np.ndarray, np.ndarray]] = []
        for port in dict.fromkeys(s.port for s in kernel.inputs.values()):
            entries = [(n, s) for n, s in kernel.inputs.items() if s.port == port]
            size = kernel.sizes[port]
            name, slot = entries[0]
            if len(entries) == 1 and name in block.params:
                surfaces[port] = self.store.copy_of(f"layers.{layer}.{name}", slot, size, self._surface)
                continue
            if len(entries) == 1 and env[name].lies_at(slot) and env[name].surface.nbytes >= size:
                surfaces[port] = env[name].surface
                continue
            weights = any(n in block.params for n, _ in entries)
            surfaces[port] = self._surface(size) if weights else self._shared((kernel.name, port), size)
            for name, slot in entries:
                if name in block.params:
                    self.store[f"layers.{layer}.{name}"].place(surfaces[port], slot)
                else:
                    copies.append((Location(surfaces[port], slot).array(), env[name].array()))
        for name, slot in kernel.outputs.items():
            if slot.port not in surfaces:
                size = kernel.sizes[slot.port]
                surfaces[slot.port] = (
                    self._surface(size) if shared is None else self._shared((*shared, kernel.name, slot.port), size)
                )
            env[name] = Location(surfaces[slot.port], slot)
        return _Run(self._programs[kernel.text].bind(surfaces), copies)

    def _shared(self, key: tuple[Any, ...], nbytes: int) -> Surface:
        if key not in self._scratch:
            self._scratch[key] = self._surface(nbytes)
        return self._scratch[key]

    # ---- gradient recipes

    def _bind_recipes(self, block: BlockKernels, layer: int, env: dict[str, Location]) -> list[Callable[[float], None]]:
        assert block.gradient is not None
        runs: list[Callable[[float], None]] = []
        kinds: dict[str, set[str]] = {}
        for r in block.gradient.recipes:
            kinds.setdefault(r.param, set()).add(r.kind)
        for r in block.gradient.recipes:
            name = f"layers.{layer}.{r.param}"
            p = self.store[name]
            assert p.grad is not None
            dw = ffi.ffi.cast("float *", p.grad.ctypes.data)
            cot = env[r.cot]
            tap = env[r.tap] if r.tap else None
            if r.kind == "gemm" and tap is not None:
                if kinds[r.param] == {"gemm"}:
                    self._gemm_params.add(name)
                left, right = (tap, cot) if r.swap else (cot, tap)
                runs.append(self._gemm_recipe(name, left, right, dw, p.rows, p.cols))
            elif r.kind == "rowsum":
                runs.append(self._rowsum_recipe(tap, cot, dw))
            else:
                runs.append(self._add_recipe(cot, dw))
        return runs

    def _gemm_recipe(
        self, name: str, left: Location, right: Location, dw: Any, rows: int, cols: int
    ) -> Callable[[float], None]:
        """dw (rows, cols) += alpha left (rows, n) right (cols, n)^T."""
        a, b = left.matrix(), right.matrix(transposed=True)
        c = ffi.ffi.new("anert_matrix *", (dw, ffi.lib.ANERT_F32, cols, 1, 0))[0]
        n, pool, gemm = left.slot.cols, self.runtime.pool.ptr, ffi.lib.anert_gemm
        precision = ffi.lib.ANERT_BF16 if self.runtime.precision == "bf16" else ffi.lib.ANERT_F32
        error = ffi.error()
        self.flops_recipes += 2 * rows * cols * n

        def run(alpha: float) -> None:
            beta = 1.0
            if name in self._fresh:
                self._fresh.discard(name)
                beta = 0.0
            call(gemm, pool, precision, 1, rows, cols, n, alpha, a, b, beta, c, err=error)

        return run

    def _rowsum_recipe(self, tap: Location | None, cot: Location, dw: Any) -> Callable[[float], None]:
        pool, rowsum, error = self.runtime.pool.ptr, ffi.lib.anert_rowsum, ffi.error()
        args = (tap.pointer, tap.slot.row_stride) if tap is not None else (ffi.ffi.NULL, 0)
        s = cot.slot

        def run(alpha: float) -> None:
            call(rowsum, pool, alpha, *args, cot.pointer, s.row_stride, s.rows, s.cols, dw, err=error)

        return run

    def _add_recipe(self, cot: Location, dw: Any) -> Callable[[float], None]:
        pool, accumulate, error, s = self.runtime.pool.ptr, ffi.lib.anert_accumulate, ffi.error(), cot.slot

        def run(alpha: float) -> None:
            call(accumulate, pool, alpha, cot.pointer, s.row_stride, s.col_stride, s.rows, s.cols, dw, err=error)

        return run

    # ---- running

    def _timed(self, key: str, start: float) -> float:
        now = time.perf_counter()
        self.ms[key] = self.ms.get(key, 0.0) + (now - start) * 1e3
        return now

    def zero_grad(self) -> None:
        """Begin an accumulation window: gradients that one GEMM overwrites first are not cleared, all others are."""
        self._fresh = set(self._gemm_params)
        for p in self._plain:
            assert p.grad is not None
            p.grad.fill(0.0)

    def forward(self, tokens: np.ndarray) -> Location:
        """Run the blocks on int32 token ids (n,); returns where the last hidden state (dim, n) lies."""
        start = time.perf_counter()
        self.head.embed(tokens, self.x[0])
        start = self._timed("head", start)
        for runs in self._forward:
            for run in runs:
                run()
        self._timed("forward", start)
        return self.x[-1]

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        """Mean cross-entropy (nats) of int32 targets (n,), -1 ignored, and how many counted."""
        x = self.forward(tokens)
        start = time.perf_counter()
        result = self.head.loss(x, targets)
        self._timed("head", start)
        return result

    def loss_backward(self, tokens: np.ndarray, targets: np.ndarray, scale: float) -> float:
        """The loss; gradients (unscaled, fp32) are added to every Param. `scale` is the loss scale of the fp16
        cotangents."""
        x = self.forward(tokens)
        start = time.perf_counter()
        loss, _ = self.head.loss_backward(x, targets, self.dx, scale)
        start = self._timed("head", start)
        for runs, recipes in zip(self._backward, self._recipes, strict=True):
            for run in runs:
                run()
            start = self._timed("backward", start)
            for recipe in recipes:
                recipe(1.0 / scale)
            start = self._timed("weight_grads", start)
        self.head.embed_backward(tokens, self.dx0 if self.layers else self.dx, 1.0 / scale)
        self._timed("head", start)
        return loss

    @property
    def flops(self) -> int:
        """Executed by one forward (and backward, recipes and head in training)."""
        programs = [self._programs[k.text] for b in self._blocks for k in b.kernels]
        blocks = sum(p.stats.flops_executed for p in programs) * self.layers
        head = self.head.flops if self.train else self.head.flops // 3
        return blocks + self.flops_recipes + head

    def amax(self) -> tuple[float, int]:
        """Largest magnitude on the residual stream, and the first x that holds a non-finite value (-1: none)."""
        out, finite = ffi.ffi.new("float *"), ffi.ffi.new("int32_t *")
        largest, first = 0.0, -1
        for i, x in enumerate(self.x):
            call(ffi.lib.anert_f16_amax, self.runtime.pool.ptr, x.pointer, x.slot.rows * x.slot.row_stride, out, finite)
            if not finite[0] and first < 0:
                first = i
            largest = max(largest, out[0])
        return largest, first

    def name_nonfinite(self) -> str:
        """The first block and op that made a NaN or inf in the last forward, in words."""
        from anert.backend.reference import first_nonfinite

        _, first = self.amax()
        if first < 0:
            return "the final norm, classifier or loss"
        if first == 0:
            return "the embedding"
        layer, j = divmod(first - 1, len(self._blocks))
        block = self._blocks[j]
        inputs = {"x": self.x[first - 1].array()}
        inputs |= {n: self.store[f"layers.{layer}.{n}"].master.astype(np.float16) for n in block.params}
        found = first_nonfinite(block.source, inputs)
        op = f"op {found[1]} ({found[2]})" if found else "its fp16 output port"
        return f"layer {layer}, block {block.name}, {op}"
