"""Capabilities: a plain record of what a machine's engine accepts, consulted when a kernel takes its wire form.

The ANE defaults are the safe ones of ane_facts section 8; `anert doctor` replaces them by what it has probed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Widths in elements of the trailing axis, sizes in bytes."""

    name: str = "ane"
    opset: str = "ios18"
    """`ios18` prints program(1.3); `ios16` prints the canonical program(1.0)."""
    layout: str = "packed"
    """Default wire layout: `packed` or `ports`."""
    width_multiple: int = 32
    """The trailing axis of every port is zero-padded to a multiple of this."""
    max_width: int = 16384
    max_inputs: int = 8
    surface_multiple: int = 16384
    min_surface: int = 49152
    both_orientations: bool = True
    """Whether a matmul weight must lie as its program reads it (ANE), or may be read transposed in place (cpu)."""
    compile_budget: int = 100


ANE = Capabilities()
CPU = Capabilities(name="cpu", layout="ports", width_multiple=1, max_width=1 << 30, max_inputs=64,
                   surface_multiple=64, min_surface=64, both_orientations=False, compile_budget=1000)  # fmt: skip
