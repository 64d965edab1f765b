"""Network: a model compiled once and bound to surfaces: forward, backward, gradient recipes, head.

All layers share a block's Programs and differ in their Bindings. Activations that the backward needs stay in per-layer
surfaces; cotangents live in scratch that the layers share: in two sets, where recipes read the one while the engine
writes the other. Everything that a step does is a Task of one Schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from anert import ffi
from anert.backend.base import Binding, Program
from anert.backend.gradient import ADD, GEMM, ROWSUM, WeightGradient
from anert.blocks import BlockKernels, build_blocks
from anert.ffi import call
from anert.head import Head
from anert.kernel import Kernel, Slot, round_up
from anert.model import Decoder
from anert.optim import Optimizer
from anert.param import Param, ParamStore
from anert.runtime import Runtime
from anert.schedule import ENGINE, HOST, Schedule, Task, Timed
from anert.surface import Surface

CHAIN_FLOPS = 2 * 10**11
"""What one native call of a step executes at most, if it is more than one program: half a second of a slow machine."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an fp16 tensor (rows, cols) lies: a slot of a surface."""

    surface: Surface
    slot: Slot
    pointer: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pointer", ffi.ffi.cast("uint16_t *", self.surface.ptr) + self.slot.offset)

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
class _Step:
    """What the tasks of a running schedule are given and give back."""

    tokens: np.ndarray
    targets: np.ndarray
    scale: float = 1.0
    loss: float = 0.0
    count: int = 0


class Network:
    """A model on a runtime for `batch` sequences of `seq_len`, its weights in `store`; `train` adds the backward.

    Raises DoesNotFit before anything big is allocated, CompileError past the compile budget.
    """

    def __init__(self, runtime: Runtime, model: Decoder, store: ParamStore, seq_len: int, batch: int, train: bool,
                 on_compile: Callable[[int, int], None] | None = None,
                 on_grads: Callable[[int], None] | None = None) -> None:  # fmt: skip
        """on_grads(offset): called in a backward pass when it has added all that it will from element `offset` of the
        store's gradients on."""
        self.on_grads = on_grads
        self.runtime, self.model, self.store = runtime, model, store
        self.seq_len, self.batch, self.n, self.train = seq_len, batch, seq_len * batch, train
        self.layers = model.config.n_layers // max(runtime.boundaries.group, 1) if model.blocks else 0
        """Times that the blocks run, one after another."""
        self.ms: dict[str, float] = {}
        self._blocks = build_blocks(model, seq_len, batch, train, runtime.boundaries, runtime.backend.capabilities)
        self._programs: dict[str, Program] = {}
        runtime.check_memory(self.nbytes(), "activations")
        self._compile(on_compile)
        self._allocate()

    # ---- kernels

    def _compile(self, on_compile: Callable[[int, int], None] | None) -> None:
        kernels = [kernel for b in self._blocks for kernel in b.kernels]
        for done, kernel in enumerate(kernels, 1):
            self._programs[kernel.text] = self.runtime.compile(kernel)
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
            cots = sum(kernel.sizes[s.port] for kernel in b.backward for s in kernel.outputs.values())
            total += cots * self._sets()
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
        store, heap = self.store, self.runtime.heap
        for name in ("tok_embeddings", "output"):
            if name in store:  # the head's alone: no engine reads it
                p = store[name]
                slot = Slot(name, p.rows, p.cols, 0, p.cols, 1)
                store.copy_of(name, slot, p.spec.size * 2, lambda nbytes: Surface(heap, nbytes), any_memory=True)
        embedding = store["tok_embeddings"]
        self.head = Head(
            heap, self.runtime.pool, embedding, store.get("output", embedding), store.get("norm"),
            self.model.norm_eps, self.n, self.runtime.precision,
        )  # fmt: skip
        self._step = _Step(np.zeros(0, np.int32), np.zeros(0, np.int32))
        self._fresh = False
        """No gradient has been written since they were to be zero."""
        self._gradients: dict[str, list[WeightGradient]] = {}
        self._flops_of: dict[Binding, int] = {}
        self.flops_recipes = 0
        self._scratch: dict[tuple[Any, ...], Surface] = {}
        self.x = [self._dense("x")]
        self.dx = self._dense("dx")
        envs, blocks = self._forward_tasks()
        forward = [task for tasks in blocks for task in tasks]
        self._forward = self._schedule(forward)
        self._loss = self._schedule([*forward, self._head_task(self._run_loss)])
        self._due: dict[str, Optimizer] = {}
        self._unclear: set[str] = set()
        self._plain: list[Param] = []
        """Params whose gradient is to be cleared before a step."""
        if self.train:
            backward = self._backward_tasks(envs)
            self._plain = self._settle_gradients()
            if self.runtime.engine:
                forward = self._with_updates(blocks)
            self._training = self._schedule([*forward, self._head_task(self._run_loss_backward, train=True), *backward])

    def _schedule(self, tasks: list[Task]) -> Schedule:
        return Schedule(tasks, self.runtime.engine, self._join)

    def _sets(self) -> int:
        """Sets of scratch that layers take turns at: two where a block feeds itself, or recipes lag behind."""
        return 2 if len(self._blocks) == 1 or self.runtime.engine else 1

    def _forward_tasks(self) -> tuple[list[dict[str, Location]], list[list[Task]]]:
        """For each block what it reads and makes, by name; and the tasks of the embedding and of each block."""
        tasks = [[Task("head", HOST, self._run_embed, _copies(self.head.embedding), (self.x[0].surface,))]]
        envs: list[dict[str, Location]] = []
        turns = 2 if len(self._blocks) == 1 else 1
        for i in range(self.layers * len(self._blocks)):
            layer, j = divmod(i, len(self._blocks))
            block, env = self._blocks[j], {"x": self.x[-1]}
            keep: tuple[Any, ...] | None = None if self.train else ("forward", j, layer % turns)
            tasks.append([t for k in block.forward for t in self._bind("forward", k, env, block, layer, keep)])
            self.x.append(env["y"])
            envs.append(env)
        return envs, tasks

    def _with_updates(self, blocks: list[list[Task]]) -> list[Task]:
        """Embedding and blocks, each behind the updates of the Params that it reads, where an optimizer's step is due;
        the host goes ahead with those of later blocks while the engine is at an earlier one."""
        n, left = len(self._blocks), list(self.store)
        tasks: list[Task] = []
        for i, chunk in enumerate(blocks):
            layer, j = divmod(i - 1, n) if i else (0, 0)
            read = (
                [self._blocks[j].stored(layer, p) for p in self._blocks[j].params] if i else [self.head.embedding.name]
            )
            tasks += [self._update_task(self.store[name]) for name in read if name in left]
            tasks += chunk
            left = [name for name in left if name not in read]
        return [*tasks, *(self._update_task(self.store[name]) for name in left)]

    def _update_task(self, p: Param) -> Task:
        def run() -> None:
            if p.name in self._due:
                self._due.pop(p.name).apply([p])
            if p.name in self._unclear:
                self._clear(p)

        return Task("optimizer", HOST, run, (), (p, *_copies(p)), locks=True)

    def _backward_tasks(self, envs: list[dict[str, Location]]) -> list[Task]:
        tasks: list[Task] = []
        dout = self.dx
        for i in reversed(range(len(envs))):
            layer, j = divmod(i, len(self._blocks))
            block, env = self._blocks[j], {**envs[i], "cot_y": dout}
            key = ("backward", j, layer % self._sets())
            for k in block.backward:
                tasks += self._bind("backward", k, env, block, layer, key)
            tasks += self._bind_recipes(block, layer, env)
            if self.on_grads is not None and j == 0:
                tasks.append(self._grads_task(self.on_grads, layer))
            dout = env["cot_x"]
        self.dx0 = dout
        return [*tasks, Task("head", HOST, self._run_embed_backward, (dout.surface,), (self.head.embedding,))]

    def _grads_task(self, on_grads: Callable[[int], None], layer: int) -> Task:
        """Says that the layer's gradients, and those behind them in the store, are added."""
        names = [b.stored(layer, name) for b in self._blocks for name in b.params]
        offset = min(self.store.offsets[name] for name in names)
        return Task("allreduce", HOST, partial(on_grads, offset), tuple(self.store[name] for name in names))

    def _head_task(self, run: Callable[[], None], train: bool = False) -> Task:
        writes: tuple[Any, ...] = (self.head,)
        if train:
            writes = (self.head, self.dx.surface, self.head.output, self.head.norm)
        return Task("head", HOST, run, (self.x[-1].surface, *_copies(self.head.output), self.head.norm), writes)

    def _bind(self, kind: str, kernel: Kernel, env: dict[str, Location], block: BlockKernels, layer: int,
              shared: tuple[Any, ...] | None) -> list[Task]:  # fmt: skip
        """Surfaces on all ports of a stage: its Task, behind one that copies what must lie elsewhere. `env` names what
        exists; results join it, in scratch under `shared` or of their own."""
        surfaces: dict[str, Surface] = {}
        copies: list[tuple[Location, Location]] = []
        for port in dict.fromkeys(s.port for s in kernel.inputs.values()):
            entries = [(n, s) for n, s in kernel.inputs.items() if s.port == port]
            size = kernel.sizes[port]
            name, slot = entries[0]
            if len(entries) == 1 and name in block.params:
                stored, any_memory = block.stored(layer, name), self.runtime.backend.any_memory
                surfaces[port] = self.store.copy_of(stored, slot, size, self._surface, any_memory)
                continue
            if len(entries) == 1 and env[name].lies_at(slot) and env[name].surface.nbytes >= size:
                surfaces[port] = env[name].surface
                continue
            weights = any(n in block.params for n, _ in entries)
            surfaces[port] = self._surface(size) if weights else self._shared((kernel.name, port), size)
            for name, slot in entries:
                if name in block.params:
                    self.store[block.stored(layer, name)].place(surfaces[port], slot)
                else:
                    copies.append((Location(surfaces[port], slot), env[name]))
        for name, slot in kernel.outputs.items():
            if slot.port not in surfaces:
                size = kernel.sizes[slot.port]
                surfaces[slot.port] = (
                    self._surface(size) if shared is None else self._shared((*shared, kernel.name, slot.port), size)
                )
            env[name] = Location(surfaces[slot.port], slot)
        read = tuple(surfaces[p] for p in dict.fromkeys(s.port for s in kernel.inputs.values()))
        written = tuple(surfaces[p] for p in dict.fromkeys(s.port for s in kernel.outputs.values()))
        program = self._programs[kernel.text]
        binding = program.bind(surfaces)
        self._flops_of[binding] = program.stats.flops_executed
        task = Task(kind, ENGINE, binding.run, read, written, evaluates=True, link=binding)
        return [*self._copy_tasks(copies), task]

    @staticmethod
    def _copy_tasks(copies: list[tuple[Location, Location]]) -> list[Task]:
        if not copies:
            return []
        arrays = [(target.array(), source.array()) for target, source in copies]
        targets = tuple(dict.fromkeys(target.surface for target, _ in copies))

        def run() -> None:
            for target, source in arrays:
                np.copyto(target, source)
            for surface in targets:
                surface.touch()

        return [Task("copy", ENGINE, run, tuple(dict.fromkeys(source.surface for _, source in copies)), targets)]

    def _shared(self, key: tuple[Any, ...], nbytes: int) -> Surface:
        if key not in self._scratch:
            self._scratch[key] = self._surface(nbytes)
        return self._scratch[key]

    # ---- gradient recipes

    def _bind_recipes(self, block: BlockKernels, layer: int, env: dict[str, Location]) -> list[Task]:
        assert block.gradient is not None
        tasks: list[Task] = []
        for r in block.gradient.recipes:
            p = self.store[block.stored(layer, r.param)]
            cot, tap = env[r.cot], env[r.tap] if r.tap else None
            made = self._gradient(p, r.kind, tap, cot, r.swap)
            self._gradients.setdefault(p.name, []).append(made)
            reads = (cot.surface,) if tap is None else (cot.surface, tap.surface)
            tasks.append(Task("weight_grads", HOST, partial(self._run_gradient, made), reads, (p,), link=made))
        return tasks

    def _gradient(self, p: Param, kind: str, tap: Location | None, cot: Location, swap: bool) -> WeightGradient:
        """Gemm: dw (rows, cols) is tap (rows, n) cot (cols, n)^T or, swapped, the other way round."""
        dw, pool = p.record.grad, self.runtime.pool
        if kind != "gemm" or tap is None:
            n, a = cot.slot.cols, tap.matrix() if tap is not None else None
            rowsum = kind == "rowsum"
            shape = (cot.slot.rows, 1 if rowsum else n)
            return WeightGradient(pool, ROWSUM if rowsum else ADD, dw, shape, n, a, cot.matrix())
        left, right = (tap, cot) if swap else (cot, tap)
        precision = ffi.lib.ANERT_BF16 if self.runtime.precision == "bf16" else ffi.lib.ANERT_F32
        a, b = left.matrix(), right.matrix(transposed=True)
        made = WeightGradient(pool, GEMM, dw, p.spec.shape, left.slot.cols, a, b, precision)
        self.flops_recipes += made.flops
        return made

    def _settle_gradients(self) -> list[Param]:
        """Say which gradient is the first of a step to write its Param's, and which knows the sum of squares; returns
        the Params whose gradient nobody sets, so that it is to be cleared."""
        head = self.head
        written = {p.name for p in (head.output, head.embedding, head.norm) if p is not None}
        for name, made in self._gradients.items():
            made[0].native.first = name not in written
            if all(g.native.kind == GEMM for g in made):
                for g in made:
                    g.native.squares = self.store[name].squares_at
        set_by = {head.output.name, *(name for name in self._gradients if name not in written)}
        return [p for name, p in self.store.items() if name not in set_by]

    def _run_gradient(self, made: WeightGradient) -> None:
        made.run(1.0 / self._step.scale, self._fresh)

    def _join(self, tasks: Sequence[Task]) -> list[Timed]:
        """Tasks as native calls that are over soon enough for a stop to be asked between."""
        groups: list[list[Task]] = [[]]
        left = CHAIN_FLOPS
        for task in tasks:
            assert task.link is not None
            cost = task.link.flops if isinstance(task.link, WeightGradient) else self._flops_of[task.link]
            if groups[-1] and cost > left:
                groups.append([])
                left = CHAIN_FLOPS
            groups[-1].append(task)
            left -= cost
        return [self._chained(group) for group in groups]

    def _chained(self, tasks: Sequence[Task]) -> Timed:
        links = [task.link for task in tasks if task.link is not None]
        chain = self.runtime.backend.chain(links, [task.kind for task in tasks])

        def run(ms: dict[str, float]) -> None:
            chain.advance(1.0 / self._step.scale, self._fresh, ms)

        return run

    # ---- running

    def _run_embed(self) -> None:
        self.head.embed(self._step.tokens, self.x[0])

    def _run_loss(self) -> None:
        step = self._step
        step.loss, step.count = self.head.loss(self.x[-1], step.targets)

    def _run_loss_backward(self) -> None:
        step = self._step
        step.loss, step.count = self.head.loss_backward(self.x[-1], step.targets, self.dx, step.scale, self._fresh)

    def _run_embed_backward(self) -> None:
        self.head.embed_backward(self._step.tokens, self.dx0, 1.0 / self._step.scale)

    def zero_grad(self) -> None:
        """Begin an accumulation window: gradients that the next loss_backward sets are not cleared, all others are."""
        self._fresh = True
        self.store.grads_written()
        for p in self._plain:
            self._unclear.add(p.name)
            if p.name not in self._due:
                self._clear(p)

    def _clear(self, p: Param) -> None:
        assert p.grad is not None
        p.grad.fill(0.0)
        self._unclear.discard(p.name)

    def update(self, optimizer: Optimizer, lr: float, grad_scale: float) -> int:
        """A step of the optimizer; returns how many weights were clamped.

        Where host and engine overlap it is only begun here, and the number is that of the step before: each Param is
        updated in the next loss_backward, before the first block that reads it. What else reads or writes weights,
        moments or gradients calls `settle` before.
        """
        self.settle()
        if not self.train or not self._training.overlaps or type(optimizer).step is not Optimizer.step:
            return optimizer.step(lr, grad_scale)
        before = optimizer.clamped
        optimizer.begin(lr, grad_scale)
        self._due.update(dict.fromkeys(self.store, optimizer))
        return before

    def settle(self) -> None:
        """Do what is still due of the last `update`."""
        for optimizer in set(self._due.values()):
            optimizer.apply([self.store[name] for name, o in self._due.items() if o is optimizer])
        self._due.clear()
        for name in tuple(self._unclear):
            self._clear(self.store[name])

    def forward(self, tokens: np.ndarray) -> Location:
        """Run the blocks on int32 token ids (n,); returns where the last hidden state (dim, n) lies."""
        self.settle()
        self._step.tokens = tokens
        self._forward.run(self.ms)
        return self.x[-1]

    def loss(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        """Mean cross-entropy (nats) of int32 targets (n,), -1 ignored, and how many counted."""
        self.settle()
        step = self._step
        step.tokens, step.targets = tokens, targets
        self._loss.run(self.ms)
        return step.loss, step.count

    def loss_backward(self, tokens: np.ndarray, targets: np.ndarray, scale: float) -> float:
        """The loss; gradients (unscaled, fp32) are added to every Param. `scale` is the loss scale of the fp16
        cotangents."""
        step = self._step
        step.tokens, step.targets, step.scale = tokens, targets, scale
        self.head.hold(tokens, targets)
        self._training.run(self.ms)
        self._fresh = False
        return step.loss

    @property
    def flops(self) -> int:
        """Executed by one forward (and backward, recipes and head in training)."""
        programs = [self._programs[k.text] for b in self._blocks for k in b.kernels]
        blocks = sum(p.stats.flops_executed for p in programs) * self.layers
        head = self.head.flops if self.train else self.head.flops // 3
        return blocks + self.flops_recipes + head

    @property
    def port_bytes(self) -> int:
        """That the programs of one forward (and backward) read and write at their ports, weights included."""
        stats = [self._programs[k.text].stats for b in self._blocks for k in b.kernels]
        return sum(s.bytes_in + s.bytes_out for s in stats) * self.layers

    def amax(self) -> tuple[float, int]:
        """Largest magnitude on the residual stream, and the first x that holds a non-finite value (-1: none)."""
        out, finite = ffi.ffi.new("float *"), ffi.ffi.new("int32_t *")
        largest, first = 0.0, -1
        for i, x in enumerate(self.x):
            n = x.slot.rows * x.slot.row_stride
            with x.surface.access(read_only=True):
                call(ffi.lib.anert_f16_amax, self.runtime.pool.ptr, x.pointer, n, out, finite)
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
        with self.x[first - 1].surface.access(read_only=True):
            inputs = {"x": self.x[first - 1].array().copy()}
        with np.errstate(over="ignore"):
            inputs |= {n: self.store[block.stored(layer, n)].master.astype(np.float16) for n in block.params}
        found = first_nonfinite(block.source, inputs)
        op = f"op {found[1]} ({found[2]})" if found else "its fp16 output port"
        if block.group:
            return f"layers {layer * block.group} to {(layer + 1) * block.group - 1}, {op}"
        return f"layer {layer}, block {block.name}, {op}"


def _copies(p: Param) -> tuple[Surface, ...]:
    """The surfaces that hold copies of a Param."""
    given = (p.given,) if p.given is not None else ()
    return (*given, *(surface for surface, _ in p.placements))
