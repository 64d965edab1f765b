"""Files that outlast a crash: down to the disk before they get their name."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO


def fsync(path: Path) -> None:
    """A file or directory down to the disk; on macOS that takes F_FULLFSYNC (fsync(2))."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)
    finally:
        os.close(fd)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name: whoever finds it there finds all of it, after a crash too."""
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal; read in blocks."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def silence(stream: IO[str]) -> None:
    """What is still to be written to a stream whose reader is gone goes nowhere, the interpreter's last flush too."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
