"""Weight-blob files (MIL blob storage version 2), both ways. Format: coremltools MILBlob, little endian.

File: u32 count, u32 version = 2, zeros to 64. Per blob, 64-aligned: u32 0xDEADBEEF, u32 dtype, u64 bytes, u64 offset of
the data, u64 bits of padding, zeros to 64, then the data. MIL's `offset` is the metadata's in the file, not the data's.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np

from anert.errors import InputError
from anert.mil.graph import DTYPES, mil_dtype

DEFAULT_PATH = "@model_path/weights/weight.bin"
ALIGNMENT = 64
"""Where metadata and data begin in files that we write."""
READ_ALIGNMENT = 16
"""Where they may begin in files that we read: Espresso's generator packs blobs without padding."""
SENTINEL = 0xDEADBEEF

_FILE = struct.Struct("<II56x")
_BLOB = struct.Struct("<IIQQQ32x")
_CODES = {
    "fp16": 1, "fp32": 2, "uint8": 3, "int8": 4, "bf16": 5, "int16": 6, "uint16": 7, "int4": 8, "uint1": 9,
    "uint2": 10, "uint4": 11, "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15, "fp8e4m3fn": 16, "fp8e5m2": 17,
}  # fmt: skip
_NAMES = {code: name for name, code in _CODES.items()}
_NARROW = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
"""Types of less than a byte and their bits; in NumPy they are int8 or uint8."""


def storable(dtype: str) -> bool:
    """Whether a blob file has a code for this MIL type and we read and write it; the rest stays in the text."""
    return dtype in _CODES and not dtype.startswith("fp8")


class BlobWriter:
    """One weight file in the making: `add` arrays, then take `bytes()`; `path` is how MIL text refers to it."""

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        self.path = path
        self._parts: list[bytes] = []
        self._size = _FILE.size
        self._count = 0

    def add(self, array: np.ndarray, dtype: str | None = None) -> int:
        """Append an array, C order; returns the offset that MIL text names. `dtype` names a type that NumPy lacks:
        a sub-byte integer (values in int8 or uint8) or bf16 (rounded to nearest even). InputError if it has no code."""
        dtype = dtype or mil_dtype(array.dtype)
        if not storable(dtype):
            raise InputError(f"a weight blob cannot hold {dtype}: print it inline")
        data, padding = _pack(array, dtype)
        offset = self._size
        self._parts.append(_BLOB.pack(SENTINEL, _CODES[dtype], len(data), offset + _BLOB.size, padding))
        self._parts.append(data)
        self._parts.append(bytes(-len(data) % ALIGNMENT))
        self._size += _BLOB.size + len(data) + len(self._parts[-1])
        self._count += 1
        return offset

    def place(self, name: str, array: np.ndarray) -> tuple[str, int]:
        """Where the printer puts the constant `name`: (path, offset)."""
        return self.path, self.add(array)

    def files(self) -> dict[str, bytes]:
        """path -> contents, as `parse` and the backends take weights."""
        return {self.path: self.bytes()} if self._count else {}

    def bytes(self) -> bytes:
        """The file; its tail is not padded, as Apple's writer leaves it."""
        return _FILE.pack(self._count, 2) + b"".join(self._parts[:-1])


class BlobDirectory:
    """A weight file per constant, `<folder>/<name>.bin`: the form that the M1's compiler accepts (ane_facts 1.7)."""

    def __init__(self, folder: str = "@model_path/weights") -> None:
        self.folder = folder
        self._writers: dict[str, BlobWriter] = {}

    def place(self, name: str, array: np.ndarray) -> tuple[str, int]:
        """Where the printer puts the constant `name`: (path, offset)."""
        path = f"{self.folder}/{name}.bin"
        writer = self._writers.setdefault(path, BlobWriter(path))
        return writer.place(name, array)

    def files(self) -> dict[str, bytes]:
        """path -> contents, as `parse` and the backends take weights."""
        return {path: writer.bytes() for path, writer in self._writers.items()}


def read_blob(
    data: bytes | memoryview, offset: int, dtype: str, shape: Sequence[int], source: str = "weight file"
) -> np.ndarray:
    """The array whose metadata lies at `offset`: a read-only view of `data`; sub-byte integers are unpacked into uint8
    or int8, bf16 is widened to float32. InputError in one line for whatever does not fit; nothing is allocated for
    a size that a header only claims."""
    if not storable(dtype):
        raise InputError(f"{source}: blobs of type {dtype} are not read")
    total = len(data)
    _check_file(data, source)
    where = f"{source}, blob at offset {offset}"
    if offset < _FILE.size or offset % READ_ALIGNMENT or offset + _BLOB.size > total:
        raise InputError(f"{where}: expected metadata at a multiple of 16 from 64 to {total - _BLOB.size}")
    sentinel, code, size, start, padding = _BLOB.unpack_from(data, offset)
    if sentinel != SENTINEL:
        raise InputError(f"{where}: expected the mark 0xDEADBEEF, found 0x{sentinel:08X}")
    if code != _CODES[dtype]:
        raise InputError(f"{where}: the text says {dtype}, the blob says {_NAMES.get(code, f'type code {code}')}")
    if start % READ_ALIGNMENT or start < _FILE.size + _BLOB.size or start + size > total:
        raise InputError(f"{where}: {size} bytes of data at {start} do not lie within the file's {total}")
    return _unpack(data, start, size, padding, dtype, tuple(shape), where)


def list_blobs(data: bytes | memoryview, source: str = "weight file") -> list[tuple[int, str, int]]:
    """(offset, dtype, bytes) of every blob in a file. InputError where they do not lie one after another within it."""
    _check_file(data, source)
    count, _ = _FILE.unpack_from(data, 0)
    found: list[tuple[int, str, int]] = []
    at = _FILE.size
    for i in range(count):
        if at + _BLOB.size > len(data):
            raise InputError(f"{source}: {i} of {count} blobs are there: truncated or damaged")
        sentinel, code, size, start, _ = _BLOB.unpack_from(data, at)
        if sentinel != SENTINEL or code not in _NAMES or start < at + _BLOB.size or start + size > len(data):
            raise InputError(f"{source}: blob {i} at offset {at} does not lie within the file: truncated or damaged")
        found.append((at, _NAMES[code], size))
        end = -(-(start + size) // READ_ALIGNMENT) * READ_ALIGNMENT
        padded = -(-end // ALIGNMENT) * ALIGNMENT
        at = end if data[end : end + 4] == data[_FILE.size : _FILE.size + 4] else padded
    return found


def _check_file(data: bytes | memoryview, source: str) -> None:
    if bytes(data[:23]) == b"version https://git-lfs":
        raise InputError(f"{source}: a git-lfs pointer, not weights: fetch the file with `git lfs pull`")
    if len(data) < _FILE.size + _BLOB.size:
        raise InputError(f"{source}: {len(data)} bytes are too few for a weight file")
    _, version = _FILE.unpack_from(data, 0)
    if version == 1:
        raise InputError(f"{source}: blob storage version 1 (an Espresso weight file); version 2 is read")
    if version != 2:
        raise InputError(f"{source}: blob storage version {version}; version 2 is read")


def _unpack(
    data: bytes | memoryview, start: int, size: int, padding: int, dtype: str, shape: tuple[int, ...], where: str
) -> np.ndarray:
    count = math.prod(shape)
    bits = _NARROW.get(dtype) or (16 if dtype == "bf16" else 8 * DTYPES[dtype].itemsize)
    if padding > 7 or 8 * size - padding != count * bits:
        raise InputError(
            f"{where}: {dtype}{list(shape)} needs {count * bits} bits, the blob has {size} bytes less {padding} bits"
        )
    if dtype in _NARROW:
        array = _unpack_bits(np.frombuffer(data, np.uint8, size, start), count, bits, dtype == "int4")
    elif dtype == "bf16":
        array = (np.frombuffer(data, np.uint16, count, start).astype(np.uint32) << 16).view(np.float32)
    else:
        array = np.frombuffer(data, DTYPES[dtype], count, start)
    array = array.reshape(shape)
    array.setflags(write=False)
    return array


def _pack(array: np.ndarray, dtype: str) -> tuple[bytes, int]:
    """The bytes of an array as the type `dtype`, and how many bits of the last one are padding."""
    if dtype == "bf16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(array), 0x7FC0, rounded).astype("<u2").tobytes(), 0
    if dtype not in _NARROW:
        return np.ascontiguousarray(array, DTYPES[dtype]).tobytes(), 0
    width = _NARROW[dtype]
    low, high = (-8, 7) if dtype == "int4" else (0, (1 << width) - 1)
    if array.size and (array.min() < low or array.max() > high):
        raise InputError(f"{dtype} holds {low} to {high}, got {array.min()} to {array.max()}")
    stream = np.unpackbits(array.astype(np.int8).view(np.uint8).reshape(-1, 1), axis=1, bitorder="little")[:, :width]
    return np.packbits(stream, bitorder="little").tobytes(), -(array.size * width) % 8


def _unpack_bits(packed: np.ndarray, count: int, width: int, signed: bool) -> np.ndarray:
    stream = np.unpackbits(packed, count=count * width, bitorder="little").reshape(count, width)
    values = np.packbits(stream, axis=1, bitorder="little").reshape(count)
    return ((values ^ 8).astype(np.int8) - 8).astype(np.int8) if signed else values
