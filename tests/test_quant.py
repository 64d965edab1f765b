"""int8 weights: the encoding and the products against NumPy, equal bits on every instruction set, and whole models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import ffi
from anert.backend.cpu import CpuBackend
from anert.backend.reference import ReferenceBackend
from anert.cli import main
from anert.decode import Session
from anert.errors import InputError, ShapeError, UnsupportedError
from anert.ffi import Pool, call, isas
from anert.mil import ops
from anert.mil.graph import Function
from anert.mil.text import print_module
from anert.numpy_llama import NumpyLlama
from anert.param import ParamStore
from anert.plugin import load
from anert.runtime import Runtime
from anert.surface import Heap, Surface

GROUP = 32
STORIES = str(Path(__file__).resolve().parents[1] / "plugins" / "stories.py")


@pytest.fixture(scope="module")
def pool():
    return Pool(2)


def pointer(a: np.ndarray, kind: str = "float *"):
    return ffi.ffi.cast(kind, a.ctypes.data)


def matrix(a: np.ndarray):
    dtype = {"f4": ffi.lib.ANERT_F32, "f2": ffi.lib.ANERT_F16}[a.dtype.str[1:]]
    strides = [s // a.itemsize for s in a.strides]
    return ffi.ffi.new("anert_matrix *", (pointer(a, "void *"), dtype, *strides, 0))[0]


def encode(pool, w):
    out = np.zeros(ffi.lib.anert_q8_bytes(*w.shape), np.uint8)
    call(ffi.lib.anert_q8_encode, pool.ptr, pointer(w), *w.shape, pointer(out, "uint8_t *"))
    return out


def product(pool, encoded, w, x, y, alpha=1.0, beta=0.0):
    m, k = w.shape
    call(ffi.lib.anert_q8_gemm, pool.ptr, ffi.lib.ANERT_F32, m, x.shape[1], k, alpha, pointer(encoded, "uint8_t *"),
         matrix(x), beta, matrix(y))  # fmt: skip
    return y


def groups(x: np.ndarray, half: bool) -> np.ndarray:
    """x (rows, cols) rounded to 255 steps in groups of 32 along the columns, as floats."""
    parts = x.reshape(len(x), -1, GROUP).astype(np.float32)
    top = np.abs(parts).max(-1, keepdims=True)
    scale = top / np.float32(127)
    if half:
        scale = scale.astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.float32(1) / scale if half else np.float32(127) / top
        q = np.where(scale > 0, np.clip(np.rint(parts * inverse), -127, 127), 0)
    return (q * scale.astype(np.float64)).reshape(x.shape)


shapes = st.tuples(st.integers(1, 70), st.integers(1, 6).map(lambda g: g * GROUP))


@given(shapes, st.integers(0, 999), st.sampled_from([np.float32, np.float16]), st.sampled_from([1, 3]),
       st.sampled_from([1, 2]))  # fmt: skip
@settings(max_examples=60)
def test_products_are_those_of_the_rounded_operands(pool, shape, seed, dtype, n, step):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * rng.uniform(0.01, 2)).astype(np.float32)
    w[rng.integers(len(w))] = 0  # a group of zeros
    x = (rng.standard_normal((n, step * shape[1])) * 3).astype(dtype).T[::step]  # (k, n), columns in steps
    y = rng.standard_normal((shape[0], n)).astype(np.float32)
    column = x.astype(np.float64) if n > 1 else groups(x.T, half=False).T
    want = y + 0.5 * (groups(w, half=True) @ column)
    got = product(pool, encode(pool, w), w, x, y.copy(), 0.5, 1.0)
    bound = 1e-5 if n == 1 else 1e-3  # several columns: weights pass through fp16
    assert np.abs(got - want).max() <= bound * (np.abs(w) @ np.abs(x.astype(np.float64))).max() + 1e-6


def test_bits_on_every_instruction_set_and_any_threads():
    rng = np.random.default_rng(4)
    w = rng.standard_normal((700, 288)).astype(np.float32)
    x = rng.standard_normal((288, 1)).astype(np.float32)
    found = set()
    for isa in isas():
        for threads in (1, 3):
            pool = Pool(threads, isa)
            encoded = encode(pool, w)
            y = product(pool, encoded, w, x, np.zeros((700, 1), np.float32))
            found.add(encoded.tobytes() + y.tobytes())
    assert len(found) == 1 and len(isas()) > 1


def test_large_and_tiny_values(pool):
    w = np.zeros((16, 32), np.float32)
    w[0], w[1], w[2, 0] = 60000.0, 1e-6, -60000.0
    x = np.ones((32, 1), np.float32)
    y = product(pool, encode(pool, w), w, x, np.zeros((16, 1), np.float32))[:, 0]
    assert y[0] == pytest.approx(32 * 60000, rel=1e-3) and y[1] == pytest.approx(0, abs=1e-4)
    assert y[2] == pytest.approx(-60000, rel=1e-3) and not y[3:].any()
    half = product(pool, encode(pool, w), w, x, np.zeros((16, 1), np.float16))[:, 0]
    assert half[0] == np.inf and half[2] == pytest.approx(-60000, rel=1e-3)


def test_bad_matrices(pool):
    w = np.zeros((4, 48), np.float32)
    assert ffi.lib.anert_q8_bytes(4, 48) == 0 == ffi.lib.anert_q8_bytes(0, 32)
    with pytest.raises(InputError, match="4 x 48: expected columns in groups of 32"):
        call(ffi.lib.anert_q8_encode, pool.ptr, pointer(w), 4, 48, pointer(w, "uint8_t *"))
    with pytest.raises(InputError, match="must not be NULL"):
        call(ffi.lib.anert_q8_encode, pool.ptr, ffi.ffi.NULL, 4, 32, pointer(w, "uint8_t *"))


# ---- programs and models


def linear(transpose: bool = False) -> str:
    fn = Function("main")
    w = fn.input("w", (1, 1, 64, 64))
    x = fn.input("x", (1, 1, 64, 1))
    y = ops.matmul(w, x, transpose_x=transpose)
    fn.claim("y", y)
    fn.returns(y)
    return print_module(fn)


def test_a_program_reads_an_encoded_port():
    backend = CpuBackend()
    program = backend.compile(linear(), encodings={"w": "int8"})
    assert backend.compile(linear()) is not program and backend.compiles == 2
    assert program.inputs[0].nbytes == ffi.lib.anert_q8_bytes(64, 64) < 64 * 64 * 2
    small = {"w": Surface(Heap(), 64), "x": backend.surface(128), "y": backend.surface(128)}
    with pytest.raises(ShapeError, match="'w' needs 4352 bytes"):
        program.bind(small)
    with pytest.raises(UnsupportedError, match=r"'w' is int8: .* left operand"):
        backend.compile(linear(transpose=True), encodings={"w": "int8"})
    with pytest.raises(UnsupportedError, match="'reference' takes fp16 weights"):
        ReferenceBackend(Heap(), "exact").compile(linear(), encodings={"w": "int8"})


@pytest.fixture(scope="module")
def model():
    preset = load(STORIES).preset("260k")
    config = dataclasses.replace(preset.config, seq_len=40, n_layers=2, hidden_dim=160)
    return preset.model(config)


def test_a_model_in_int8(model):
    rt = Runtime("cpu", "fp32")
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=False)
    store.initialise(3)
    session = Session(rt, model, store, weights="int8")
    store.sync()
    rounded = {n: groups(p.master, True) if p.cols > 1 else p.master for n, p in store.items()}
    oracle = NumpyLlama(model, rounded)
    oracle.w["output"] = rounded["tok_embeddings"]
    oracle.w["tok_embeddings"] = store["tok_embeddings"].master  # ids look up fp16 rows
    ids = [3, 77, 500, 4, 4, 9]
    assert sum(p.encoded is not None for p in store.values()) == 1 + 2 * 7
    want = oracle.extend(ids)
    got = session.extend(ids)
    # Several positions round weights alone, but for the classifier, which sees the last one; one position all columns.
    assert np.abs(got - want).max() <= 1e-2 * np.abs(want).max()
    got, want = session.extend([8]), oracle.extend([8])
    assert np.abs(got - want).max() <= 3e-2 * np.abs(want).max()


def test_the_real_checkpoint_in_int8(shared_data, capsys):
    folder = shared_data / "llama2c"
    argv = ["sample", str(folder / "stories260K.bin"), "--tokenizer", str(folder / "tok512.bin"), "--plugin", STORIES,
            "--prompt", "Once upon a time", "-n", "25", "--temperature", "0"]  # fmt: skip
    assert main([*argv, "--weights", "int8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Once upon a time, there was a little girl named Lily. She loved to play")
    assert main([*argv, "--weights", "int4"]) == 2
    assert "weights 'int4': expected fp16 or int8" in capsys.readouterr().err
    assert main([*argv, "--weights", "int8", "--backend", "reference"]) == 1
    assert "int8 weights are for backend 'cpu'" in capsys.readouterr().err
    assert main([*argv, "--weights", "int8", "--engine", "numpy"]) == 2
