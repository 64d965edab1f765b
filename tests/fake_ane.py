"""The stand-in for Apple's frameworks (tests/fake_apple) as a fixture: built once, loaded, watched, checked at the end.

    def test_something(fake_ane):
        fake = fake_ane(profile="m1", load_failures=1)
        ...                                # AneBackend(framework=fake.path) or fake.engine()
        assert fake.counts().evaluates == 1

At the end nothing of the framework may be alive, no staging directory left, and no breach of contract noted, unless the
test said so: `fake.forgive("written without a lock")`.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cffi import FFI
from fake_quirks import PROFILES, Quirks, Refused, apply, check, poisons

import build_ffi
from anert import ffi as native
from anert.backend.cpu import CpuBackend, CpuProgram
from anert.errors import AnertError
from anert.mil.text import parse

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "fake_apple"
SANITIZE = (
    "-fsanitize=address,undefined",
    "-shared-libasan",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
)
DEFAULTS = {"compile_limit": 119, "load_limit": 128, "max_inputs": 8, "width_multiple": 16, "evaluate_us": 60}


def run(command: list[str], **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


@functools.cache
def build(flags: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """(shim, stand-in) as shared objects, in build/fake_apple/<hash of all sources>; flags: for compiler and linker.

    ANERT_FAKE_BUILD names a folder that has both, of another platform (tests/cross.py)."""
    if built := os.environ.get("ANERT_FAKE_BUILD"):
        assert not flags, "what is built elsewhere has its own flags"
        return Path(built) / "_ane.abi3.so", Path(built) / "fake.so"
    sources = [*sorted(SOURCES.iterdir()), ROOT / "build_ffi.py"]
    sources += [
        build_ffi.NATIVE / n for n in ("ane_apple.h", "ane.h", "status.h", "internal.h", *build_ffi.ANE_SOURCES)
    ]
    digest = hashlib.sha256(repr(flags).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "fake_apple" / digest.hexdigest()[:16]
    if not folder.exists():
        if not all(shutil.which(tool) for tool in ("clang", "gnustep-config")):
            assert not os.environ.get("CI"), "CI has clang and GNUstep (.ci/run)"
            pytest.skip(build_ffi.NO_GNUSTEP)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=folder.parent))
        build_fake(work, flags)
        env = {**os.environ, "ANERT_CFLAGS": shlex.join(flags), "CC": "clang", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / "build_ffi.py"), "--ane-testing", "--werror", "--out", str(work)]
        run(command, env=env)
        try:
            work.rename(folder)
        except OSError:  # another process was quicker
            assert folder.exists()
    return folder / "_ane.abi3.so", folder / "fake.so"


def build_fake(folder: Path, flags: tuple[str, ...]) -> None:
    compile_args, link_args = build_ffi.objc_flags(folder / "include")
    warn = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2", *flags]
    objects = []
    for source in sorted(SOURCES.glob("*.m")):
        objects.append(str(folder / f"{source.stem}.o"))
        run(["clang", *compile_args, *warn, f"-I{SOURCES}", "-fPIC", "-c", str(source), "-o", objects[-1]])
    run(["clang", "-shared", *flags, *objects, *link_args, "-o", str(folder / "fake.so")])


@functools.cache
def library(path: Path) -> tuple[FFI, Any]:
    ffi = FFI()
    ffi.cdef(build_ffi.cdef(SOURCES / "fake.h"))
    return ffi, ffi.dlopen(str(path))


class Compiler:
    """The hook: MIL text -> plan of the CPU engine. Keeps what it made until it is dropped."""

    def __init__(self, ffi: FFI, quirks: Quirks, engine: CpuBackend) -> None:
        self.ffi, self.quirks, self.engine = ffi, quirks, engine
        self.made: list[Any] = []
        self.bugs: list[str] = []
        self.texts: list[str] = []

    def __call__(self, job: Any) -> None:
        # The shim holds its lock around a compile, and no Python runs inside one but here: a collection that frees an
        # earlier program would wait for that lock for ever.
        collects = gc.isenabled()
        gc.disable()
        try:
            self.compile(job)
        except Refused as refused:
            self.refuse(job, str(refused), refused.invalid)
        except AnertError as error:
            self.refuse(job, str(error), invalid=True)
        except Exception:
            self.bugs.append(traceback.format_exc())
            self.refuse(job, "a bug in the stand-in", invalid=False)
        finally:
            if collects:
                gc.enable()

    def refuse(self, job: Any, message: str, invalid: bool) -> None:
        job.verdict = 1 if invalid else 2
        job.message = message.encode()[:500]

    def compile(self, job: Any) -> None:
        text = bytes(self.ffi.buffer(job.text, job.text_bytes)).decode()
        entries = [job.blobs[i] for i in range(job.n_blobs)]
        blobs = {self.ffi.string(b.path).decode(): bytes(self.ffi.buffer(b.data, b.nbytes)) for b in entries}
        named = set(re.findall(r'BLOBFILE\(path\s*=\s*(?:tensor<string, \[\]>|string)\("([^"]*)"\)', text))
        if named != set(blobs):
            job.violation = f"the text names the files {sorted(named)}, the weights are {sorted(blobs)}".encode()[:500]
        self.texts.append(text)
        function = parse(text, blobs=blobs).main
        check(function, self.quirks)
        program = self.engine.compile_function(apply(function, self.quirks))
        job.poison = poisons(function, self.quirks)
        self.fill(job, program)

    def fill(self, job: Any, program: CpuProgram) -> None:
        def address(pointer: Any) -> Any:
            return self.ffi.cast("void *", int(native.ffi.cast("uintptr_t", pointer)))

        buffers = program.buffers
        bases = self.ffi.new("void *[]", len(buffers))
        numbers = {}
        for i, root in enumerate(buffers):
            if root is not None and root.place == "const":
                bases[i] = address(program.constants[root])
            elif root is not None:
                numbers[root.name] = i
        everything = [*((p, 0) for p in program.inputs), *((p, 1) for p in program.outputs)]
        ports = self.ffi.new("fake_port[]", len(everything))
        for slot, (port, output) in zip(ports, everything, strict=True):
            slot.name, slot.output, slot.nbytes = port.name.encode(), output, port.nbytes
            slot.buffer, slot.width = numbers.get(port.name, -1), port.type.shape[-1] if port.type.shape else 1
        job.plan, job.pool = address(program.plan), address(program.pool.ptr)
        job.bases, job.n_bases, job.arena_bytes = bases, len(buffers), program.stats.arena_bytes
        job.ports, job.n_ports = ports, len(everything)
        self.made.append((program, bases, ports))


class FakeAne:
    """The stand-in, set up for one test. `path` is what to open in place of both frameworks."""

    def __init__(self, shim: Path, path: Path, profile: str, precision: str, threads: int) -> None:
        self.shim, self.path, self.profile = shim, str(path), profile
        self.ffi, self.lib = library(path)
        self.compiler = Compiler(self.ffi, PROFILES[profile], CpuBackend(native.Pool(threads), precision=precision))
        self._hook = self.ffi.callback("void(fake_job *)", self.compiler)
        self._forgiven: list[str] = []
        for left in self.staged():  # by a process that was killed and had this one's number
            shutil.rmtree(self.temporary_directory() / left)

    def install(self, missing: str = "", changed: str = "") -> None:
        """Register the classes; the first call of a process decides what is missing and what has another type."""
        self.lib.fake_install(missing.encode(), changed.encode())

    def reset(self, **options: Any) -> None:
        """Forget everything but objects that live, as a new process would."""
        core = native.load()
        plan_run = int(core.ffi.cast("uintptr_t", core.ffi.addressof(core.lib, "anert_plan_run")))
        given = {k: v.encode() if isinstance(v, str) else v for k, v in {**DEFAULTS, **options}.items()}
        record = self.ffi.new("fake_options *", given)
        self.lib.fake_reset(record, self._hook, self.ffi.cast("void *", plan_run))

    def set(self, **options: Any) -> None:
        """Change options (fake.h) from here on."""
        settings = self.lib.fake_settings()
        for name, value in options.items():
            setattr(settings, name, value.encode() if isinstance(value, str) else value)

    def counts(self) -> Any:
        """fake_counts: what was called, what is alive."""
        out = self.ffi.new("fake_counts *")
        self.lib.fake_count(out)
        return out

    def alive(self) -> dict[str, int]:
        counts = self.counts()
        kinds = ("descriptors", "models", "wrappers", "requests", "surfaces", "loaded")
        return {kind: n for kind in kinds if (n := getattr(counts, kind))}

    def violations(self) -> list[str]:
        """Breaches of contract that were noted and not forgiven."""
        found = [self.ffi.string(self.lib.fake_violation(i)).decode() for i in range(self.lib.fake_violations())]
        return [text for text in found if not any(re.search(p, text) for p in self._forgiven)]

    def forgive(self, pattern: str) -> None:
        """Expect violations that match; there must be one by now."""
        found = [text for text in self.violations() if re.search(pattern, text)]
        assert found, f"no violation matches {pattern!r}: {self.violations()}"
        self._forgiven.append(pattern)

    def temporary_directory(self) -> Path:
        """NSTemporaryDirectory()."""
        return Path(self.ffi.string(self.lib.fake_temporary_directory()).decode())

    def staged(self) -> list[str]:
        """Staging directories of this process."""
        return sorted(p.name for p in self.temporary_directory().glob(f"{os.getpid():08X}*"))

    def check(self) -> None:
        """All that must hold when everything has been freed."""
        gc.collect()
        self.lib.fake_check_released()
        assert not self.compiler.bugs, "\n".join(self.compiler.bugs)
        assert self.violations() == []
        assert self.alive() == {}, "of the framework's objects these are still alive"
        assert self.staged() == [], "staging directories are left"


FakeMaker = Callable[..., FakeAne]


@contextmanager
def stand_in(shim: Path | None = None) -> Iterator[FakeMaker]:
    """What the fixture gives; shim: another build of it. Checks at the end unless the body raised."""
    made: list[FakeAne] = []
    before = os.environ.get("ANERT_ANE")

    def make(profile: str = "plain", precision: str = "fp32", threads: int = 1, **options: Any) -> FakeAne:
        assert not made, "one stand-in a test"
        flags = tuple(shlex.split(os.environ.get("ANERT_FAKE_FLAGS", "")))
        built, path = build(flags)
        os.environ["ANERT_ANE"] = str(shim or built)
        native.load_ane.cache_clear()
        fake = FakeAne(shim or built, path, profile, precision, threads)
        fake.install()
        fake.reset(**options)
        made.append(fake)
        return fake

    try:
        yield make
        for fake in made:
            fake.check()
    finally:
        native.load_ane.cache_clear()
        os.environ.pop("ANERT_ANE", None)
        if before is not None:
            os.environ["ANERT_ANE"] = before


@pytest.fixture
def fake_ane() -> Iterator[FakeMaker]:
    """fake_ane(profile="plain", precision="fp32", threads=1, **options of fake.h) -> FakeAne, once per test.

    The shim that `anert.ffi.load_ane` loads during the test is the test build. ANERT_FAKE_FLAGS: how both are compiled.
    """
    with stand_in() as make:
        yield make
