"""Plans as data: the tables that anert_plan_new takes, and a cache of them on disk: a second start compiles nothing.

A cached plan is looked up by text, weight files and all else that shapes it: anert's own code, the native build,
instruction set and precision. It is trusted no more than any other: a checksum guards the file, its parts are
checked against each other, and anert_plan_new checks every view. What does not pass is deleted and compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anert.backend.base import Port, ProgramStats
from anert.errors import AnertError, InputError
from anert.ffi import call, load
from anert.mil.graph import TensorType

MAGIC = b"anert plan 1\n"
TABLES = ("buffers", "views", "instrs", "steps")
"""Of anert_plan_def, in the order of a file."""
MAX_FILES, MAX_BYTES = 512, 256 << 20
"""Of the cache: past either the oldest files go."""


@dataclass(eq=False, slots=True)
class Buffer:
    """What lies behind a plan's buffer: a constant (`data`), or the port `name`. place: `const`, `input`, `output`."""

    place: str
    name: str
    nbytes: int
    data: Any = None


@dataclass(slots=True)
class Plan:
    """A program without its native handle. `tables` are the bytes of anert_plan_def's arrays; `buffers[i]` belongs to
    buffer i, None to 0, the arena."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    buffers: list[Buffer | None]
    tables: dict[str, bytes]
    counters: tuple[str, ...]
    stats: ProgramStats = field(default_factory=ProgramStats)

    def make(self) -> Any:
        """The native plan, checked. InputError names the step that is wrong."""
        native = load()
        fields: dict[str, Any] = {"n_counters": len(self.counters)}
        for name in TABLES:
            table = native.ffi.from_buffer(f"anert_{name[:-1]}[]", self.tables[name])
            given = len(self.tables[name])
            if len(table) * native.ffi.sizeof(f"anert_{name[:-1]}") != given:
                raise InputError(f"a plan's table of {name} has {given} bytes: no whole number of them")
            fields[name], fields[f"n_{name}"] = table, len(table)
        out = native.ffi.new("anert_plan **")
        call(native.lib.anert_plan_new, native.ffi.new("anert_plan_def *", fields), out)
        return native.ffi.gc(out[0], native.lib.anert_plan_free)


@functools.cache
def code_identity() -> str:
    """Changes with anert's version, the modules that make plans, and the native build."""
    from anert import __version__

    here = Path(__file__).resolve().parent
    native = Path(str(load().__file__))
    digest = hashlib.sha256(__version__.encode())
    for path in (native, *sorted(here.glob("*.py")), *sorted(here.parent.glob("mil/**/*.py"))):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class PlanCache:
    """Plans in `folder`, which is made when the first is kept. One that cannot be read or written is an empty cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.plan"

    def get(self, key: str) -> Plan | None:
        """The plan of this key, or None."""
        try:
            data = self.path(key).read_bytes()
        except OSError:
            return None
        try:
            return decode(data, key)
        except (AnertError, ValueError, KeyError, TypeError, IndexError):
            with contextlib.suppress(OSError):
                self.path(key).unlink()
            return None

    def put(self, key: str, plan: Plan) -> None:
        """Keep a plan: whoever finds its file finds all of it."""
        path = self.path(key)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(encode(plan, key))
            temporary.replace(path)
            self._prune()
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _prune(self) -> None:
        files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(self.folder))
        total = sum(size for _, size, _ in files)
        while files and (len(files) > MAX_FILES or total > MAX_BYTES):
            _, size, path = files.pop(0)
            os.unlink(path)
            total -= size


def _ports(ports: Sequence[Port]) -> list[list[Any]]:
    return [[p.name, p.type.dtype, list(p.type.shape), p.encoded] for p in ports]


def encode(plan: Plan, key: str) -> bytes:
    """A file: magic, checksum of what follows, length of a JSON header, the header, tables and constants."""
    parts = [plan.tables[name] for name in TABLES]
    parts += [bytes(memoryview(b.data).cast("B")) for b in plan.buffers if b is not None and b.place == "const"]
    header = {
        "key": key, "inputs": _ports(plan.inputs), "outputs": _ports(plan.outputs),
        "buffers": [None if b is None else [b.place, b.name, b.nbytes] for b in plan.buffers],
        "sizes": [len(part) for part in parts], "counters": list(plan.counters), "stats": asdict(plan.stats),
    }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    body = b"".join([len(text).to_bytes(8, "little"), text, *(part + bytes(-len(part) % 64) for part in parts)])
    return MAGIC + hashlib.sha256(body).digest() + body


def decode(data: bytes, key: str) -> Plan:
    """The plan of a file. ValueError, KeyError, TypeError or an AnertError if it is not the one that `key` names."""
    start = len(MAGIC) + 32
    body = memoryview(data)[start:]
    if data[: len(MAGIC)] != MAGIC or hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
        raise ValueError("no whole plan")
    at = 8 + int.from_bytes(body[:8], "little")
    header = json.loads(bytes(body[8:at]))
    if header["key"] != key:
        raise ValueError("another program's plan")
    parts = []
    for size in header["sizes"]:
        parts.append(bytes(body[at : at + size]))
        at += size + -size % 64
    constants = iter(parts[len(TABLES) :])
    buffers = [None if row is None else Buffer(*row) for row in header["buffers"]]
    for b in buffers:
        if b is not None and b.place == "const":
            b.data = next(constants)
    inputs, outputs = (
        tuple(Port(name, TensorType(dtype, tuple(shape)), encoded) for name, dtype, shape, encoded in header[side])
        for side in ("inputs", "outputs")
    )
    _check(buffers, {p.name: p for p in inputs}, {p.name: p for p in outputs})
    tables = dict(zip(TABLES, parts[: len(TABLES)], strict=True))
    return Plan(inputs, outputs, buffers, tables, tuple(header["counters"]), ProgramStats(**header["stats"]))


def _check(buffers: list[Buffer | None], inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> None:
    """Every buffer but the arena has what it stands for, as large as the plan takes it to be."""
    if not buffers or buffers[0] is not None:
        raise ValueError("buffer 0 is the arena")
    for b in buffers[1:]:
        assert b is not None
        size = len(b.data) if b.place == "const" else {"input": inputs, "output": outputs}[b.place][b.name].nbytes
        if b.nbytes > size:
            raise ValueError(f"buffer {b.name!r} of {b.nbytes} bytes has {size}")
