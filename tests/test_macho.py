"""Both extensions as Mach-O libraries for Apple silicon, compiled and linked here: what they are, ask for, and send.

zig is compiler and linker, its Darwin headers and those of tests/macstub stand in for Apple's SDK; nothing here runs.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import cross
import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("macho")]
lief = pytest.importorskip("lief", reason="pip install 'anert[cross]'")
pytest.importorskip("ziglang", reason="pip install 'anert[cross]'")

NAMES = ("_native", "_ane")
# Encodings of Arm's reference manual (A64, advanced SIMD): value, mask.
NEON = {
    "fcvtn": (0x0E216800, 0xBFFFFC00),  # fp32 -> fp16
    "fcvtl": (0x0E217800, 0xBFFFFC00),  # fp16 -> fp32
    "trn1.8h": (0x4E402800, 0xFFE0FC00),
    "trn2.8h": (0x4E406800, 0xFFE0FC00),
    "fmla.4s": (0x4E20CC00, 0xFFE0FC00),
}


@functools.cache
def parse_fat(path: Path):
    return lief.MachO.parse(str(path))


@functools.cache  # lief's objects do not keep alive what they are part of
def parse(path: Path):
    """The one architecture of a Mach-O file."""
    fat = parse_fat(path)
    assert fat is not None and len(fat) == 1, f"{path} is no Mach-O file of one architecture"
    return fat.at(0)


def section(path: Path, name: str) -> bytes:
    found = [s for s in parse(path).sections if s.name == name]
    return bytes(found[0].content) if found else b""


def imports(path: Path) -> dict[str, set[str]]:
    """Library -> what `path` imports of it, spelt as in symbols.txt; "python" for what any loaded image may provide."""
    binary = parse(path)
    libraries = [c.name for c in binary.libraries if c.command != lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    found: dict[str, set[str]] = {}
    for symbol in binary.imported_symbols:
        name = symbol.name.removeprefix("_")
        for prefix, kind in (("OBJC_CLASS_$_", "class "), ("OBJC_EHTYPE_$_", "exception ")):
            if name.startswith(prefix):
                name = kind + name.removeprefix(prefix)
        ordinal = symbol.library_ordinal
        named = 0 < ordinal <= len(libraries)
        found.setdefault(libraries[ordinal - 1] if named else "python", set()).add(name)
    return found


def unknown(path: Path) -> set[str]:
    """What `path` imports that macOS, or Python, is not known to provide."""
    known = cross.provided()
    return {
        f"{library}: {name}" for library, names in imports(path).items() for name in names - set(known.get(library, ()))
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("macho")
    cross.build(cross.macos(folder / "stubs"), folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_library_for_apple_silicon_of_one_entry(built: Path, name: str) -> None:
    binary = parse(built / f"{name}.abi3.so")
    assert binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    assert binary.header.file_type == lief.MachO.Header.FILE_TYPE.DYLIB
    assert lief.MachO.Header.FLAGS.TWOLEVEL in binary.header.flags_list
    assert binary.build_version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS
    assert binary.build_version.minos == [14, 0, 0]
    assert binary.has_code_signature, "Apple silicon starts nothing unsigned"
    entries = {s.name for s in binary.exported_symbols} - {"__mh_dylib_header", "___dso_handle"}
    assert entries == {f"_PyInit_{name}"}


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_systems_libraries_by_their_names(built: Path, name: str) -> None:
    """No path of the machine that built it; no private framework: those are opened at run time."""
    kinds = lief.MachO.LoadCommand.TYPE
    commands = [(c.command, c.name) for c in parse(built / f"{name}.abi3.so").libraries]
    assert [n for kind, n in commands if kind == kinds.ID_DYLIB] == [f"@rpath/{name}.abi3.so"]
    loads = {n for kind, n in commands if kind != kinds.ID_DYLIB}
    system = set(cross.provided()) - {"python"}
    assert loads == (system if name == "_ane" else {"/usr/lib/libSystem.B.dylib"})
    assert not parse(built / f"{name}.abi3.so").rpaths


@pytest.mark.parametrize("name", NAMES)
def test_it_imports_what_macos_provides(built: Path, name: str) -> None:
    assert unknown(built / f"{name}.abi3.so") == set(), "if macOS 14 has it, it belongs in tests/macstub/symbols.txt"


def test_the_list_of_imports_holds_nothing_that_nobody_imports(built: Path) -> None:
    used = {f"{lib}: {x}" for name in NAMES for lib, xs in imports(built / f"{name}.abi3.so").items() for x in xs}
    assert {f"{lib}: {x}" for lib, xs in cross.provided().items() for x in xs} - used == set()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("void absent(void); void f(void); void f(void) { absent(); }", "python: absent"),
        ("int system(const char *); int f(void); int f(void) { return system(0); }",
         "/usr/lib/libSystem.B.dylib: system"),
    ],
)  # fmt: skip
def test_another_import_is_caught(built: Path, tmp_path: Path, code: str, found: str) -> None:
    """A symbol that nobody provides, and one of macOS that is not on the list."""
    extra = tmp_path / "extra.c"
    extra.write_text(code)
    target = cross.macos(tmp_path / "stubs")
    objects = [*(built / "ane").glob("*.o"), *cross.compile_all(target, [extra], tmp_path, ["-O2"])]
    path = cross.link(target, objects, tmp_path / "_ane.abi3.so", *target.objc_link)
    assert unknown(path) == {found}


def test_the_shim_sends_the_messages_of_the_list(built: Path) -> None:
    """Those to the private framework are also those whose type encodings it compares before the first."""
    lines = (cross.STUBS / "selectors.txt").read_text().splitlines()
    wanted = [line for line in lines if line and line[0] not in "#["]
    objects = [built / "ane" / f"{Path(source).stem}.o" for source in cross.build_ffi.ANE_SOURCES]
    sent = {name.decode() for o in objects for name in section(o, "__objc_methname").split(b"\0") if name}
    assert sorted(sent) == sorted(wanted)
    private = wanted[: wanted.index("UTF8String")]
    table = (cross.build_ffi.NATIVE / "ane_framework.m").read_text()
    assert sorted(private) == sorted(set(re.findall(r'"_ANE\w+",\s*"([^"]+)"', table)))


@pytest.mark.parametrize(
    ("file", "names"),
    [("fp16_neon", ("fcvtn", "fcvtl", "trn1.8h", "trn2.8h")), ("gemm_neon", ("fcvtl", "fmla.4s"))],
)
def test_the_instructions_are_neons(built: Path, file: str, names: tuple[str, ...]) -> None:
    words = np.frombuffer(section(built / "native" / f"{file}.o", "__text"), "<u4")
    assert {n: bool(((words & NEON[n][1]) == NEON[n][0]).any()) for n in names} == dict.fromkeys(names, True)
    plain = np.frombuffer(section(built / "native" / "error.o", "__text"), "<u4")
    assert not ((plain & NEON["trn1.8h"][1]) == NEON["trn1.8h"][0]).any(), "the mask tells instructions apart"


def analyzer() -> str:
    """A clang that reads Darwin's headers: 17 or later."""
    for version in range(25, 16, -1):
        if found := shutil.which(f"clang-{version}"):
            return found
    pytest.skip("the static analyzer needs clang 17 or later beside zig")


def analyze(source: Path) -> str:
    """Findings of clang's static analyzer, retain counts among them."""
    import ziglang

    darwin = Path(ziglang.__file__).parent / "lib" / "libc" / "include" / "any-darwin-any"
    command = [analyzer(), "--analyze", "--analyzer-output", "text", "--target=arm64-apple-macos14", "-std=gnu11"]
    command += ["-isystem", str(darwin), f"-F{cross.STUBS}", f"-I{cross.build_ffi.NATIVE}", "-fno-objc-arc"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=source.parent)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("name", [n for n in cross.build_ffi.ANE_SOURCES if n.endswith(".m")])
def test_retains_and_releases_balance(name: str) -> None:
    assert analyze(cross.build_ffi.NATIVE / name) == ""


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('NSMutableDictionary *d = [[NSMutableDictionary alloc] initWithObjectsAndKeys:@"a", @"b", nil];'
         ' [d objectForKey:@"b"];', "Potential leak"),
        ('NSString *s = [NSString stringWithUTF8String:"a"]; [s release];', "Incorrect decrement"),
    ],
)  # fmt: skip
def test_the_analyzer_finds_a_leak_and_a_release_too_many(tmp_path: Path, body: str, found: str) -> None:
    source = tmp_path / "planted.m"
    source.write_text(f'#include "ane_apple.h"\nvoid planted(void);\nvoid planted(void) {{ {body} }}\n')
    assert found in analyze(source)
