"""Builds the native core: native/anert.h is the cffi declaration, native/*.c the sources, anert._native the extension.

On macOS also the Neural Engine's shim, anert._ane: native/ane.h and native/*.m.

`pip install` uses BuildExt through pyproject.toml. By hand, from the repository:

    python build_ffi.py                  # in place: anert/_native.abi3.so
    python build_ffi.py --out DIR        # another build beside it: DIR/_native.abi3.so, chosen by ANERT_NATIVE
    python build_ffi.py --werror         # warnings are errors
    python build_ffi.py --ane-testing --out DIR  # DIR/_ane.abi3.so alone, which opens any framework: for tests, on
                                                 # Linux too, with clang and GNUstep; chosen by ANERT_ANE

ANERT_CFLAGS is added to every compile and link: ANERT_CFLAGS="-fsanitize=address,undefined -g -O1".
"""

# mypy: disable-error-code="import-untyped,misc,no-any-return"
from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cffi import FFI
from setuptools import Distribution
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "native"
MODULE, ANE_MODULE = "anert._native", "anert._ane"
ANE_SOURCES = ("ane.m", "ane_framework.m", "surface_iosurface.m", "error.c")
# No contraction: bits must not depend on which multiply-add a compiler chose to fuse. Nobody reads errno or the
# floating-point flags: so said, loops with sqrt and selects are vectorised. No debug information, which Python's own
# flags ask for: it names the folder of the build, and two builds would differ (ANERT_CFLAGS=-g brings it back).
CFLAGS = ["-O3", "-g0", "-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"]
CFLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
LIMITED_API = ("Py_LIMITED_API", "0x030B0000")
OBJC_FLAGS = ("-fno-objc-arc", "-Werror=objc-method-access", "-Wno-unused-command-line-argument")
OBJC_LIBRARIES = ("-framework", "Foundation", "-lobjc")
JOBS = 2
NO_COMPILER = (
    "anert's native core needs a C compiler and {command!r} was not found. Install one: "
    "`apt install gcc libc6-dev` (Debian, Ubuntu), `dnf install gcc` (Fedora), `xcode-select --install` (macOS); "
    "or name one by CC=/path/to/cc"
)
NO_GNUSTEP = "a test build of the Neural Engine's shim needs Objective-C: `apt install clang gobjc libgnustep-base-dev`"


def cdef(header: Path = NATIVE / "anert.h") -> str:
    """The declarations of a header and of those beside it that it includes, as cffi reads them: no comments, no
    preprocessor lines."""
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    text = re.sub(r'^#include "(.+)"$', lambda found: cdef(header.parent / found[1]), text, flags=re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.startswith("#"))


def interface(header: Path = NATIVE / "anert.h") -> int:
    """The number by which anert.ffi knows that an extension was built of these headers: of their digest, 31 bits."""
    digest = hashlib.sha256(header.read_bytes() + (header.parent / "status.h").read_bytes()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def declare(ffi: FFI, module: str, header: Path, **options: Any) -> None:
    """Give cffi the declarations of a header and, as ANERT_INTERFACE, its number."""
    number = f"enum {{ ANERT_INTERFACE = {interface(header)} }};"
    ffi.cdef(f"{cdef(header)}\n{number}")
    ffi.set_source(module, f'#include "{header.name}"\n{number}', **options)


def objc_flags(include: Path) -> tuple[list[str], list[str]]:
    """Compile and link flags of Objective-C without ARC: Foundation, on macOS Apple's, elsewhere GNUstep's on gcc's
    runtime. `include` is a folder for the runtime's headers alone: beside them lie gcc's own, which clang must not
    see."""
    if sys.platform == "darwin":
        return [*OBJC_FLAGS], [*OBJC_LIBRARIES]

    def answer(*command: str) -> list[str]:
        return shlex.split(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    try:
        found = answer("gnustep-config", "--objc-flags")
        libraries = answer("gnustep-config", "--base-libs")
        headers = answer("gcc", "-print-file-name=include/objc")
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(NO_GNUSTEP) from None
    include.mkdir(parents=True, exist_ok=True)
    if not (include / "objc").exists():
        (include / "objc").symlink_to(headers[0])
    unwanted = ("-MMD", "-MP", "-g", "-O2", "-Wall", "-I.")  # dependency files; the rest is ours to say
    return [*OBJC_FLAGS, *(f for f in found if f not in unwanted), "-fobjc-runtime=gcc", f"-I{include}"], libraries


def native_sources() -> list[str]:
    """The files of native/ that anert._native is built of."""
    return sorted(path.name for path in NATIVE.glob("*.c"))


def extension(build_dir: Path) -> Any:
    """The setuptools Extension of anert._native; cffi's generated C goes below `build_dir`."""
    return _extension(build_dir, MODULE, "anert.h", native_sources(), [], ["-pthread"])


def ane_extension(build_dir: Path, testing: bool) -> Any:
    """The setuptools Extension of anert._ane; testing: it opens whatever framework it is told to."""
    compile_args, link_args = objc_flags(build_dir / "include")
    defines = ["-DANERT_ANE_TESTING"] if testing else []
    return _extension(build_dir, ANE_MODULE, "ane.h", ANE_SOURCES, [*compile_args, *defines], link_args)


def _extension(
    build_dir: Path, module: str, header: str, sources: Iterable[str], compile_args: list[str], link_args: list[str]
) -> Any:
    ffi = FFI()
    extra = shlex.split(os.environ.get("ANERT_CFLAGS", ""))
    declare(
        ffi,
        module,
        NATIVE / header,
        sources=[os.path.relpath(NATIVE / name) for name in sources],
        include_dirs=[os.path.relpath(NATIVE)],
        depends=sorted(os.path.relpath(path) for path in NATIVE.glob("*.h")),
        extra_compile_args=[*CFLAGS, *compile_args, *extra],
        extra_link_args=[*link_args, *extra],
        libraries=["m"],
        define_macros=[LIMITED_API],
        py_limited_api=True,
    )
    return ffi.distutils_extension(tmpdir=str(build_dir))


class BuildExt(build_ext):
    """build_ext of anert._native, and on macOS anert._ane, recompiling what changed, two files at a time.

    ane_testing: the test build of anert._ane instead of either.
    """

    werror: bool
    ane_testing: bool
    build_temp: str

    def initialize_options(self) -> None:
        super().initialize_options()
        self.werror = False
        self.ane_testing = False

    def finalize_options(self) -> None:
        build = [CFLAGS, os.environ.get("ANERT_CFLAGS"), os.environ.get("CC"), self.ane_testing]
        flags = hashlib.sha256(repr(build).encode())
        generated = Path("build") / "ffi"
        generated.mkdir(parents=True, exist_ok=True)
        if self.ane_testing:
            self.distribution.ext_modules = [ane_extension(generated, testing=True)]
        else:
            self.distribution.ext_modules = [extension(generated)]
            if sys.platform == "darwin":
                self.distribution.ext_modules.append(ane_extension(generated, testing=False))
        super().finalize_options()
        self.build_temp = os.path.join(self.build_temp, flags.hexdigest()[:12])

    def build_extensions(self) -> None:
        command = self.compiler.compiler_so[0] if hasattr(self.compiler, "compiler_so") else "cc"
        if shutil.which(command) is None:
            raise SystemExit(NO_COMPILER.format(command=command))
        if self.werror:
            for ext in self.extensions:
                ext.extra_compile_args.append("-Werror")
        self._compile_all = self.compiler.compile
        self.compiler.compile = self._compile_changed
        super().build_extensions()

    def _compile_changed(self, sources: list[str], output_dir: str, depends: list[str], **options: Any) -> list[str]:
        objects = self.compiler.object_filenames(sources, output_dir=output_dir)
        for directory in {os.path.dirname(path) for path in objects}:
            os.makedirs(directory, exist_ok=True)
        newest = max((os.path.getmtime(path) for path in [*depends, __file__]), default=0.0)

        def stale(source: str, target: str) -> bool:
            if self.force or not os.path.exists(target):
                return True
            return os.path.getmtime(target) < max(newest, os.path.getmtime(source))

        def compile_one(source: str) -> None:
            self._compile_all([source], output_dir=output_dir, **options)

        changed = [source for source, target in zip(sources, objects, strict=True) if stale(source, target)]
        with ThreadPoolExecutor(JOBS) as jobs:
            list(jobs.map(compile_one, changed))
        return objects


def build(out: str | None = None, werror: bool = False, force: bool = False, ane_testing: bool = False) -> Path:
    """Build in place, or into the directory `out`; returns the path of the (first) extension."""
    os.chdir(ROOT)
    distribution = Distribution({"name": "anert", "packages": ["anert"]})
    command = BuildExt(distribution)
    command.inplace = out is None
    command.force = force
    command.werror = werror
    command.ane_testing = ane_testing
    if out is not None:
        command.build_temp = str(Path(out) / "temp")
        command.build_lib = str(Path(out) / "lib")
    command.ensure_finalized()
    command.run()
    built = [Path(command.get_ext_fullpath(ext.name)) for ext in command.extensions]
    if out is None:
        return built[0]
    copies = [Path(shutil.copy2(path, Path(out) / path.name)) for path in built]
    return copies[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build anert's native core.")
    parser.add_argument("--out", help="build into this directory and leave the one in place alone")
    parser.add_argument("--werror", action="store_true", help="treat warnings as errors")
    parser.add_argument("--force", action="store_true", help="recompile everything")
    parser.add_argument("--ane-testing", action="store_true", help="build the Neural Engine's shim alone, for tests")
    options = parser.parse_args()
    if options.ane_testing and not options.out:
        parser.error("--ane-testing needs --out: a test build has no place in the package")
    if options.ane_testing:
        os.environ.setdefault("CC", "clang")  # gcc knows no Objective-C 2
    try:
        print(build(options.out, options.werror, options.force, options.ane_testing), file=sys.stderr)
    except (CompileError, LinkError) as error:
        raise SystemExit(f"the native core did not build: {error}") from None


if __name__ == "__main__":
    main()
