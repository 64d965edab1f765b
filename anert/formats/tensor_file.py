"""Safetensors files as mapped tensors. The package checks the header; the views are ours, because NumPy has no bfloat16
and a model should not be read twice to be written once.

Format: u64 length, that many bytes of JSON (name -> dtype, shape, data_offsets; `__metadata__`: text), then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from anert.errors import InputError
from anert.formats.base import Array, Entry, map_bytes, narrow_bf16, widen_bf16, writing

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
ENCODINGS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""Our names of the dtypes that a file is written in -> safetensors'."""


def read(path: Path) -> dict[str, Entry]:
    """Tensors of a file; bfloat16 comes widened to fp32. Raises InputError for a damaged file; ones that are neither
    fp32, fp16 nor bf16 raise it when they are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # offsets, sizes and overlaps against the file's length
            pass
        data = map_bytes(path)
        length = int.from_bytes(data[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(data[8 : 8 + length].tobytes())
    except (SafetensorError, OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: damaged safetensors file: {e}: get it again") from None
    header.pop("__metadata__", None)
    base = 8 + length
    return {n: _entry(path, n, t["dtype"], tuple(t["shape"]), data, base, t["data_offsets"]) for n, t in header.items()}


def _entry(
    path: Path, name: str, encoding: str, shape: tuple[int, ...], data: Array, base: int, span: list[int]
) -> Entry:
    def view() -> Array:
        if encoding not in DTYPES:
            raise InputError(f"{path}: {name} is {encoding}; anert reads {', '.join(DTYPES)}")
        raw = np.frombuffer(data, DTYPES[encoding], math.prod(shape), base + span[0]).reshape(shape)
        return widen_bf16(raw) if encoding == "BF16" else raw

    return Entry(shape, encoding, view)


def write(path: Path, tensors: Iterable[tuple[str, tuple[int, ...]]], source: Mapping[str, Array], dtype: str) -> int:
    """Write tensors (name, shape) out of `source`, one in memory at a time; returns the bytes of data. dtype: `fp32`,
    `fp16` (InputError for a value past 65504) or `bf16`."""
    encoding = ENCODINGS[dtype]
    width = np.dtype(DTYPES[encoding]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    listed = list(tensors)
    for name, shape in listed:
        end = at + math.prod(shape) * width
        header[name] = {"dtype": encoding, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with writing(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, _ in listed:
            f.write(encoded(source[name], dtype, name).data)
    return at


def encoded(values: Array, dtype: str, name: str) -> Array:
    """Values as a file holds them in this dtype, C order."""
    if dtype == "bf16":
        return narrow_bf16(values)
    if dtype == "fp16" and values.dtype != np.float16:
        with np.errstate(over="ignore"):
            half = values.astype("<f2")
        if np.isinf(half).any() and np.isfinite(values).all():
            raise InputError(f"{name} has values past 65504, which fp16 cannot hold: take --dtype bf16 or fp32")
        return np.ascontiguousarray(half)
    return np.ascontiguousarray(values, DTYPES[ENCODINGS[dtype]])
