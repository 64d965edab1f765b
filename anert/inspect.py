"""`anert inspect`: what a file or directory is: a model of any format, tokens, a tokenizer, a weight blob, text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anert.errors import InputError


def inspect(path: Path, arch: str = "", dtype: str = "auto") -> dict[str, Any]:
    """Facts by name, `kind` and `format` first. dtype: of raw token ids. Raises InputError with the best guess's
    reason for a damaged file."""
    from anert.formats import find, open_model_file
    from anert.formats.base import size_of

    found = find(path)
    if found is not None:
        options: dict[str, Any] = {"arch": arch} if arch else {}
        return _model(open_model_file(path, **options), found.title, path)
    for look in (_blob, _tensors, functools.partial(_tokens, dtype=dtype), _tokenizer):
        if facts := look(path):
            return {"path": str(path), "bytes": size_of(path), **facts}
    open_model_file(path)  # says why it is no model
    raise AssertionError("a file that no reader knows is refused by the last one")


def _model(model: Any, title: str, path: Path) -> dict[str, Any]:
    from anert.formats.base import size_of

    facts = {
        "path": str(path), "kind": "model", "format": model.format, "title": title,
        "architecture": "llama" if "n_heads" in model.config else str(model.about.get("plugin", "")),
        "config": model.config, "parameters": model.tensors.n_params, "tensors": len(model.tensors),
        "encodings": model.tensors.encodings(), "bytes": size_of(path),
        **{key: value for key, value in model.about.items() if value != ""},
    }  # fmt: skip
    if model.step >= 0:
        facts["step"] = model.step
    if model.format == "anert" and path.is_dir():
        facts["steps"] = sorted(int(p.name[5:]) for p in path.glob("step-*") if p.name[5:].isdigit()) or [model.step]
        facts["from"] = str(model.path)
    if model.tokenizer is not None:
        facts["tokenizer"] = model.tokenizer_name
    return facts | ({"notes": model.notes} if model.notes else {})


def _blob(path: Path) -> dict[str, Any]:
    from anert.mil.blob import list_blobs

    if path.is_dir():
        return {}
    blobs = list_blobs(path.read_bytes()) if _starts(path, 68)[64:] == b"\xef\xbe\xad\xde" else []
    rows = [{"offset": offset, "dtype": dtype, "bytes": size} for offset, dtype, size in blobs]
    return {"kind": "weight blob", "format": "MIL blob storage 2", "blobs": len(rows), "list": rows} if rows else {}


def _tensors(path: Path) -> dict[str, Any]:
    """A safetensors file on its own, which has no config."""
    from anert.formats import tensor_file

    if path.is_dir() or _starts(path, 9)[8:] != b"{" or path.suffix != ".safetensors":
        return {}
    entries = tensor_file.read(path)
    shapes = {name: [e.encoding, list(e.shape)] for name, e in entries.items()}
    return {"kind": "tensors", "format": "safetensors", "tensors": len(entries), "list": shapes}


def _tokens(path: Path, dtype: str = "auto") -> dict[str, Any]:
    from anert import data
    from anert.data import shards
    from anert.formats import llama2c

    if shards.is_shards(path):
        return _shards(path) if path.name == shards.MANIFEST or (path / shards.MANIFEST).is_file() else {}
    if (kind := data.sniff(path)) == "text":
        return {}
    if kind == "raw":  # which anything may be
        if _tokenizer(path):
            return {}
        if why := llama2c.nearly(path, _starts(path, llama2c.HEADER.size)):
            raise InputError(why)
    found = data.open_tokens(path, dtype)
    titles = {
        "anert": "anert token file",
        "llm.c": "llm.c token file",
        "raw": f"raw {found.tokens.dtype.name} (as llama2.c, maderix and nanoGPT write)",
    }
    facts = {
        "kind": "tokens", "format": titles[kind], "tokens": len(found.tokens), "dtype": str(found.tokens.dtype),
        "largest_id": max((int(found.tokens[i : i + (1 << 22)].max()) for i in range(0, len(found.tokens), 1 << 22)),
                          default=-1),
    }  # fmt: skip
    if found.note:
        facts["note"] = found.note
    if kind == "anert":
        documents = 0 if found.documents is None else len(found.documents)
        facts |= {"vocab_size": found.vocab_size, "bos_id": found.bos_id, "eos_id": found.eos_id,
                  "documents": documents, "tokenizer_hash": found.tokenizer_hash}  # fmt: skip
    return facts


def _shards(path: Path) -> dict[str, Any]:
    from anert.data.shards import open_shards, read_manifest

    manifest, content = read_manifest(path)
    train, val = (open_shards(path, part) for part in ("train", "val"))
    names = ("vocab_size", "bos_id", "eos_id", "documents", "tokenizer_hash")
    return {
        "kind": "tokens", "format": "anert token shards", "tokens": len(train.tokens), "val_tokens": len(val.tokens),
        "dtype": str(train.tokens.dtype), "shards": sum(f["part"] == "train" for f in content["files"]),
        **{name: content[name] for name in names},
        "checked": f"sizes and headers; anert verify tokens {manifest.parent} reads every byte",
    }  # fmt: skip


def _tokenizer(path: Path) -> dict[str, Any]:
    from anert.tokenizer import load_tokenizer

    try:
        t = load_tokenizer(path)
    except InputError:
        return _text(path)
    return {
        "kind": "tokenizer", "format": f"{t.kind} tokenizer", "vocab_size": t.vocab_size, "bos_id": t.bos_id,
        "eos_id": t.eos_id, "hash": t.hash,
    }  # fmt: skip


def _text(path: Path) -> dict[str, Any]:
    from anert import data

    looks: Callable[[Path], str] = data.sniff
    return {} if path.is_dir() or looks(path) != "text" else {"kind": "text", "format": "UTF-8 text"}


def _starts(path: Path, n: int) -> bytes:
    with open(path, "rb") as f:
        return f.read(n)
