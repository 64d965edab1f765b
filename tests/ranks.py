"""Starts several ranks of a test's own program, or of anert, as `mpiexec -n N python -m mpi4py` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def mpiexec() -> str:
    """The launcher beside this Python (extra `mpi`)."""
    pytest.importorskip("mpi4py", reason="pip install -e '.[mpi]'")
    found = str(MPIEXEC) if MPIEXEC.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec: pip install -e '.[mpi]'")
    return found


def start(n: int, *arguments: str, program: Path | None = None, env: dict[str, str] | None = None, **more: Any
          ) -> subprocess.Popen[str]:  # fmt: skip
    """`n` ranks of `python -m anert`, or of a program."""
    what = [str(program)] if program else ["-m", "anert"]
    command = [mpiexec(), "-n", str(n), sys.executable, "-m", "mpi4py", *what, *arguments]
    paths = os.pathsep.join([str(ROOT), str(HERE)])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths, **(env or {})}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)  # fmt: skip


def run(n: int, *arguments: str, program: Path | None = None, timeout: float = 120, **more: Any
        ) -> subprocess.CompletedProcess[str]:  # fmt: skip
    process = start(n, *arguments, program=program, **more)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
