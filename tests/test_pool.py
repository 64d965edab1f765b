"""The pool runs every index exactly once, whoever calls, and answers impossible pools with a sentence."""

import os
import subprocess
import sys
import threading
import time

import pytest
from native_build import compile_c, load_c

from anert import ffi as native
from anert.errors import InputError, UnsupportedError

PROBE = r"""
#include <pthread.h>
#include <time.h>
#include "internal.h"

typedef struct { int32_t *counts, *threads; int64_t n_threads; int64_t pause_ns; } job;

static void count(void *arg, int64_t index, int32_t thread) {
    job *j = arg;
    if (j->pause_ns) nanosleep(&(struct timespec){0, j->pause_ns}, NULL);
    __atomic_fetch_add(&j->counts[index], 1, __ATOMIC_RELAXED);
    if (thread < 0 || thread >= j->n_threads) __atomic_fetch_add(&j->threads[j->n_threads], 1, __ATOMIC_RELAXED);
    else __atomic_fetch_add(&j->threads[thread], 1, __ATOMIC_RELAXED);
}

/* threads has n_threads + 1 entries: what each thread did, and calls with a number out of range. */
void probe_count(anert_pool *pool, int64_t n, int64_t pause_ns, int32_t *counts, int32_t *threads) {
    job j = {counts, threads, anert_pool_threads(pool), pause_ns};
    anert_parallel_for(pool, n, count, &j);
}

typedef struct { int32_t *who; int64_t pause_ns; } roll;
static void sign(void *arg, int64_t index, int32_t thread) {
    roll *r = arg;
    nanosleep(&(struct timespec){0, r->pause_ns}, NULL);
    r->who[index] = thread;
}

void probe_who(anert_pool *pool, int64_t n, int64_t pause_ns, int32_t *who) {
    roll r = {who, pause_ns};
    anert_parallel_for(pool, n, sign, &r);
}

/* Plain memory, so that a missing happens-before shows in TSan and a lost or doubled index in the sum. */
static void add(void *arg, int64_t index, int32_t thread) { (void)thread; ((int64_t *)arg)[index] += index; }

int64_t probe_rounds(anert_pool *pool, int64_t rounds) {
    int64_t wrong = 0;
    for (int64_t r = 0; r < rounds; r++) {
        int64_t cells[37] = {0}, n = r % 38;
        anert_parallel_for(pool, n, add, cells);
        for (int64_t i = 0; i < 37; i++) wrong += cells[i] != (i < n ? i : 0);
    }
    return wrong;
}

int64_t probe_scratch(anert_pool *pool) {
    anert_pool_enter(pool);
    char *a = anert_pool_scratch(pool, 0, 0, 100), *b = anert_pool_scratch(pool, 0, 1, 100);
    char *c = anert_pool_scratch(pool, anert_pool_threads(pool) - 1, 7, 1 << 20);
    int64_t wrong = a == NULL || b == NULL || c == NULL || a == b;
    wrong += (uintptr_t)a % 64 != 0 || (uintptr_t)c % 64 != 0;
    wrong += anert_pool_scratch(pool, 0, 0, 50) != a;
    wrong += anert_pool_scratch(pool, anert_pool_threads(pool), 0, 8) != NULL;
    wrong += anert_pool_scratch(pool, 0, 8, 8) != NULL || anert_pool_scratch(pool, 0, -1, 8) != NULL;
    wrong += anert_pool_scratch(pool, 0, 2, SIZE_MAX - 8) != NULL;
    wrong += anert_pool_scratch(NULL, 0, 0, 8) != NULL;
    memset(c, 1, 1 << 20);
    anert_pool_leave(pool);
    return wrong;
}

typedef struct { anert_pool *pool; int64_t wrong; } caller;
#ifndef ROUNDS
#define ROUNDS 2000
#endif
static void *call_rounds(void *arg) { caller *c = arg; c->wrong = probe_rounds(c->pool, ROUNDS); return NULL; }

int main(void) {
    int64_t wrong = 0;
    for (int32_t threads = 1; threads <= 4; threads++) {
        anert_pool *pool;
        if (anert_pool_new(threads, ANERT_ISA_SCALAR, &pool, NULL) != ANERT_OK) return 2;
        pthread_t who[3];
        caller callers[3];
        for (int i = 0; i < 3; i++) {
            callers[i] = (caller){pool, 0};
            if (pthread_create(&who[i], NULL, call_rounds, &callers[i])) return 3;
        }
        for (int i = 0; i < 3; i++) { pthread_join(who[i], NULL); wrong += callers[i].wrong; }
        wrong += probe_scratch(pool);
        anert_pool_free(pool);
    }
    return wrong != 0;
}
"""
CDEF = """
void probe_who(anert_pool *pool, int64_t n, int64_t pause_ns, int32_t *who);
void probe_count(anert_pool *pool, int64_t n, int64_t pause_ns, int32_t *counts, int32_t *threads);
int64_t probe_rounds(anert_pool *pool, int64_t rounds);
int64_t probe_scratch(anert_pool *pool);
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("pool") / "probe.c"
    path.write_text(PROBE)
    return path


@pytest.fixture(scope="module")
def probe(source):
    return load_c(source.parent, CDEF, ["pool.c", "error.c", source])


def new_pool(probe, threads):
    ffi, lib = probe
    out = ffi.new("anert_pool **")
    assert lib.anert_pool_new(threads, -1, out, ffi.NULL) == 0
    return ffi.gc(out[0], lib.anert_pool_free)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000, 50_000])
def test_every_index_once(probe, threads, n):
    ffi, lib = probe
    pool = new_pool(probe, threads)
    counts, by_thread = ffi.new("int32_t[]", n + 1), ffi.new("int32_t[]", threads + 1)
    lib.probe_count(pool, n, 0, counts, by_thread)
    assert list(counts) == [1] * n + [0]
    assert sum(by_thread) == n
    assert by_thread[threads] == 0, "a thread number out of range"


def test_all_threads_take_part(probe):
    """Bodies that sleep leave room for the workers even on one core."""
    ffi, lib = probe
    pool = new_pool(probe, 3)
    time.sleep(0.01)  # the workers sleep by now: they must be woken
    counts, by_thread = ffi.new("int32_t[]", 60), ffi.new("int32_t[]", 4)
    lib.probe_count(pool, 60, 1_000_000, counts, by_thread)
    assert list(counts) == [1] * 60
    assert min(list(by_thread)[:3]) > 0


def test_a_thread_takes_neighbours(probe):
    """What follows an index is mostly the same thread's: one that is late has its range taken by others."""
    ffi, lib = probe
    who = ffi.new("int32_t[]", 60)
    lib.probe_who(new_pool(probe, 3), 60, 1_000_000, who)
    changes = sum(a != b for a, b in zip(list(who), list(who)[1:], strict=False))
    assert who[0] == 0, "the caller begins with its own"
    assert 2 <= changes < 30, f"{list(who)}"


def test_many_small_loops(probe):
    pool = new_pool(probe, 4)
    assert probe[1].probe_rounds(pool, 20_000) == 0


def test_null_pool_is_one_thread(probe):
    ffi, lib = probe
    assert lib.probe_rounds(ffi.NULL, 100) == 0
    assert lib.anert_pool_threads(ffi.NULL) == 1


def test_concurrent_callers(probe):
    pool = new_pool(probe, 2)
    wrong = []
    callers = [threading.Thread(target=lambda: wrong.append(probe[1].probe_rounds(pool, 3000))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == [0] * 4


def test_scratch(probe):
    assert probe[1].probe_scratch(new_pool(probe, 2)) == 0
    assert probe[1].probe_scratch(new_pool(probe, 1)) == 0


# What pool.c takes from macOS, over pthreads.
DISPATCH = r"""
#include <pthread.h>
#include <stddef.h>
typedef void *dispatch_queue_t;
enum { QOS_CLASS_USER_INITIATED = 0x19 };
static inline dispatch_queue_t dispatch_get_global_queue(long quality, unsigned long flags) {
    return quality == QOS_CLASS_USER_INITIATED && flags == 0 ? (dispatch_queue_t)1 : NULL;
}
struct dispatch_part { void *context; void (*work)(void *, size_t); size_t index; pthread_t thread; };
static void *dispatch_run(void *part) {
    struct dispatch_part *p = part;
    p->work(p->context, p->index);
    return NULL;
}
static inline void dispatch_apply_f(size_t n, dispatch_queue_t queue, void *context, void (*work)(void *, size_t)) {
    struct dispatch_part parts[64];
    if (queue == NULL || n > 64) __builtin_trap();
    for (size_t i = 0; i < n; i++) {
        parts[i] = (struct dispatch_part){context, work, i, 0};
        if (pthread_create(&parts[i].thread, NULL, dispatch_run, &parts[i])) __builtin_trap();
    }
    for (size_t i = 0; i < n; i++) pthread_join(parts[i].thread, NULL);
}
"""


def test_macos_branch(source, tmp_path):
    """On macOS the threads are dispatch's: the same program over a dispatch_apply_f of our own."""
    (tmp_path / "dispatch").mkdir()
    (tmp_path / "dispatch" / "dispatch.h").write_text(DISPATCH)
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-D__APPLE__", f"-I{tmp_path}", "-DROUNDS=50"]
    program = compile_c(tmp_path / "stress", ["pool.c", "error.c", source], *flags)
    assert subprocess.run([program], timeout=120).returncode == 0


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_sanitizers(source, sanitizer, tmp_path):
    """Three callers on pools of 1 to 4 threads: no data race, no bad access, no wrong sum."""
    probe_flags = ["-x", "c", "/dev/null", "-shared", "-fPIC"]
    flags = ["-O1", "-g", f"-fsanitize={sanitizer}"]
    try:
        compile_c(tmp_path / "none", [], *flags, *probe_flags)
    except AssertionError:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    program = compile_c(tmp_path / "stress", ["pool.c", "error.c", source], *flags)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=120)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's address layout is beyond this TSan")
    assert done.returncode == 0, done.stderr


def test_forked_child_computes_alone():
    """A child has no workers: it must neither hang nor miss an index, even if a loop ran while it was forked."""
    program = """
import os, threading, numpy as np
from anert import ffi as F
pool = F.Pool(4)
x = np.linspace(-9, 9, 1 << 20, dtype=np.float32)
def convert():
    out = np.zeros(x.size, np.uint16)
    F.call(F.lib.anert_f32_to_f16, pool.ptr, F.ffi.from_buffer("float[]", x), F.ffi.from_buffer("uint16_t[]", out),
           x.size, 0, F.ffi.NULL)
    return (out == x.astype(np.float16).view(np.uint16)).all()
assert convert()
busy = True
def spin():
    while busy:
        convert()
thread = threading.Thread(target=spin)
thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if convert() and convert() else 1)
    assert os.waitpid(child, 0)[1] == 0
busy = False
thread.join()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_bad_pools():
    for threads in (-1, 1025):
        with pytest.raises(InputError, match="1 to 1024 threads"):
            native.Pool(threads)
    with pytest.raises(InputError, match=r"'sse9'.*avx2"):
        native.Pool(1, "sse9")
    missing = [name for name in native.ISAS if name not in native.isas() and name != "blas"]
    for name in missing:
        with pytest.raises(UnsupportedError, match=f"no {name}; it has"):
            native.Pool(1, name)
    lib, ffi = native.lib, native.ffi
    with pytest.raises(InputError, match="number 99"):
        native.call(lib.anert_pool_new, 1, 99, ffi.new("anert_pool **"))
    with pytest.raises(InputError, match="out is NULL"):
        native.call(lib.anert_pool_new, 1, 0, ffi.NULL)


def test_isa_names_match_the_header():
    lib, ffi = native.lib, native.ffi
    for number, name in enumerate(native.ISAS):
        assert ffi.string(lib.anert_isa_name(number)).decode() == name
        assert getattr(lib, f"ANERT_ISA_{name.upper()}") == number
    assert lib.anert_isa_name(len(native.ISAS)) == ffi.NULL
    assert not lib.anert_isa_supported(len(native.ISAS))
    assert not lib.anert_isa_supported(-2)
    assert native.isas()[0] == "scalar"
    assert native.Pool(1).isa in native.isas()
