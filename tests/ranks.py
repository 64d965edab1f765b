"""Starts several ranks of a test's own program, or of anert, as `mpiexec -n N python -m mpi4py` does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
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


def start(n: int, *arguments: str, program: Path | None = None, env: dict[str, str] | None = None,
          hosts: Hosts | None = None, **more: Any) -> subprocess.Popen[str]:  # fmt: skip
    """`n` ranks of `python -m anert`, or of a program; on one machine, or on the `hosts`."""
    what = [str(program)] if program else ["-m", "anert"]
    launcher = [*hosts.enter(0), mpiexec(), *hosts.launcher] if hosts else [mpiexec()]
    command = [*launcher, "-n", str(n), sys.executable, "-m", "mpi4py", *what, *arguments]
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


class Hosts:
    """Two network namespaces joined by a wire: two machines, as far as MPI can see. Needs root."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"anert{os.getpid()}{x}" for x in "ab"]
        self.folder = folder
        ssh = folder / "ssh"
        cases = " ".join(f"10.77.0.{i}) ns={name};;" for i, name in enumerate(self.names, 1))
        ssh.write_text(f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
case $host in {cases} esac
exec ip netns exec $ns sh -c "$*"
""")
        ssh.chmod(0o755)
        self.launcher = ["-launcher", "ssh", "-launcher-exec", str(ssh), "-iface", "eth0",
                         "-hosts", "10.77.0.1,10.77.0.2"]  # fmt: skip
        self.env = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
        """MPICH's transport must not find that both are one machine and share memory."""

    def __enter__(self) -> Hosts:
        a, b = self.names
        for name in self.names:
            self._ip("netns", "add", name)
        self._ip("-n", a, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b)
        for i, name in enumerate(self.names, 1):
            self._ip("-n", name, "link", "set", "lo", "up")
            self._ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
            self._ip("-n", name, "link", "set", "eth0", "up")
        for name in self.names:
            while "state UP" not in self._ip("-n", name, "link", "show", "eth0"):
                time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self._ip("netns", "del", name)

    def cut(self) -> None:
        """Pull the wire: nothing arrives, and nobody is told."""
        self._ip("-n", self.names[1], "link", "set", "eth0", "down")

    def enter(self, host: int) -> list[str]:
        """What a command begins with that runs on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    @staticmethod
    def _ip(*arguments: str) -> str:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
        return done.stdout


def namespaces() -> bool:
    """Whether network namespaces can be made here."""
    if os.geteuid() or shutil.which("ip") is None:
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
