"""A directory of token files that are one: shards, a note beside each, and a manifest once all are there.

shard-00007.bin (and .val.bin) have shard-00007.json beside them, written last: what it was made of, and sizes. Whoever
finds every note there writes manifest.json.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from anert.data import token_file
from anert.data.token_file import TokenFile, Tokens
from anert.errors import InputError
from anert.files import publish, sha256

MANIFEST = "manifest.json"
FORMAT = "anert token shards"
VERSION = 1
ENTRY = {"name": str, "part": str, "tokens": int, "dtype": str, "raw": bool, "bytes": int, "sha256": str}
"""What notes and the manifest say of each file."""


class Joined:
    """Several arrays of ids as one: what TokenDataset needs of an array. A slice within one of them is a view."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self._parts = [p for p in parts if len(p)]
        self._ends = np.cumsum([len(p) for p in self._parts], dtype=np.int64)
        self.dtype = np.result_type(*parts) if parts else np.dtype("<u2")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            part, at = self._find(range(len(self))[key])
            return self._parts[part][at]
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise IndexError("joined token files are cut without a step")
        if start >= stop:
            return np.zeros(0, self.dtype)
        (first, a), (last, b) = self._find(start), self._find(stop - 1)
        if first == last:
            return self._parts[first][a : b + 1]
        return Joined([self._parts[first][a:], *self._parts[first + 1 : last], self._parts[last][: b + 1]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self._parts, dtype=dtype or self.dtype)

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, "right"))
        return part, index - int(self._ends[part] - len(self._parts[part]))


def note_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file or none. Raises InputError where the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        publish(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot write: {e.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_note(shard: Path) -> dict[str, Any] | None:
    """The note beside a finished shard, or None where it is not finished (or its files are not as the note says)."""
    try:
        note = json.loads(note_path(shard).read_text("utf-8"))
        whole = all((shard.parent / f["name"]).stat().st_size == f["bytes"] and f["sha256"] for f in note["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return note if whole else None


def write_manifest(directory: Path, about: Mapping[str, Any], notes: Sequence[Mapping[str, Any]]) -> Path:
    """Write manifest.json of finished shards; returns its path."""
    files = [f for note in notes for f in note["files"]]
    totals = {key: sum(note[key] for note in notes) for key in ("tokens", "val_tokens", "documents", "bytes")}
    path = directory / MANIFEST
    write_json(path, {"format": FORMAT, "version": VERSION, **about, **totals, "files": files})
    return path


def is_shards(path: Path) -> bool:
    return path.is_dir() or path.name == MANIFEST


def sniff(path: Path | str) -> str:
    """`token_file.sniff`, and `shards` for a directory or a manifest."""
    return "shards" if is_shards(Path(path)) else token_file.sniff(path)


def open_tokens(path: Path | str, dtype: str = "auto") -> TokenFile:
    """Map a token file or a directory of shards. dtype: of a file of raw ids. Raises InputError as
    `token_file.open_tokens` and `open_shards`."""
    return open_shards(path) if is_shards(Path(path)) else token_file.open_tokens(path, dtype)


def read_manifest(path: Path | str) -> tuple[Path, dict[str, Any]]:
    """(manifest.json of a directory of shards, or that file itself; its content). Raises InputError: not finished,
    damaged, or of a newer anert."""
    path = Path(path)
    manifest = path / MANIFEST if path.is_dir() else path
    directory = manifest.parent
    if not manifest.is_file():
        n = len(list(directory.glob("shard-*.json")))
        raise InputError(
            f"{directory}: no {MANIFEST}, {n} shards finished: run the same `anert tokenize` again until it is whole"
            if n
            else f"{directory}: a directory without {MANIFEST}: not token shards"
        )
    try:
        content = json.loads(manifest.read_text("utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise InputError(f"{manifest}: version {content['version']}, this anert reads {VERSION}: update anert")
        whole = all(type(content[key]) is int for key in ("vocab_size", "bos_id", "eos_id", "documents"))
        whole &= type(content["tokenizer_hash"]) is str
        for f in content["files"]:
            whole &= all(type(f[key]) is kind for key, kind in ENTRY.items())
            whole &= f["dtype"] in ("uint16", "uint32") and Path(f["name"]).name == f["name"]
        if not whole:
            raise ValueError("an entry is not as anert writes it")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{manifest}: damaged ({type(e).__name__}: {e}): tokenize again") from None
    return manifest, content


def open_shards(path: Path | str, part: str = "train") -> TokenFile:
    """Map the shards of a directory (or its manifest). part: `train` or `val`, whose tokens may be none.

    Sizes and headers are checked; `damaged` reads all of the files. Raises InputError: not finished, damaged, or with a
    shard missing or changed.
    """
    manifest, content = read_manifest(path)
    digest = content["tokenizer_hash"]
    files = [f for f in content["files"] if f["part"] == part]
    tokens = cast(Tokens, Joined([_tokens(manifest.parent, f, digest) for f in files]))
    about = content["vocab_size"], content["bos_id"], content["eos_id"]
    return TokenFile(manifest.parent, "shards", tokens, *about, digest)


def damaged(path: Path | str) -> Iterator[tuple[str, str, int]]:
    """Read every byte of every shard: (name, what is wrong or "", bytes) in the manifest's order. Raises InputError
    where the manifest itself cannot be read."""
    manifest, content = read_manifest(path)
    for entry in content["files"]:
        yield entry["name"], difference(manifest.parent, entry), entry["bytes"]


def difference(directory: Path, entry: Mapping[str, Any]) -> str:
    """What distinguishes a file from its entry in a note or manifest; "" if nothing does."""
    path = directory / entry["name"]
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size:,} bytes, {entry['bytes']:,} expected"
        return "" if sha256(path) == entry["sha256"] else "its sha256 is not the one that was written down"
    except FileNotFoundError:
        return "missing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _tokens(directory: Path, entry: Mapping[str, Any], digest: str) -> Tokens:
    """The ids of one file. Raises InputError where size or header is not as the manifest says."""
    path, dtype = directory / entry["name"], np.dtype(entry["dtype"]).newbyteorder("<")
    size = path.stat().st_size if path.is_file() else -1
    again = f"delete {note_name(path)} and tokenize again"
    if size != entry["bytes"]:
        state = "missing" if size < 0 else f"{size:,} bytes, {entry['bytes']:,} expected"
        raise InputError(f"{path}: {state}: {again}")
    if entry["raw"]:
        if size != entry["tokens"] * dtype.itemsize:
            raise InputError(f"{path}: {size:,} bytes are not {entry['tokens']:,} ids of {dtype.name}: {again}")
        return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)
    file = token_file.open_tokens(path)
    found = file.kind, len(file.tokens), file.tokens.dtype, file.tokenizer_hash
    if found != ("anert", entry["tokens"], dtype, digest):
        raise InputError(f"{path}: its header is not what {MANIFEST} says: {again}")
    return file.tokens


def note_name(path: Path) -> str:
    """Name of the note beside a shard's file."""
    return f"{path.name.partition('.')[0]}.json"
