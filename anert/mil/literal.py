"""Literals of MIL text, both ways: arrays and Python constants <-> `[0x1p-3, -inf]`, `true`, `"same"`.

Floats are printed as Apple prints them: shortest C99 hex form, lower case, normalised (`0x1p-24` for a half's least).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from anert.mil.graph import DTYPES
from anert.mil.syntax import Blob, Compound, Literal, quote, unquote

_CHUNK = 1 << 20
"""Characters of a literal that are converted at a time: bounds the memory that the split takes."""
_OPEN = str.maketrans("[]", "  ")
_SKELETON = {code: None for code in range(128) if chr(code) not in "[],"}
_RANGES = {name: (int(np.iinfo(t).min), int(np.iinfo(t).max)) for name, t in DTYPES.items() if t.kind in "iu"}
_BOOLS = {"true": True, "false": False}


def hex_float(value: float) -> str:
    """A float as MIL text: `0x1.8p+1`, `-0x0p+0`, `inf`, `-inf`, `nan`."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    mantissa, exponent = value.hex().split("p")
    return f"{mantissa.rstrip('0').rstrip('.')}p{exponent}"


def format_scalar(dtype: str, value: Any) -> str:
    """One constant of a MIL scalar type as a token."""
    if dtype == "string":
        return quote(value)
    if dtype == "bool":
        return "true" if value else "false"
    return hex_float(float(value)) if DTYPES[dtype].kind == "f" else str(int(value))


def format_array(array: np.ndarray, dtype: str) -> str:
    """An array as a literal, nested by its shape as coremlc prints it; rank 0 is the bare number."""
    if array.ndim == 0:
        return format_scalar(dtype, array.item())
    if array.size == 0:
        return "[]"
    if array.size > 64:  # fp16 has 65,536 values: print each once
        values, where = np.unique(_bits(array), return_inverse=True)
        words = np.array([format_scalar(dtype, v) for v in values.view(array.dtype).tolist()], object)
        items = words[where.reshape(-1)].tolist()
    else:
        items = [format_scalar(dtype, v) for v in array.reshape(-1).tolist()]
    for axis in range(array.ndim - 1, 0, -1):
        d = array.shape[axis]
        items = [f"[{', '.join(items[i : i + d])}]" for i in range(0, len(items), d)]
    return f"[{', '.join(items)}]"


def _bits(array: np.ndarray) -> np.ndarray:
    """The elements as unsigned integers: -0.0 and 0.0 differ, and a NaN is equal to itself."""
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")


def to_array(literal: Literal, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array that a literal of this type spells: nested as the shape says, or flat. Finite numbers beyond a float
    type's range become infinities, as in C. Raises ValueError with what was expected."""
    assert not isinstance(literal, Blob)
    raw = _flatten(literal) if isinstance(literal, Compound) else literal
    size = math.prod(shape)
    if size == 0:
        if raw.translate(_OPEN).replace(",", "").strip():
            raise ValueError("an empty literal")
        return np.empty(shape, DTYPES[dtype])
    if not shape:
        if raw.startswith(("[", '"')) or not raw:
            raise ValueError("one number")
        return _convert([raw], dtype).reshape(())
    if not raw.startswith("["):
        raise ValueError(f"{size} numbers in brackets")
    _check_nesting(raw, shape, size)
    return _numbers(raw.translate(_OPEN), dtype).reshape(shape)


def to_constant(literal: Literal, dtype: str, shape: tuple[int, ...]) -> Any:
    """A literal as a Python constant: number, bool, str, or tuples of them. Raises ValueError like `to_array`."""
    if dtype == "string":
        return _strings(literal, shape)
    if isinstance(literal, str) and len(shape) < 2:  # most arguments: done without an array
        words = literal[1:-1].split(",") if shape and literal.count("[") == 1 else [literal]
        if len(words) == (shape[0] if shape else 1) and DTYPES[dtype].kind in "iub" and literal:
            plain = _integers(words, dtype) if dtype != "bool" else _booleans(words)
            return tuple(plain) if shape else plain[0]
    return to_tuples(to_array(literal, dtype, shape).tolist())


def _strings(literal: Literal, shape: tuple[int, ...]) -> Any:
    if not shape:
        text = unquote(literal or '""') if isinstance(literal, str) else None
        if text is None:
            raise ValueError("a string in quotes")
        return text
    if not isinstance(literal, Compound) or len(literal.items) != shape[0]:
        raise ValueError(f"{shape[0]} strings in brackets")
    return tuple(_strings(item, shape[1:]) for item in literal.items)


def to_tuples(value: Any) -> Any:
    """Nested lists, as `ndarray.tolist` gives them, as nested tuples."""
    return tuple(to_tuples(v) for v in value) if isinstance(value, list) else value


def _flatten(literal: Literal) -> str:
    """A bracketed literal that the lexer took apart (a comment inside, say), as one token of numbers again."""
    if isinstance(literal, Compound):
        if literal.open != "[":
            raise ValueError("numbers in brackets")
        return f"[{','.join(_flatten(item) for item in literal.items)}]"
    if not isinstance(literal, str) or literal.startswith('"'):
        raise ValueError("numbers in brackets")
    return literal


def _check_nesting(raw: str, shape: tuple[int, ...], size: int) -> None:
    """ValueError unless the brackets and commas are those of the shape, or of a flat list of as many numbers."""
    skeleton = raw.translate(_SKELETON)
    commas = skeleton.count(",")
    if commas == size - 1 and len(skeleton) == commas + 2:
        return
    length = 0  # of the skeleton that the shape asks for, before one that long is built
    for d in reversed(shape):
        length = 2 + d * length + d - 1
    if length == len(skeleton):
        wanted = ""
        for d in reversed(shape):
            wanted = f"[{','.join([wanted] * d)}]"
        if wanted == skeleton:
            return
    raise ValueError(f"{size} numbers nested as {list(shape)}, not {commas + 1} in {skeleton.count('[')} brackets")


def _numbers(body: str, dtype: str) -> np.ndarray:
    """Numbers with commas between them, converted chunk by chunk."""
    chunks, start = [], 0
    while True:
        end = body.find(",", start + _CHUNK)
        chunks.append(_convert(body[start : end if end >= 0 else len(body)].split(","), dtype))
        if end < 0:
            return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        start = end + 1


def _convert(words: list[str], dtype: str) -> np.ndarray:
    target = DTYPES[dtype]
    if target.kind == "b":
        return np.array(_booleans(words), target)
    if target.kind != "f":
        return np.array(_integers(words, dtype), target)
    try:
        floats = [float.fromhex(w) if "x" in w or "X" in w else float(w) for w in words]
    except (ValueError, OverflowError):
        raise ValueError(f"literals of type {dtype}") from None
    with np.errstate(over="ignore"):
        return np.array(floats, target)


def _booleans(words: list[str]) -> list[bool]:
    try:
        return [_BOOLS[w.strip()] for w in words]
    except KeyError:
        raise ValueError("literals of type bool") from None


def _integers(words: list[str], dtype: str) -> list[int]:
    try:
        integers = [int(w) for w in words]
    except ValueError:
        raise ValueError(f"literals of type {dtype}") from None
    low, high = _RANGES[dtype]
    if min(integers) < low or max(integers) > high:
        raise ValueError(f"integers from {low} to {high}")
    return integers
