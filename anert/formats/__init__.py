"""Model files of every kind, by one door: `open_model_file` recognises by content and reads into one form (Pretrained).

A format is a row of FORMATS: how to recognise it, read it, and write it where that can be done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anert.errors import InputError
from anert.formats import blzt, gguf_file, huggingface, llama2c, run_dir
from anert.formats.base import Entry, LlamaConfig, Pretrained, Tensors, read_head

__all__ = ["FORMATS", "WRITABLE", "Entry", "LlamaConfig", "Pretrained", "Tensors", "find", "open_model_file"]

HEAD_BYTES = 256


@dataclass(frozen=True, slots=True)
class Format:
    """title: what `anert inspect` calls it. sniff: (path, first bytes; b"" for a directory) -> whether it is one."""

    title: str
    sniff: Callable[[Path, bytes], bool]
    read: Callable[..., Pretrained]
    writers: tuple[tuple[str, Callable[..., None]], ...] = ()
    """Names that `anert convert --to` takes, with write(path, model, **options)."""
    options: tuple[str, ...] = ()
    """Keyword arguments of read."""
    hashes: bool = False
    """Whether it records sha256 sums, so that read takes `hashed`."""


def _directory(sniff: Callable[[Path], bool]) -> Callable[[Path, bytes], bool]:
    return lambda path, head: not head and sniff(path)


def _file(sniff: Callable[[Path, bytes], bool]) -> Callable[[Path, bytes], bool]:
    return lambda path, head: bool(head) and sniff(path, head)


FORMATS = (
    Format("anert run", _directory(run_dir.sniff), run_dir.read, (("anert", run_dir.write),), hashes=True),
    Format("Hugging Face directory", _directory(huggingface.sniff), huggingface.read, (("hf", huggingface.write),)),
    Format("GGUF", _file(gguf_file.sniff), gguf_file.read),
    Format("BLZT checkpoint", _file(blzt.sniff), blzt.read, options=("arch",)),
    Format(
        "llama2.c checkpoint",
        _file(llama2c.sniff),
        llama2c.read,
        tuple((f"v{version}", partial(llama2c.write, version=version)) for version in range(3)),
    ),
)
"""In the order in which they are tried: magics before v0's arithmetic."""

WRITABLE: dict[str, Callable[..., None]] = {name: write for f in FORMATS for name, write in f.writers}


def find(path: Path) -> Format | None:
    """The format of a file or directory; None for none of these. Raises InputError: missing, unreadable, empty."""
    path, head = _head(path)
    return next((f for f in FORMATS if f.sniff(path, head)), None)


def open_model_file(path: Path | str, hashed: bool = True, **options: Any) -> Pretrained:
    """Read a model of any format. hashed: check sha256 sums where the format records any. options: what only its format
    takes (`arch` of BLZT). Raises InputError, one line."""
    path, head = _head(Path(path))
    for f in FORMATS:
        if f.sniff(path, head):
            if surplus := options.keys() - set(f.options):
                raise InputError(f"{path}: a {f.title} has no choice of --{min(surplus)}: leave it out")
            return f.read(path, **options, **({"hashed": hashed} if f.hashes else {}))
    if not head:
        raise InputError(f"{path}: no model in this directory (a run's step-*, or a Hugging Face config.json)")
    if why := llama2c.nearly(path, head):
        raise InputError(why)
    known = ", ".join(f.title for f in FORMATS)
    raise InputError(f"{path}: not a model that anert knows ({known}): anert inspect FILE tells what it is")


def _head(path: Path) -> tuple[Path, bytes]:
    """The path, or what a run's pointer file leads to, and a file's first bytes."""
    if path.name in ("last", "best") and path.is_file() and any(path.parent.glob("step-*")):
        from anert import checkpoint

        return checkpoint.pointed(path), b""
    if path.is_dir():
        return path, b""
    return path, read_head(path, HEAD_BYTES)[0]
