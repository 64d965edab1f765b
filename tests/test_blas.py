"""A BLAS opened at run time: what is asked of it and when, what is refused, and a training run with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blas_library import library
from native_build import compile_c

LIBRARY = library()
needs_library = pytest.mark.skipif(not LIBRARY, reason="no BLAS: apt install libopenblas0-pthread")

# Counts what is asked, multiplies plainly, and has Accelerate's per-thread switch: MULTI_THREADED is 0.
STAND_IN = """
#include <stdio.h>
#include <stdlib.h>
static _Thread_local unsigned threading;
static long calls, other, threaded, unaligned;
int BLASSetThreading(unsigned mode) { threading = mode; return 0; }
unsigned BLASGetThreading(void) { return threading; }
void asked(long *out);
void asked(long *out) { out[0] = calls; out[1] = other; out[2] = threaded; out[3] = unaligned; }
void cblas_sgemm(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                 int ldb, float beta, float *c, int ldc) {
    if (m != 3) {
        __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);
        int usual = order == 101 && ta == 112 && tb == 111 && m == 64 && n == 256 && lda == 64 && ldb == 256 &&
                    ldc == 256 && alpha == 1 && beta == 0;
        __atomic_fetch_add(&other, !usual, __ATOMIC_RELAXED);
        __atomic_fetch_add(&threaded, threading == 0, __ATOMIC_RELAXED);
        __atomic_fetch_add(&unaligned, ((size_t)a | (size_t)b | (size_t)c) % 64 != 0, __ATOMIC_RELAXED);
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) {
            float sum = 0;
            for (int l = 0; l < k; l++)
                sum += a[l * lda + i] * b[l * ldb + j];
            c[i * ldc + j] = sum WRONG;
        }
}
EXTRA
"""


def stand_in(folder: Path, wrong: str = "", extra: str = "") -> Path:
    source = folder / "blas.c"
    source.write_text(STAND_IN.replace("WRONG", wrong).replace("EXTRA", extra))
    return compile_c(folder / "blas.so", [source], "-O2", "-shared", "-fPIC")


def python(code: str, **environment: str) -> Any:
    """What a new process prints last, as JSON: a BLAS is a process' for good."""
    kept = {k: v for k, v in os.environ.items() if k not in ("ANERT_ISA", "ANERT_BLAS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PRODUCTS = """
import ctypes, json, sys
import numpy as np
from anert import ffi
from test_gemm import gemm
pools = [ffi.Pool(threads) for threads in (1, 2)]
rng = np.random.default_rng(1)
def asked():
    out = (ctypes.c_long * 4)()
    library.asked(out)
    return list(out)
library = ctypes.CDLL(pools[0].blas)
rows, equal = [], True
for m, n, k in ((200, 600, 1100), (32, 32, 7), (31, 500, 40), (500, 31, 40), (1, 400, 40), (400, 1, 40), (64, 64, 0)):
    a, b = rng.standard_normal((1, m, k), np.float32), rng.standard_normal((1, k, n), np.float32)
    before, results = asked(), []
    for pool in pools:
        results.append(gemm(pool, a, b, np.zeros((1, m, n), np.float32)))
    equal = equal and results[0].tobytes() == results[1].tobytes()
    rows.append([m, n, asked()[0] - before[0]])
    assert np.allclose(results[0], a @ b, rtol=1e-4, atol=1e-3)
print(json.dumps({"rows": rows, "asked": asked(), "mode": library.BLASGetThreading(), "equal": equal,
                  "isa": pools[0].isa}))
"""


def test_a_stand_in_is_asked_for_tiles_of_one_size(tmp_path: Path) -> None:
    """Each thread asks for tiles of its own with the library's threading off, which is on again afterwards. A product
    below 32 rows or columns is not the library's."""
    tests = str(Path(__file__).parent)
    paths = os.pathsep.join((tests, os.environ.get("PYTHONPATH", ""), str(Path(tests).parent)))
    found = python(f"import sys; sys.path.insert(0, {tests!r})\n{PRODUCTS}", ANERT_BLAS=str(stand_in(tmp_path)),
                   PYTHONPATH=paths)  # fmt: skip
    per_product = {(m, n): calls for m, n, calls in found["rows"]}
    assert per_product == {(200, 600): 2 * 4 * 3 * 2, (32, 32): 2, (31, 500): 0, (500, 31): 0, (1, 400): 0,
                           (400, 1): 0, (64, 64): 0}  # fmt: skip
    assert found["asked"][1:] == [0, 0, 0] and found["mode"] == 0 and found["equal"] and found["isa"] == "blas"


OPEN = """
import json
from anert import ffi
from anert.errors import AnertError
try:
    pool = ffi.Pool(1)
    print(json.dumps([pool.isa, pool.blas, ffi.own_isa()]))
except AnertError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.parametrize(
    ("wrong", "extra", "message"),
    [
        ("+ 1", "", "its cblas_sgemm multiplies 2 x 3 by 2 x 2 wrongly"),
        ("", 'const char *openblas_get_config(void) { return "OpenBLAS 0.3 USE64BITINT"; }', "takes 64-bit integers"),
    ],
)
def test_a_stand_in_that_is_of_no_use_is_refused(tmp_path: Path, wrong: str, extra: str, message: str) -> None:
    kind, text = python(OPEN, ANERT_BLAS=str(stand_in(tmp_path, wrong, extra)))
    assert kind == "BackendUnavailable" and message in text and "\n" not in text


@pytest.mark.parametrize(
    ("path", "message"),
    [("/nowhere/blas.so", "the BLAS /nowhere/blas.so does not open"), (__file__, "does not open"), (None, "name one")],
)
def test_what_does_not_open_is_said_in_one_line(path: str | None, message: str) -> None:
    named = {"ANERT_BLAS": path} if path else {"ANERT_ISA": "blas"}
    if path is None and sys.platform == "darwin":
        pytest.skip("a Mac has one")
    kind, text = python(OPEN, **named)
    assert kind == "BackendUnavailable" and message in text and "\n" not in text


def test_a_library_without_the_c_interface_is_refused() -> None:
    from anert import ffi

    kind, text = python(OPEN, ANERT_BLAS=ffi.load().__file__)
    assert kind == "BackendUnavailable" and "has no cblas_sgemm" in text


def test_the_command_line_says_it_and_stops(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "anert", "bench", "gemm"], env={**os.environ, "ANERT_BLAS": "/nowhere/blas.so"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.count("\n") == 1 and "/nowhere/blas.so does not open" in done.stderr


def test_doctor_says_what_to_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    from anert.doctor import examine

    monkeypatch.delenv("ANERT_ISA", raising=False)
    monkeypatch.setenv("ANERT_BLAS", "/nowhere/blas.so")
    check = next(c for c in examine(probe=False) if c.id == "native")
    assert check.ok is False and "/nowhere/blas.so" in check.value and "unset ANERT_BLAS" in check.remedy


@needs_library
def test_doctor_says_who_multiplies() -> None:
    code = """
import json
from anert.doctor import examine
found = {}
for check in examine(probe=False):
    found[check.id] = check.value
    if check.id == "threads":
        break
print(json.dumps([found["native"], found["blas"]]))
"""
    native, blas = python(code, ANERT_BLAS=LIBRARY)
    assert native.endswith("blas is used") and f"large products by {LIBRARY}, the rest by " in blas


@needs_library
def test_who_chooses() -> None:
    """A library that is named is used; an instruction set that is named comes first."""
    isa, path, own = python(OPEN, ANERT_BLAS=LIBRARY)
    assert (isa, path) == ("blas", LIBRARY) and own != "blas"
    assert python(OPEN, ANERT_BLAS=LIBRARY, ANERT_ISA=own)[0] == own
    assert python(OPEN, ANERT_BLAS=LIBRARY, ANERT_ISA="blas")[0] == "blas"
    if sys.platform != "darwin":
        assert python(OPEN)[0] == own


@needs_library
def test_one_library_a_process() -> None:
    code = f"import os; from anert import ffi; ffi.open_blas({LIBRARY!r}); ffi.open_blas({LIBRARY!r})\n"
    kind, text = python(code + OPEN, ANERT_BLAS="/elsewhere/blas.so")
    assert kind == "StateError" and f"multiplies with {LIBRARY} already, not with /elsewhere/blas.so" in text
    assert python(code + OPEN, ANERT_ISA="blas")[:2] == ["blas", LIBRARY]


TRAIN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from small_run import SHAPE, bits, trainer, write_text
from anert.events import RunDone, RunStarted
SHAPE |= dict(dim=64, hidden_dim=172, seq_len=64)
folder = Path({folder!r})
data = write_text(folder / "text.txt")
runs = []
for threads in (1, 2):
    run = trainer(data, folder / str(threads), steps=12, threads=threads, precision="fp32", eval_every=12)
    seen = list(run.run())
    (start,) = (e for e in seen if isinstance(e, RunStarted))
    (done,) = (e for e in seen if isinstance(e, RunDone))
    runs.append([start.isa, done.summary["val_loss_first"], done.summary["val_loss"], bits(folder / str(threads))])
print(json.dumps(runs))
"""


@needs_library
def test_a_run_has_the_losses_of_the_cpus_own_products(tmp_path: Path) -> None:
    found = {}
    for isa in ("blas", "auto"):
        folder = tmp_path / isa
        folder.mkdir()
        tests = str(Path(__file__).parent)
        named = {"ANERT_BLAS": LIBRARY} if isa == "blas" else {"ANERT_ISA": "scalar"}
        paths = os.pathsep.join((tests, os.environ.get("PYTHONPATH", ""), str(Path(tests).parent)))
        one, two = python(TRAIN.format(tests=tests, folder=str(folder)), PYTHONPATH=paths, **named)
        assert one == two, "bits depend on the number of threads"
        found[isa] = one
    assert [found["blas"][0], found["auto"][0]] == ["blas", "scalar"]
    assert found["blas"][3] != found["auto"][3], "both multiply alike: the library was not asked"
    losses = np.array([found[isa][1:3] for isa in ("blas", "auto")], np.float64)
    assert losses[0, 1] < losses[0, 0] - 0.3
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
