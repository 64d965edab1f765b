"""Power cuts: what a directory looks like after one, from what tests/forgetful.c kept of every fsync."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

from native_build import compiler

HERE = Path(__file__).parent
SHIM = HERE / "forgetful.c"


def build_shim(folder: Path) -> Path:
    """The preloaded shim, compiled."""
    out = folder / "forgetful.so"
    command = [*compiler(), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(SHIM), "-o", str(out), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


class Disk:
    """A directory under the shim. `env`: what a process needs to be watched; `cut` does what a power cut does."""

    def __init__(self, shim: Path, root: Path, work: Path) -> None:
        self.root, self.shadow, self.refusal = root, work / "shadow", work / "refuse"
        self.shadow.mkdir(parents=True)
        root.mkdir(parents=True, exist_ok=True)
        self.env = {
            "LD_PRELOAD": str(shim),
            "FORGETFUL_ROOT": str(root),
            "FORGETFUL_SHADOW": str(self.shadow),
            "FORGETFUL_FAIL": str(self.refusal),
        }

    def refuse(self, code: int) -> None:
        """Fail every write from now on with this errno; 0: none."""
        part = self.refusal.with_suffix(".part")
        part.write_text(str(code))
        part.replace(self.refusal)

    def cut(self, rng: random.Random | None = None) -> None:
        """Make the root what it may be after a power cut; every process that wrote there must be dead.

        Without `rng` all that was not fsynced is lost. With it each file and directory is what it was at its last
        fsync, or what it is now, or, a file, a part of that.
        """
        now = self._scan()
        rebuilt = self.root.with_name(self.root.name + ".after")
        self._build(key_of(self.root), rebuilt, now, rng)
        shutil.rmtree(self.root)
        rebuilt.rename(self.root)
        # What survived is on the disk: the next process finds it as good as fsynced.
        shutil.rmtree(self.shadow)
        self.shadow.mkdir()
        for path in (self.root, *self.root.rglob("*")):
            if path.is_dir():
                lines = [f"{key_of(p)} {p.name}\n" for p in path.iterdir()]
                (self.shadow / f"dir-{key_of(path)}").write_text("".join(lines))
            else:
                shutil.copyfile(path, self.shadow / f"file-{key_of(path)}")

    def _scan(self) -> dict[str, Path]:
        return {key_of(p): p for p in (self.root, *self.root.rglob("*"))}

    def _build(self, key: str, to: Path, now: dict[str, Path], rng: random.Random | None) -> None:
        live = now.get(key)
        listing, content = self.shadow / f"dir-{key}", self.shadow / f"file-{key}"
        as_now = rng is not None and live is not None and rng.random() < 0.5
        if listing.exists() or (live is not None and live.is_dir()):
            to.mkdir()
            if as_now and live is not None:
                entries = [(key_of(p), p.name) for p in live.iterdir()]
            else:
                entries = [tuple(x.split(" ", 1)) for x in listing.read_text().splitlines()] if listing.exists() else []
            for child, name in entries:
                self._build(child, to / name, now, rng)
        elif as_now and live is not None and rng is not None:
            data = live.read_bytes()
            safe = content.exists() and content.read_bytes() == data
            to.write_bytes(data if safe or rng.random() < 0.5 else data[: rng.randrange(len(data) + 1)])
        else:
            to.write_bytes(content.read_bytes() if content.exists() else b"")


LIBC = ctypes.CDLL(None, use_errno=True)


def key_of(path: Path) -> str:
    """Inode and birth time, as the shim writes them: statx(2), which Python lacks."""
    at_fdcwd, symlink_nofollow, ino_and_btime = -100, 0x100, 0x100 | 0x800
    found = ctypes.create_string_buffer(256)
    if LIBC.statx(at_fdcwd, os.fsencode(path), symlink_nofollow, ino_and_btime, found):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    inode, seconds, nanoseconds = (struct.unpack_from(form, found, at)[0] for form, at in
                                   (("<Q", 32), ("<q", 80), ("<I", 88)))  # fmt: skip
    return f"{inode}-{seconds}.{nanoseconds:09}"
