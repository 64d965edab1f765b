"""Weight blobs both ways: bytes of Apple's writer, views without copies, headers that lie."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert.errors import AnertError, InputError
from anert.mil.blob import BlobDirectory, BlobWriter, read_blob, storable

NARROW = {"int4": (-8, 7), "uint1": (0, 1), "uint2": (0, 3), "uint3": (0, 7), "uint4": (0, 15), "uint6": (0, 63)}
PLAIN = ("fp16", "fp32", "uint8", "int8", "int16", "uint16", "int32", "uint32")
DTYPES = {"fp16": "f2", "fp32": "f4"}


def random_array(dtype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype in NARROW:
        low, high = NARROW[dtype]
        return rng.integers(low, high, shape, endpoint=True).astype(np.int8 if low else np.uint8)
    numpy = np.dtype(DTYPES.get(dtype, dtype))
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * numpy.itemsize), numpy).reshape(shape)


@given(
    st.lists(
        st.tuples(st.sampled_from((*PLAIN, *NARROW)), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=5
    )
)
def test_what_is_written_is_read(blobs: list[tuple[str, list[int]]]) -> None:
    writer = BlobWriter()
    arrays = [random_array(dtype, tuple(shape), seed) for seed, (dtype, shape) in enumerate(blobs)]
    offsets = [writer.add(a, dtype) for a, (dtype, _) in zip(arrays, blobs, strict=True)]
    data = writer.bytes()
    assert struct.unpack_from("<II", data) == (len(blobs), 2) and not any(data[8:64])
    assert all(offset % 64 == 0 for offset in offsets)
    for a, offset, (dtype, _) in zip(arrays, offsets, blobs, strict=True):
        back = read_blob(data, offset, dtype, a.shape)
        assert back.dtype == a.dtype and back.tobytes() == a.tobytes() and not back.flags.writeable


@pytest.mark.parametrize(
    ("dtype", "values", "packed", "padding"),
    [
        ("uint3", [0, 1, 2, 3, 4, 5, 6, 7, 5], "88c6fa05", 5),
        ("uint6", [1, 2, 3, 63, 5], "8130fc05", 2),
        ("int4", [-8, -1, 7], "f807", 4),
        ("uint1", [1, 0, 1, 1, 0, 0, 0, 1, 1], "8d01", 7),
    ],
)
def test_bits_as_apples_writer_packs_them(dtype: str, values: list[int], packed: str, padding: int) -> None:
    writer = BlobWriter()
    offset = writer.add(np.array(values, np.int8), dtype)
    data = writer.bytes()
    assert data[offset + 64 :].hex() == packed
    assert struct.unpack_from("<Q", data, offset + 24) == (padding,)


def test_layout_of_the_first_blob() -> None:
    """The 128 bytes that training projects write by hand (ane_facts 3.3)."""
    writer = BlobWriter()
    assert writer.add(np.arange(3, dtype=np.float16)) == 64
    assert writer.add(np.ones(1, np.float32)) == 192
    data = writer.bytes()
    assert data[:8] == struct.pack("<II", 2, 2)
    assert data[64:88] == bytes.fromhex("efbeadde") + struct.pack("<IQQ", 1, 6, 128) and not any(data[88:128])
    assert data[128:134] == np.arange(3, dtype=np.float16).tobytes()
    assert len(data) == 192 + 64 + 4


def test_a_view_not_a_copy() -> None:
    writer = BlobWriter()
    offset = writer.add(np.arange(1000, dtype=np.float16))
    data = writer.bytes()
    view = read_blob(data, offset, "fp16", (10, 100))
    assert np.shares_memory(view, np.frombuffer(data, np.uint8))


def test_bf16_is_rounded_to_even_and_widened() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng(3).integers(0, 2**32, 20000, dtype=np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x7F800001]
    values = bits.view(np.float32)
    writer = BlobWriter()
    offset = writer.add(values, "bf16")
    back = read_blob(writer.bytes(), offset, "bf16", values.shape)
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(back, wanted, equal_nan=True)


def test_a_file_for_each_constant() -> None:
    directory = BlobDirectory()
    assert directory.place("wq", np.ones((4, 4), np.float16)) == ("@model_path/weights/wq.bin", 64)
    assert directory.place("wk", np.zeros(4, np.float16)) == ("@model_path/weights/wk.bin", 64)
    files = directory.files()
    assert sorted(files) == ["@model_path/weights/wk.bin", "@model_path/weights/wq.bin"]
    assert read_blob(files["@model_path/weights/wq.bin"], 64, "fp16", (4, 4)).sum() == 16


@pytest.mark.parametrize("dtype", ["bool", "fp64", "int64", "uint64", "fp8e4m3fn", "string"])
def test_types_without_a_code(dtype: str) -> None:
    assert not storable(dtype)
    with pytest.raises(InputError, match="cannot hold"):
        BlobWriter().add(np.zeros(1), dtype)
    with pytest.raises(InputError, match="not read"):
        read_blob(bytes(256), 64, dtype, (1,))


def test_values_too_large_for_their_bits() -> None:
    with pytest.raises(InputError, match="uint3 holds 0 to 7, got 0 to 8"):
        BlobWriter().add(np.array([0, 8], np.uint8), "uint3")
    with pytest.raises(InputError, match="int4 holds -8 to 7"):
        BlobWriter().add(np.array([200], np.uint8), "int4")


def header(
    version: int = 2, mark: int = 0xDEADBEEF, code: int = 1, size: int = 4, start: int = 128, padding: int = 0
) -> bytes:
    return struct.pack("<II56x", 1, version) + struct.pack("<IIQQQ32x", mark, code, size, start, padding) + bytes(4)


LIES = [
    (b"", 64, "0 bytes are too few"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", 64, "git-lfs pointer"),
    (header(version=1), 64, "version 1 .an Espresso"),
    (header(version=3), 64, "version 3; version 2 is read"),
    (header(), 0, "expected metadata at a multiple of 16"),
    (header(), 65, "expected metadata at a multiple of 16"),
    (header(), 128, "expected metadata at a multiple of 16 from 64 to 68"),
    (header(), 1 << 70, "expected metadata"),
    (header(), -64, "expected metadata"),
    (header(mark=0), 64, "expected the mark 0xDEADBEEF, found 0x00000000"),
    (header(code=2), 64, "the text says fp16, the blob says fp32"),
    (header(code=99), 64, "the blob says type code 99"),
    (header(size=(1 << 64) - 1), 64, "do not lie within the file's 132"),
    (header(size=5), 64, "do not lie within"),
    (header(size=2), 64, "needs 32 bits, the blob has 2 bytes"),
    (header(start=(1 << 64) - 16), 64, "do not lie within"),
    (header(start=0), 64, "do not lie within"),
    (header(start=129), 64, "do not lie within"),
    (header(padding=8), 64, "less 8 bits"),
    (header(padding=1), 64, "less 1 bits"),
]


@pytest.mark.parametrize(("data", "offset", "message"), LIES)
def test_lying_headers(data: bytes, offset: int, message: str) -> None:
    assert read_blob(header(), 64, "fp16", (2,)).shape == (2,)
    with pytest.raises(InputError, match=message) as caught:
        read_blob(data, offset, "fp16", (2,), "w.bin")
    assert str(caught.value).startswith("w.bin") and "\n" not in str(caught.value)


def test_a_huge_claim_allocates_nothing() -> None:
    with pytest.raises(InputError, match="needs"):
        read_blob(header(), 64, "fp16", (1 << 40, 1 << 40))


@settings(max_examples=300)
@given(st.randoms(), st.sampled_from(("fp16", "fp32", "int4", "uint3", "bf16")))
def test_random_damage_raises_only_our_errors(rng: random.Random, dtype: str) -> None:
    writer = BlobWriter()
    numpy = {"fp16": np.float16, "fp32": np.float32, "bf16": np.float32}.get(dtype, np.int8)
    offset = writer.add(np.ones((3, 5), numpy), dtype)
    data = bytearray(writer.bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 128))] = rng.randrange(256)
    del data[rng.randrange(len(data)) if rng.random() < 0.3 else len(data) :]
    try:
        assert read_blob(bytes(data), offset, dtype, (3, 5)).shape == (3, 5)
    except AnertError as error:
        assert "\n" not in str(error)
