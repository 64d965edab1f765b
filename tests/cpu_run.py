"""Running a Function on the CPU engine from a test: surfaces in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from anert.backend.cpu import CpuBackend, CpuProgram, port_array
from anert.mil.graph import Function


def run_program(backend: CpuBackend, program: CpuProgram, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bind fresh surfaces, write `inputs`, run, and read every output."""
    surfaces = {}
    for port in (*program.inputs, *program.outputs):
        surfaces[port.name] = backend.surface(port.nbytes)
        if port.name in inputs:
            port_array(surfaces[port.name], port)[...] = inputs[port.name]
        else:
            surfaces[port.name].array(np.uint8)[...] = 0x7E  # NaN in fp16: an element that nobody wrote shows
    program.bind(surfaces).run()
    return {p.name: port_array(surfaces[p.name], p).copy() for p in program.outputs}


def run_function(backend: CpuBackend, function: Function, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return run_program(backend, backend.compile_function(function), inputs)
