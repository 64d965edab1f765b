"""The shim as a Mach-O library for arm64 macOS, compiled and linked here: what it sends, and what it asks macOS for.

The headers of tests/mac_headers stand in for Apple's SDK; nothing here runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import sys
from pathlib import Path

import pytest
from fake_ane import ROOT, run

import build_ffi

pytestmark = pytest.mark.slow

ARM64, DYLIB, SEGMENT, SYMTAB = 0x0100000C, 6, 0x19, 0x2
# Undefined symbols, by the library of macOS that has them. Foundation stands for CoreFoundation, which it re-exports.
FOUNDATION = """NSClassFromString NSTemporaryDirectory NSUnderlyingErrorKey __CFConstantStringClassReference
__NSDictionary0__ OBJC_CLASS_$_NSArray OBJC_CLASS_$_NSData OBJC_CLASS_$_NSDictionary OBJC_CLASS_$_NSFileManager
OBJC_CLASS_$_NSMutableArray OBJC_CLASS_$_NSMutableDictionary OBJC_CLASS_$_NSMutableString OBJC_CLASS_$_NSNumber
OBJC_CLASS_$_NSString OBJC_EHTYPE_$_NSException"""
RUNTIME = """__objc_personality_v0 class_getClassMethod class_getInstanceMethod method_getTypeEncoding objc_alloc
objc_autoreleasePoolPop objc_autoreleasePoolPush objc_begin_catch objc_end_catch objc_enumerationMutation objc_msgSend
objc_release objc_retain objc_terminate sel_registerName"""
SYSTEM = """_Unwind_Resume __snprintf_chk __vsnprintf_chk bzero calloc clock_gettime dlerror dlopen dlsym free memchr
memcpy memset pthread_mutex_destroy pthread_mutex_init pthread_mutex_lock pthread_mutex_unlock qsort snprintf strchr
strcmp strlen usleep vsnprintf __memcpy_chk __stack_chk_fail __stack_chk_guard"""
PRIVATE = """modelWithMILText:weights:optionsPlist: inMemoryModelWithDescriptor: hexStringIdentifier
compileWithQoS:options:error: loadWithQoS:options:error: evaluateWithQoS:options:request:error: unloadWithQoS:error:
objectWithIOSurface: requestWithInputs:inputIndices:outputs:outputIndices:procedureIndex:
requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:"""


class MachO:
    """Header, sections and undefined symbols of a 64-bit Mach-O file (<mach-o/loader.h>, <mach-o/nlist.h>)."""

    def __init__(self, data: bytes) -> None:
        magic, self.cpu, _, self.kind, n_commands, _, _, _ = struct.unpack_from("<8I", data)
        assert magic == 0xFEEDFACF
        self.sections: dict[str, bytes] = {}
        self.undefined: set[str] = set()
        self.exported: set[str] = set()
        at = 32
        for _ in range(n_commands):
            command, size = struct.unpack_from("<2I", data, at)
            if command == SEGMENT:
                self._segment(data, at)
            elif command == SYMTAB:
                self._symbols(data, *struct.unpack_from("<4I", data, at + 8))
            at += size

    def _segment(self, data: bytes, at: int) -> None:
        (count,) = struct.unpack_from("<I", data, at + 64)
        for i in range(count):
            name, _, _, size, offset = struct.unpack_from("<16s16sQQI", data, at + 72 + 80 * i)
            self.sections[name.rstrip(b"\0").decode()] = data[offset : offset + size]

    def _symbols(self, data: bytes, offset: int, count: int, strings: int, _: int) -> None:
        for i in range(count):
            where, kind, _, _, _ = struct.unpack_from("<IBBHQ", data, offset + 16 * i)
            start = strings + where
            name = data[start : data.index(b"\0", start)].decode()
            if kind & 0x0F == 0x01:
                self.undefined.add(name)
            elif kind & 0x01:
                self.exported.add(name)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> MachO:
    if importlib.util.find_spec("ziglang") is None:
        assert not os.environ.get("CI"), "CI has ziglang (the extra `test`)"
        pytest.skip("no ziglang: pip install 'anert[test]'")
    folder = tmp_path_factory.mktemp("macho")
    return MachO(link(folder).read_bytes())


def link(folder: Path) -> Path:
    """anert._ane with the flags of build_ffi, for arm64 macOS 14."""
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-macos.14.0"]
    platform, sys.platform = sys.platform, "darwin"
    try:
        extension = build_ffi.ane_extension(folder, testing=False)
    finally:
        sys.platform = platform
    python = Path(sys.base_prefix) / "include" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    defines = [f"-D{name}={value}" for name, value in extension.define_macros]
    includes = [f"-I{ROOT / 'tests' / 'mac_headers'}", f"-I{build_ffi.NATIVE}", f"-I{python}"]
    objects = []
    for source in extension.sources:
        objects.append(str(folder / f"{Path(source).stem}.o"))
        flags = [*extension.extra_compile_args, "-Werror", *defines, *includes]
        run([*zig, *flags, "-c", str(Path(source).absolute()), "-o", objects[-1]])
    out = folder / "_ane.abi3.so"
    run([*zig, "-shared", "-Wl,-undefined,dynamic_lookup", *objects, "-o", str(out)])
    return out


def test_it_is_a_library_of_one_entry(library):
    assert (library.cpu, library.kind) == (ARM64, DYLIB)
    assert {name for name in library.exported if not name.startswith("__")} == {"_PyInit__ane"}


def test_it_asks_macos_for_nothing_private(library):
    """IOSurface and AppleNeuralEngine are opened by name: none of their symbols is linked."""
    known = {f"_{name}" for name in (FOUNDATION + " " + RUNTIME + " " + SYSTEM).split()}
    python = {name for name in library.undefined if re.match(r"_{1,2}Py", name)}
    assert library.undefined - python - known - {"dyld_stub_binder"} == set()
    assert {"_objc_msgSend", "_dlopen"} <= library.undefined


def test_it_sends_what_its_table_checks(library):
    sent = {name.decode() for name in library.sections["__objc_methname"].split(b"\0") if name}
    assert set(PRIVATE.split()) <= sent
    table = (build_ffi.NATIVE / "ane_framework.m").read_text()
    assert set(re.findall(r'"_ANE\w+",\s*"([^"]+)"', table)) == set(PRIVATE.split()), "checked before it is sent"
    others = {name for name in sent if re.search("QoS|MIL|IOSurface|inMemory|hexString|requestWith", name)}
    assert others == set(PRIVATE.split())
