"""Capabilities: a plain record of what a machine's engine accepts, consulted when a kernel takes its wire form.

The ANE defaults are the safe ones of ane_facts section 8; `anert doctor` replaces them by what it has probed, in a file
that counts only on the machine, system build and anert version that wrote it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

PLATFORM: str = sys.platform


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
    decomposed: bool = True
    """Composite ops are emitted as the simpler ones that are known to work."""
    contraction_multiple: int = 32
    """Contractions inside the graph are padded with zeros to a multiple of this: M1 gave zeros for others."""
    fp16_interior: bool = True
    """Whether the engine rounds what is between ports: then constants may be folded as it would round them."""
    compile_budget: int = 100
    """Compiles of one process; the engine tires after about 119."""
    load_budget: int = 120
    """Programs that one process has loaded at a time; the engine takes about 128."""
    rules: Mapping[str, bool] = field(default_factory=dict)
    """Lint rules that a probe has settled on this machine: whether the limit is there."""


ANE = Capabilities()
CPU = Capabilities(name="cpu", layout="ports", width_multiple=1, max_width=1 << 30, max_inputs=64, surface_multiple=64,
                   min_surface=64, both_orientations=False, decomposed=False, contraction_multiple=1,
                   fp16_interior=False, compile_budget=1000)  # fmt: skip


# ---- the record of a probed machine

_TYPES = {"str": str, "int": int, "bool": bool}


def record_path() -> Path:
    """Where the record lies: ANERT_CAPABILITIES, else the user's application data."""
    if named := os.environ.get("ANERT_CAPABILITIES"):
        return Path(named)
    if PLATFORM == "darwin":
        return Path.home() / "Library" / "Application Support" / "anert" / "capabilities.json"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "anert" / "capabilities.json"


def machine_key() -> dict[str, str]:
    """What a record is good for: this chip, this system build, this anert."""
    import platform

    from anert import __version__

    return {
        "model": _sysctl("hw.model") or platform.machine(),
        "chip": _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine(),
        "build": _sysctl("kern.osversion") or platform.release(),
        "anert": __version__,
    }


def _sysctl(name: str) -> str:
    """A value of macOS' sysctl; empty elsewhere."""
    tool = Path("/usr/sbin/sysctl")
    if PLATFORM != "darwin" or not tool.exists():
        return ""
    import subprocess

    done = subprocess.run([tool, "-n", name], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def load_record() -> Capabilities | None:
    """The ANE's capabilities as doctor probed them here; None without a record for this very machine and version.

    A damaged record counts as none: doctor writes a new one.
    """
    try:
        record = json.loads(record_path().read_text("utf-8"))
        if record["key"] != machine_key():
            return None
        return from_probes(record["capabilities"], record["rules"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def from_probes(found: Mapping[str, Any], rules: Mapping[str, bool]) -> Capabilities:
    """The safe defaults, with what probes found. Raises TypeError for a field of another type."""
    known = {f.name: _TYPES[str(f.type)] for f in fields(Capabilities) if f.name != "rules"}
    taken = {name: value for name, value in found.items() if name in known}
    for name, value in taken.items():
        if type(value) is not known[name]:
            raise TypeError(f"capability {name!r} is a {known[name].__name__}, got {value!r}")
    return replace(ANE, **taken, rules={str(k): bool(v) for k, v in rules.items()})


def write_record(capabilities: Capabilities, probes: Mapping[str, str]) -> Path:
    """Keep what was probed; `probes`: the answers in words, for people. Raises OSError."""
    path = record_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = asdict(capabilities)
    rules = plain.pop("rules")
    record = {"key": machine_key(), "capabilities": plain, "rules": rules, "probes": dict(probes)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    temporary.replace(path)
    return path
