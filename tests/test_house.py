"""The rules of the house, read off the sources: imports point downwards, rooms stay small, importing does nothing."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import anert

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "anert").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))
NATIVE = sorted(p for p in (ROOT / "native").rglob("*") if p.suffix in (".c", ".h", ".m"))

LAYERS = (
    ("errors", "capabilities", "events", "files", "plot"),
    ("waiting",),
    ("ffi",),
    ("surface", "mapped"),
    ("mil.graph",),
    ("mil.ops",),
    ("mil",),
    ("stages",),
    ("kernel",),
    ("backend",),
    ("probes",),
    ("param", "nn", "tokenizer", "sampler"),
    ("optim", "model", "data", "plugin", "head", "health", "schedule"),
    ("runtime", "blocks"),
    ("boundaries",),
    ("network", "checkpoint", "saver", "dist"),
    ("decode", "formats", "numpy_llama"),
    ("train", "inputs", "sample"),
    ("evaluate", "bench", "estimate", "convert", "inspect", "verify", "doctor"),
    ("report", "options", "scaffold"),
    ("board",),
    ("dashboard",),
    ("commands",),
    ("cli",),
)
"""Bottom to top. A module may import what is below it, and its own room; `a.b` stands for a module or a package."""

ROOMS = {"inputs": "train", "sample": "train", "saver": "checkpoint"}
"""Modules that are one room with another: its other files."""

FILE_LINES, FUNCTION_LINES = 600, 60
FILE_ALLOWANCES: dict[str, tuple[int, str]] = {}
"""path -> (lines, reason): a ceiling is raised by argument, not by accident."""
FUNCTION_ALLOWANCES: dict[str, tuple[int, str]] = {}
"""path:function -> (lines, reason)."""

ONLY = {
    "rich": ("dashboard",),
    "argparse": ("cli",),
    "safetensors": ("checkpoint", "formats"),
    "cffi": (),
}
"""Top-level modules that only these modules of anert may import."""

C_DOORS = ("ffi", "surface", "mapped", "runtime", "backend", "network", "param", "optim", "head", "decode", "bench")
"""Modules that may name a function of the native library (`lib.anert_...`)."""


def name(path: Path) -> str:
    """anert/mil/ops/table.py -> mil.ops.table; the package itself is `mil.ops`."""
    parts = path.relative_to(ROOT / "anert").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def place(module: str) -> tuple[int, str]:
    """(layer, room) of a module, by its longest prefix in LAYERS."""
    found = [
        (rank, prefix)
        for rank, layer in enumerate(LAYERS)
        for prefix in layer
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert found, f"anert.{module} has no place: add it to LAYERS in tests/test_house.py"
    rank, prefix = max(found, key=lambda f: len(f[1]))
    return rank, ROOMS.get(prefix, prefix)


def imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(module, line) of every import that runs, in functions too; those for type checkers alone are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in ast.walk(node):
                child.skipped = True  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if getattr(node, "skipped", False):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            source = node.module or ""
            if source == "anert":
                yield from ((f"anert.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield source, node.lineno


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def test_imports_point_downwards() -> None:
    wrong = []
    for path in SOURCES:
        if name(path) in ("__init__", "__main__"):
            continue
        rank, room = place(name(path))
        for module, line in imports(parsed(path)):
            if not module.startswith("anert.") or module in ("anert.__version__", "anert._native"):
                continue
            below, other = place(module.removeprefix("anert."))
            if below >= rank and other != room:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}, which is not below it")
    assert not wrong, "\n".join(wrong)


def test_heavy_modules_stay_in_their_rooms() -> None:
    wrong = []
    for path in SOURCES:
        module = name(path)
        for found, line in imports(parsed(path)):
            rooms = ONLY.get(found.partition(".")[0])
            if rooms is not None and not any(module == room or module.startswith(room + ".") for room in rooms):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {found}: only {', '.join(rooms)} may")
    assert not wrong, "\n".join(wrong)


def test_the_native_library_is_called_through_few_doors() -> None:
    wrong = []
    for path in SOURCES:
        if not any(name(path) == door or name(path).startswith(door + ".") for door in C_DOORS):
            lines = path.read_text("utf-8").splitlines()
            wrong += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if "lib.anert_" in line]
    assert not wrong, "native calls outside the doors: " + ", ".join(wrong)


def test_nothing_prints_but_the_command_line() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if name(path).partition(".")[0] != "cli"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, "print outside cli: " + ", ".join(wrong)


def test_plugins_import_public_names_only() -> None:
    for path in PLUGINS:
        for module, line in imports(parsed(path)):
            if module.partition(".")[0] == "anert":
                public = module.removeprefix("anert.")
                assert public in anert.__all__, f"{path.name}:{line} imports {module}: anert's public names are enough"


def test_every_public_name_is_there() -> None:
    for public in anert.__all__:
        assert getattr(anert, public) is not None
    with pytest.raises(AttributeError, match="no public name 'Stories': it has"):
        _ = anert.Stories
    assert set(anert.__all__) == set(dir(anert))


# ---- ceilings ----


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function; in C those whose body ends with a brace in the first column."""
    if path.suffix == ".py":
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.name, (node.end_lineno or 0) - node.lineno + 1
        return
    start, title = 0, ""
    for i, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        head = re.match(r"(?!typedef|struct \w+ \{|enum|#)(?:\w[\w\s\*]*[\s\*])?(\w+)\(", line)
        if head:
            start, title = i, head.group(1)
        elif line.startswith("}") and start:
            yield title, i - start + 1
            start = 0


def test_files_stay_under_their_ceiling() -> None:
    files = [*SOURCES, *PLUGINS, *NATIVE, *sorted((ROOT / "tests").rglob("*.py")), ROOT / "build_ffi.py"]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text("utf-8").splitlines())) > FILE_LINES}
    over = {path: n for path, n in long.items() if n > FILE_ALLOWANCES.get(path, (FILE_LINES, ""))[0]}
    assert not over, f"over {FILE_LINES} lines: {over}"
    assert set(FILE_ALLOWANCES) <= set(long), "an allowance that is not needed any more: remove it"


def test_functions_stay_under_their_ceiling() -> None:
    long: dict[str, int] = {}
    for path in [*SOURCES, *PLUGINS, *NATIVE, ROOT / "build_ffi.py"]:
        for title, lines in functions(path):
            if lines > FUNCTION_LINES:
                long[f"{path.relative_to(ROOT)}:{title}"] = lines
    over = {f: n for f, n in long.items() if n > FUNCTION_ALLOWANCES.get(f, (FUNCTION_LINES, ""))[0]}
    assert not over, f"over {FUNCTION_LINES} lines: {over}"
    assert set(FUNCTION_ALLOWANCES) <= set(long), "an allowance that is not needed any more: remove it"


def test_the_ceiling_test_sees_c_functions(tmp_path: Path) -> None:
    text = "static int\nhelper(int a)\n{\n" + "    a++;\n" * 70 + "}\n\nint add(int a, int b) {\n    return a + b;\n}\n"
    path = tmp_path / "x.c"
    path.write_text(text + "typedef struct {\n    int a;\n} anert_pair;\n")
    assert dict(functions(path)) == {"helper": 73, "add": 3}


# ---- importing does nothing ----


def probe(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return result.stdout.strip()


def test_importing_anert_loads_nothing_heavy_and_starts_no_thread() -> None:
    code = "import anert, sys, threading; print(sorted({'numpy', 'rich', 'cffi', 'argparse'} & set(sys.modules)), "
    assert probe(code + "threading.active_count(), 'anert._native' in sys.modules)") == "[] 1 False"


def test_importing_every_module_opens_no_engine() -> None:
    modules = sorted(f"anert.{name(p)}" for p in SOURCES if name(p) not in ("__init__", "__main__"))
    code = f"import importlib, sys, threading\nfor m in {modules!r}: importlib.import_module(m)\n"
    assert probe(code + "print(threading.active_count(), 'anert._native' in sys.modules, 'rich' in sys.modules)") == (
        "1 False False"
    )


def test_help_answers_at_once() -> None:
    """Median of five under 200 ms of processor time: wall time would measure what else the machine does."""
    import resource

    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "anert", "--help"], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(times) < 0.2, times


def test_every_dependency_is_bounded() -> None:
    """By the next major at most: what nobody has tried is not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    found = [*project["build-system"]["requires"], *project["project"]["dependencies"], *(r for e in extras for r in e)]
    assert len(found) >= 20
    assert [r for r in found if not re.search(r">=[\d.]+,<\d+(;|$)|==[\d.]+$", r.replace(" ", ""))] == []
