"""Builds the native core, the Neural Engine's shim and the stand-in for another platform, of build_ffi's own lists.

    python tests/cross.py aarch64 --root ROOT --out DIR  # Linux on aarch64: clang; .ci/aarch64 makes ROOT
    python tests/cross.py macos --out DIR                # macOS on Apple silicon: zig, tests/macstub

DIR then has _native.abi3.so and _ane.abi3.so, and for aarch64 fake.so; the objects lie below DIR/native and the like.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import build_ffi  # noqa: E402

TESTS = ROOT / "tests"
FAKE = TESTS / "fake_apple"
STUBS = TESTS / "macstub"
NATIVE_SOURCES = [build_ffi.NATIVE / name for name in build_ffi.native_sources()]
ANE_SOURCES = [build_ffi.NATIVE / name for name in build_ffi.ANE_SOURCES]


@dataclass(frozen=True)
class Target:
    """How one platform is compiled for: the compiler's command, what Objective-C adds, how a library is linked."""

    cc: tuple[str, ...]
    objc: tuple[str, ...]
    link: tuple[str, ...]
    objc_link: tuple[str, ...]
    name_flag: str
    """What precedes the name that a library gives itself."""


def aarch64(root: Path) -> Target:
    """Linux on aarch64, the system below `root`: clang, GNUstep on gcc's runtime."""
    objects = sorted(root.glob("usr/lib/gcc/aarch64-linux-gnu/*/include/objc"))
    if not objects:
        raise SystemExit(f"{root} is no aarch64 system with GNUstep: make it by .ci/aarch64")
    include = root / "anert" / "include"  # the runtime's headers alone, not gcc's beside them
    include.mkdir(parents=True, exist_ok=True)
    if not (include / "objc").exists():
        (include / "objc").symlink_to(objects[-1])
    gnustep = ("-DGNUSTEP", "-DGNUSTEP_BASE_LIBRARY=1", "-DGNU_RUNTIME=1", "-D_NATIVE_OBJC_EXCEPTIONS")
    objc = (*build_ffi.OBJC_FLAGS, *gnustep, "-fobjc-runtime=gcc", "-fexceptions", "-fobjc-exceptions")
    objc += ("-fno-strict-aliasing", "-fconstant-string-class=NSConstantString")
    objc += (f"-I{include}", f"-I{root}/usr/include/GNUstep")
    cc = ("clang", "--target=aarch64-linux-gnu", f"--sysroot={root}")
    return Target(cc, objc, ("-shared", "-pthread"), ("-lgnustep-base", "-lobjc"), "-Wl,-soname,")


def macos(stubs: Path) -> Target:
    """macOS 14 on Apple silicon: zig's clang, headers and linker; what it lacks of Apple's are headers in tests/macstub
    and libraries of names alone, written to `stubs`. Python's own names are left to the interpreter, as for any
    extension."""
    for library, symbols in provided().items():
        if "objc" in library or ".framework" in library:
            name = Path(library).name
            folder = stubs / f"{name}.framework" if ".framework" in library else stubs
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name.partition('.')[0]}.tbd").write_text(text_stub(library, symbols))
    cc = (sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-macos.14.0")
    objc = (*build_ffi.OBJC_FLAGS, f"-F{STUBS}")
    frameworks = (f"-F{stubs}", f"-L{stubs}", *build_ffi.OBJC_LIBRARIES)
    return Target(cc, objc, ("-shared", "-Wl,-undefined,dynamic_lookup"), frameworks, "-Wl,-install_name,@rpath/")


def provided() -> dict[str, list[str]]:
    """Library -> what it provides of tests/macstub/symbols.txt, which is what anert may import on macOS."""
    libraries: dict[str, list[str]] = {}
    for line in (STUBS / "symbols.txt").read_text().splitlines():
        if line.startswith("["):
            libraries[line.strip("[]")] = []
        elif line and not line.startswith("#"):
            libraries[list(libraries)[-1]].append(line)
    return libraries


def text_stub(library: str, symbols: list[str]) -> str:
    """A library for the linker that has these symbols and no code: Apple's text-based stub, version 4."""
    kinds: dict[str, list[str]] = {"symbols": [], "objc-classes": [], "objc-eh-types": []}
    for symbol in symbols:
        kind, _, name = symbol.rpartition(" ")
        key = {"": "symbols", "class": "objc-classes", "exception": "objc-eh-types"}[kind]
        kinds[key].append(f"_{name}" if key == "symbols" else name)
    exports = "".join(f"    {key}: [ {', '.join(names)} ]\n" for key, names in kinds.items() if names)
    head = f"--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{library}'\n"
    return f"{head}exports:\n  - targets: [ arm64-macos ]\n{exports}...\n"


def run(command: Iterable[object]) -> None:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def compile_all(target: Target, sources: Iterable[Path], folder: Path, flags: Iterable[str]) -> list[Path]:
    """An object below `folder` of each source, two at a time, warnings being errors."""
    folder.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        objc = target.objc if source.suffix == ".m" else ()
        out = folder / f"{source.stem}.o"
        run([*target.cc, *flags, "-Werror", *objc, "-fPIC", "-c", source, "-o", out])
        return out

    with ThreadPoolExecutor(build_ffi.JOBS) as jobs:
        return list(jobs.map(one, sources))


def link(target: Target, objects: Iterable[Path], out: Path, *libraries: str) -> Path:
    run([*target.cc, *target.link, target.name_flag + out.name, *objects, *libraries, "-lm", "-o", out])
    return out


def python_headers(out: Path) -> Path:
    """This Python's headers. Debian's pyconfig.h includes another by platform, and knows its own platforms alone: then
    a copy with the one of this machine, whose sizes are those of any other of 64 bits."""
    headers = Path(sysconfig.get_path("include"))
    own = headers.parent / str(sysconfig.get_config_var("MULTIARCH")) / headers.name / "pyconfig.h"
    if not own.exists():
        return headers
    copy = out / "python"
    shutil.copytree(headers, copy, dirs_exist_ok=True)
    shutil.copyfile(own, copy / "pyconfig.h")
    return copy


def extension(target: Target, out: Path, module: str, header: str, sources: list[Path], *flags: str) -> Path:
    """out/_MODULE.abi3.so: the sources and cffi's generated C, for CPython's limited API."""
    ffi = FFI()
    build_ffi.declare(ffi, module, build_ffi.NATIVE / header, py_limited_api=True)
    name = module.rpartition(".")[2]
    folder = out / name.strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    glue = folder / f"{name}_glue.c"
    ffi.emit_c_code(str(glue))
    python = f"-I{python_headers(out)}"
    limited = f"-D{build_ffi.LIMITED_API[0]}={build_ffi.LIMITED_API[1]}"
    flags = (*build_ffi.CFLAGS, f"-I{build_ffi.NATIVE}", *flags)
    objects = compile_all(target, sources, folder, flags) + compile_all(
        target, [glue], folder, [*flags, python, limited]
    )
    libraries = target.objc_link if any(source.suffix == ".m" for source in sources) else ()
    return link(target, objects, out / f"{name}.abi3.so", *libraries)


def build(target: Target, out: Path, *ane_flags: str) -> tuple[Path, Path]:
    """(_native, _ane) in `out`."""
    native = extension(target, out, build_ffi.MODULE, "anert.h", NATIVE_SOURCES)
    return native, extension(target, out, build_ffi.ANE_MODULE, "ane.h", ANE_SOURCES, *ane_flags)


def build_fake(target: Target, out: Path) -> Path:
    flags = ("-std=gnu11", "-Wall", "-Wextra", "-O2", f"-I{FAKE}")
    objects = compile_all(target, sorted(FAKE.glob("*.m")), out / "fake", flags)
    return link(target, objects, out / "fake.so", *target.objc_link)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=("aarch64", "macos"))
    parser.add_argument("--root", type=Path, help="of aarch64: the folder that holds the system")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.target == "macos":
        build(macos(options.out / "stubs"), options.out)
    elif options.root is None:
        parser.error("aarch64 needs --root")
    else:
        target = aarch64(options.root.resolve())
        build(target, options.out, "-DANERT_ANE_TESTING")
        build_fake(target, options.out)


if __name__ == "__main__":
    main()
