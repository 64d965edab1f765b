"""Baked weights: the strategy that weights as tensors replace, kept for comparison.

A weight's port becomes a constant of the program, so that every update of the weights is a compile of every kernel that
reads them, layer by layer. A program is made anew when it runs and the seed of a weight's surface has moved since.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from anert.backend.base import Backend, Binding, Port, Program, ProgramStats, written_flops
from anert.errors import CompileError, InputError
from anert.kernel import LARGE_CONST, Kernel
from anert.mil import passes
from anert.mil.blob import BlobDirectory
from anert.mil.graph import DTYPES, Function
from anert.mil.text import parse, print_module
from anert.surface import Surface


class Baked:
    """Compiles on a backend with the weights in the programs. `compiles` and `ms` are those of baking alone; ms is
    all that it costs: reading the weights, text and weight files, compiling, binding."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.compiles, self.ms = 0, 0.0
        self._bindings: list[BakedBinding] = []

    def program(self, kernel: Kernel) -> Program:
        """The Program of a kernel: as it is where it reads no weight. Raises InputError where weights lie in one port
        with activations."""
        ports = {kernel.inputs[name].port for name in kernel.weights}
        mixed = [n for n, s in kernel.inputs.items() if s.port in ports and n not in kernel.weights]
        if mixed:
            raise InputError(
                f"kernel {kernel.name!r}: {mixed[0]!r} lies in one port with weights, which cannot become constants: "
                "baked weights need --layout ports"
            )
        if not ports:
            return self.backend.compile(kernel.text, kernel.blobs)
        return BakedProgram(self, parse(kernel.text, blobs=kernel.blobs).main, ports)

    def add(self, binding: BakedBinding) -> None:
        self._bindings.append(binding)

    @property
    def per_update(self) -> int:
        """Compiles that an update of all weights costs."""
        return len(self._bindings)

    def affords(self, all_of_them: bool = False) -> bool:
        """Whether the budget holds the compiles that the weights as they are make necessary (or those of an update).

        Raises CompileError if the budget of a fresh process could not hold one update.
        """
        left = self.backend.budget - self.backend.spent()
        needed = self.per_update if all_of_them else sum(b.stale for b in self._bindings)
        if needed > left and self.compiles == 0:
            raise CompileError(
                f"baked weights cost {needed} compiles an update, and of the budget of {self.backend.budget} "
                f"{left} are left at the start: raise it with --compile-budget, or take --strategy tensors"
            )
        return needed <= left

    def compile(self, template: Function, weights: dict[str, np.ndarray]) -> Program:
        """The template's Program with these constants on its ports. Not kept: the next update makes another."""
        function = passes.specialise(template, weights)
        if self.backend.capabilities.decomposed:
            function = passes.constant_products(function)
        blobs = BlobDirectory()
        text = print_module(passes.rename(function), blobs=blobs, blob_threshold=LARGE_CONST)
        before = self.backend.compiles
        program = self.backend.compile(text, blobs.files())
        self.backend.forget(program)
        self.compiles += self.backend.compiles - before
        return program


class BakedProgram(Program):
    """A kernel whose ports `weights` become constants, with the surfaces that are bound to them."""

    def __init__(self, baked: Baked, template: Function, weights: set[str]) -> None:
        self.baked, self.template = baked, template
        self.weights = tuple(v for v in template.inputs if v.name in weights)
        self.inputs = tuple(Port(v.name, v.type) for v in template.inputs)
        self.outputs = tuple(Port(v.name, v.type) for v in template.outputs)
        flops = written_flops(template)
        self.stats = ProgramStats(flops, flops)

    def _bind(self, surfaces: Mapping[str, Surface]) -> Binding:
        return BakedBinding(self, surfaces)


class BakedBinding(Binding):
    """A BakedProgram on its surfaces, and the program that holds the weights as they were when it last ran."""

    def __init__(self, program: BakedProgram, surfaces: Mapping[str, Surface]) -> None:
        self.program = program
        self._weights = {v.name: (surfaces[v.name], v.type) for v in program.weights}
        self._others = {name: s for name, s in surfaces.items() if name not in self._weights}
        self._seeds: tuple[int, ...] = ()
        self._binding: Binding | None = None
        program.baked.add(self)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(s.seed for s, _ in self._weights.values())

    @property
    def stale(self) -> bool:
        """Whether the weights were written since they were baked."""
        return self.seeds != self._seeds

    def run(self) -> None:
        if self._binding is None or self.stale:
            self._bake()
        assert self._binding is not None
        self._binding.run()

    def _bake(self) -> None:
        start, baked = time.perf_counter(), self.program.baked
        seeds = self.seeds
        weights: dict[str, np.ndarray] = {}
        for name, (surface, type) in self._weights.items():
            with surface.access(read_only=True):
                weights[name] = surface.array(DTYPES[type.dtype], type.shape).copy()
        self._binding = None  # the engine has room for so many programs
        program = baked.compile(self.program.template, weights)
        self.program.stats = program.stats
        self._binding = program.bind(self._others)
        self._seeds = seeds
        baked.ms += (time.perf_counter() - start) * 1e3
