"""Packaging: the sdist builds again from itself, its wheel is one for all CPythons, and what is installed runs.

Slow (it builds the native core and makes a virtual environment), and it asks the package index for the dependencies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import anert

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.xdist_group("packaging")]

USE = """
import anert, sys
from anert import ffi
from anert.surface import Heap, Surface
import numpy as np
s = Surface(Heap(), 1 << 16)
print(anert.__version__, ffi.load().__class__.__name__, anert.__file__)
"""
"""What an installed anert must do: load its native core and get memory from it."""


def run(*command: object, cwd: Path, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ANERT_NATIVE", "VIRTUAL_ENV")}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


def tracked() -> list[str]:
    """The files of the repository, or of the sdist that these tests were unpacked from."""
    if (ROOT / ".git").exists():
        return run("git", "ls-files", cwd=ROOT).split("\n")[:-1]
    return [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file() and "egg-info" not in str(p)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a fresh clone has them: no build output."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in tracked():
        if (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build.__main__", reason="pip install 'anert[dev]' brings the build front end")
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, checkout, cwd=checkout)
    (found,) = out.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (found,) = out.iterdir()
    return found


def build_wheel(sources: Path, out: Path) -> Path:
    """Dated 2020-09-13, as far as SOURCE_DATE_EPOCH is heeded."""
    command = (sys.executable, "-m", "build", "--wheel", "--outdir", out, sources)
    run(*command, cwd=sources, SOURCE_DATE_EPOCH="1600000000")
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist's own files."""
    return build_wheel(unpacked, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new virtual environment that has the wheel and its dependencies."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", wheel, cwd=folder)
    return python


def test_the_sdist_has_all_that_building_and_testing_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {f for f in tracked() if f.split("/")[0] in ("anert", "native", "plugins", "tests", ".ci")}
    wanted |= {"pyproject.toml", "build_ffi.py", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"}
    assert not wanted - names
    assert not {n for n in names if re.search(r"\.(so|o|pyc|bin|safetensors)$|__pycache__", n)}


def test_the_wheel_is_one_a_platform_and_holds_the_package_alone(wheel: Path) -> None:
    assert re.fullmatch(rf"anert-{re.escape(anert.__version__)}-cp311-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {n.split("/")[0] for n in names}
    assert tops == {"anert", f"anert-{anert.__version__}.dist-info"}
    sources = {f for f in tracked() if f.startswith("anert/")}
    assert sources <= names
    extensions = {n for n in names - sources if n.startswith("anert/")}
    assert "anert/_native.abi3.so" in extensions and all(n.endswith(".abi3.so") for n in extensions)


def test_another_build_of_the_wheel_has_the_same_bytes(unpacked: Path, wheel: Path, tmp_path: Path) -> None:
    """The same sources in a folder of another name, at another time."""
    sources = tmp_path / "elsewhere"
    derived = shutil.ignore_patterns("build", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(unpacked, sources, ignore=derived)
    again = build_wheel(sources, tmp_path / "dist")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        different = [n for n in one.namelist() if n not in other.namelist() or one.read(n) != other.read(n)]
    assert different == [] and wheel.read_bytes() == again.read_bytes()


def test_the_installed_wheel_runs_its_native_core(python: Path, tmp_path: Path) -> None:
    version, _, where = run(python, "-c", USE, cwd=tmp_path).split()
    assert version == anert.__version__ and str(python.parents[1]) in where
    assert run(python, "-m", "anert", "--version", cwd=tmp_path).split() == ["anert", anert.__version__]
    assert run(python.parent / "anert", "new", "demo", cwd=tmp_path).startswith("wrote demo.py")
    assert re.search(r"demo +ok +tiny, small", run(python.parent / "anert", "plugins", "demo.py", cwd=tmp_path))
    assert run(python, "-m", "pip", "check", cwd=tmp_path).startswith("No broken requirements")


def test_an_editable_install_runs_from_the_sources(python: Path, checkout: Path, tmp_path: Path) -> None:
    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", checkout, cwd=tmp_path)
    _, _, where = run(python, "-c", USE, cwd=tmp_path).split()
    assert where == str(checkout / "anert" / "__init__.py")


def test_without_a_c_compiler_the_build_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "build_ffi.py", "--out", str(tmp_path)]
    env = {**os.environ, "CC": "/nonexistent/cc"}
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert "needs a C compiler" in result.stderr and "apt install gcc" in result.stderr
    assert "Traceback" not in result.stderr


ANSWERS = {
    "clean": ('{"dependencies": [{"name": "numpy", "version": "2", "vulns": []}]}', 0, "no known advisory"),
    "known": ('{"dependencies": [{"name": "numpy", "vulns": [{"id": "PYSEC-1"}, {"id": "PYSEC-2"}]}]}', 1,
              "PYSEC-1, PYSEC-2"),
    "unknown": ('{"dependencies": [{"name": "numpy", "skip_reason": "not found"}]}', 0, "not found"),
    "silent": ("", 0, "no answer about"),
}  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_advisory_fails_and_silence_claims_nothing(tmp_path: Path, answer: str) -> None:
    text, code, said = ANSWERS[answer]
    (tmp_path / "pip_audit.py").write_text(f"print({text!r})")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / "audit")], env=env, capture_output=True, text=True)
    assert (done.returncode, said in done.stdout) == (code, True), done.stdout + done.stderr
