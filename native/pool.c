/* pool.c: a few threads that take indices of one loop from atomic counters, spin briefly, then sleep.
 *
 * The indices are cut into as many ranges as there are threads, and a thread takes those of its own range before it helps with
 * others: what it reads is what it read in the last such loop, and follows what it has just read. (Lines that another core
 * read last come slower, even when that core has dropped them.) A range's `state` packs (generation, next index) in one word.
 * A worker copies the job, then claims an index by compare-exchange: success proves that the generation, hence the copied
 * job, was current. Nobody waits for a worker that never came: the
 * caller takes indices too and returns when all of them are done, so a sleeping or descheduled worker costs nothing.
 *
 * fork: a child has the pool but not its threads. It computes on its calling thread alone, with the same bits. */
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

#include "internal.h"

#if defined(__APPLE__)
#include <dispatch/dispatch.h>
#endif

enum {
    SPIN_US = 200,  /* longer than what Python does between two kernels; a count of pauses says nothing, one takes 1 to 50 ns */
    POLITE_US = 10, /* of them, before others get a chance to run */
    MAX_THREADS = 1024,
    SLOTS = 8
};
#define HUGE_PAGE ((size_t)2 << 20)
#define CLOSED UINT32_MAX /* as an index: nothing to claim */

typedef struct {
    void *data;
    size_t size;
} block;

/* A line of its own, or threads would take it from each other. */
typedef struct {
    _Alignas(64) _Atomic uint64_t state;
} range;

struct anert_pool {
    int32_t n_threads, isa;
    uint32_t owner; /* `forks` when it was made */
    pthread_mutex_t gate;       /* recursive: one caller computes at a time */
    pthread_mutex_t child_gate; /* the same in a forked child, where gate may be held by a thread that is gone */
    _Atomic(anert_body *) body;
    _Atomic(void *) arg;
    _Atomic int64_t base;
    _Atomic uint32_t n;
    range *ranges; /* (n_threads) */
    _Atomic uint32_t remaining;
    uint32_t generation;
    pthread_mutex_t mutex; /* guards the two conditions and stop */
    pthread_cond_t wake, done;
    _Atomic int32_t sleepers;
    _Atomic bool waiting; /* the caller sleeps on done */
    _Atomic bool stop;
    int32_t n_workers; /* started */
    pthread_t *workers;
    block *scratch; /* (n_threads, SLOTS) */
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* One turn of a spin; false once SPIN_US have passed since *since, which is 0 at the first turn. */
static bool spin(int64_t *since) {
    struct timespec t;
    for (int i = 0; i < 16; i++)
        relax();
    clock_gettime(CLOCK_MONOTONIC, &t);
    int64_t us = (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
    *since = *since != 0 ? *since : us;
    if (us - *since > POLITE_US)
        sched_yield();
    return us - *since < SPIN_US;
}

/* How often this process is a fork of one that had a pool: asked at each loop, so no system call. */
static _Atomic uint32_t forks;
static pthread_once_t watch = PTHREAD_ONCE_INIT;
static void count_fork(void) { atomic_fetch_add(&forks, 1); }
static void watch_forks(void) { pthread_atfork(NULL, NULL, count_fork); }

static bool forked(const anert_pool *pool) { return atomic_load_explicit(&forks, memory_order_relaxed) != pool->owner; }

static pthread_mutex_t *gate_of(anert_pool *pool) { return forked(pool) ? &pool->child_gate : &pool->gate; }

void anert_pool_enter(anert_pool *pool) {
    if (pool != NULL)
        pthread_mutex_lock(gate_of(pool));
}

void anert_pool_leave(anert_pool *pool) {
    if (pool != NULL)
        pthread_mutex_unlock(gate_of(pool));
}

static uint32_t range_start(const anert_pool *pool, uint32_t n, int32_t r) {
    return (uint32_t)((uint64_t)n * (uint32_t)r / (uint32_t)pool->n_threads);
}

/* Runs indices of range r of the current job until none is left to claim. */
static void take_range(anert_pool *pool, int32_t r, int32_t thread) {
    _Atomic uint64_t *word = &pool->ranges[r].state;
    uint64_t state = atomic_load_explicit(word, memory_order_acquire);
    for (;;) {
        anert_body *body = atomic_load_explicit(&pool->body, memory_order_acquire);
        void *arg = atomic_load_explicit(&pool->arg, memory_order_acquire);
        int64_t base = atomic_load_explicit(&pool->base, memory_order_acquire);
        uint32_t n = atomic_load_explicit(&pool->n, memory_order_acquire);
        uint32_t index = (uint32_t)state;
        if (index == CLOSED || index >= range_start(pool, n, r + 1))
            return;
        if (!atomic_compare_exchange_weak_explicit(word, &state, state + 1, memory_order_acq_rel, memory_order_acquire))
            continue;
        body(arg, base + index, thread);
        if (atomic_fetch_sub(&pool->remaining, 1) == 1 && atomic_load(&pool->waiting)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
        state = atomic_load_explicit(word, memory_order_acquire);
    }
}

static void take_indices(anert_pool *pool, int32_t thread) {
    for (int32_t i = 0; i < pool->n_threads; i++)
        take_range(pool, (thread + i) % pool->n_threads, thread);
}

static bool has_work(anert_pool *pool) {
    uint32_t n = atomic_load(&pool->n);
    for (int32_t r = 0; r < pool->n_threads; r++) {
        uint32_t index = (uint32_t)atomic_load(&pool->ranges[r].state);
        if (index != CLOSED && index < range_start(pool, n, r + 1))
            return true;
    }
    return false;
}

typedef struct {
    anert_pool *pool;
    int32_t thread;
} worker_start;

static void *worker_main(void *start) {
    anert_pool *pool = ((worker_start *)start)->pool;
    int32_t thread = ((worker_start *)start)->thread;
    free(start);
    while (!atomic_load(&pool->stop)) {
        for (int64_t since = 0; !has_work(pool) && spin(&since);)
            ;
        if (!has_work(pool)) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleepers, 1);
            while (!has_work(pool) && !atomic_load(&pool->stop))
                pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->sleepers, 1);
            pthread_mutex_unlock(&pool->mutex);
        }
        take_indices(pool, thread);
    }
    return NULL;
}

/* Closes the old job before its fields change. A worker that read a new field (acquire) also sees the closed state, so its
 * exchange fails: no index of a half-written job is ever claimed. */
static void open_job(anert_pool *pool, anert_body *body, void *arg, int64_t base, uint32_t n) {
    uint64_t generation = (uint64_t)++pool->generation << 32;
    for (int32_t r = 0; r < pool->n_threads; r++)
        atomic_store(&pool->ranges[r].state, generation | CLOSED);
    atomic_store_explicit(&pool->body, body, memory_order_release);
    atomic_store_explicit(&pool->arg, arg, memory_order_release);
    atomic_store_explicit(&pool->base, base, memory_order_release);
    atomic_store_explicit(&pool->n, n, memory_order_release);
    atomic_store(&pool->remaining, n);
    for (int32_t r = 0; r < pool->n_threads; r++)
        atomic_store(&pool->ranges[r].state, generation | range_start(pool, n, r));
}

#if defined(__APPLE__)
static void dispatch_body(void *pool, size_t thread) { take_indices(pool, (int32_t)thread); }

static void run_job(anert_pool *pool) {
    dispatch_queue_t queue = dispatch_get_global_queue(QOS_CLASS_USER_INITIATED, 0);
    dispatch_apply_f((size_t)pool->n_threads, queue, pool, dispatch_body);
}

static anert_status start_workers(anert_pool *pool, anert_error *err) {
    (void)pool, (void)err, (void)worker_main;
    return ANERT_OK;
}
#else
static void run_job(anert_pool *pool) {
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    take_indices(pool, 0);
    for (int64_t since = 0; atomic_load(&pool->remaining) != 0 && spin(&since);)
        ;
    if (atomic_load(&pool->remaining) == 0)
        return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->waiting, true);
    while (atomic_load(&pool->remaining) != 0)
        pthread_cond_wait(&pool->done, &pool->mutex);
    atomic_store(&pool->waiting, false);
    pthread_mutex_unlock(&pool->mutex);
}

static anert_status start_workers(anert_pool *pool, anert_error *err) {
    for (int32_t i = 0; i < pool->n_threads - 1; i++) {
        worker_start *start = malloc(sizeof *start);
        if (start == NULL)
            return anert_fail(err, ANERT_ENOMEM, "no memory for thread %d of %d", i + 2, pool->n_threads);
        *start = (worker_start){pool, i + 1};
        int code = pthread_create(&pool->workers[i], NULL, worker_main, start);
        if (code != 0) {
            free(start);
            return anert_fail(err, ANERT_ESYSTEM, "thread %d of %d did not start: %s; ask for fewer threads", i + 2,
                              pool->n_threads, strerror(code));
        }
        pool->n_workers++;
    }
    return ANERT_OK;
}
#endif

void anert_parallel_for(anert_pool *pool, int64_t n, anert_body *body, void *arg) {
    pthread_mutex_t *gate = pool == NULL ? NULL : gate_of(pool);
    if (gate != NULL)
        pthread_mutex_lock(gate);
    if (gate == NULL || gate == &pool->child_gate || pool->n_threads == 1 || n <= 1) {
        for (int64_t i = 0; i < n; i++)
            body(arg, i, 0);
    } else {
        for (int64_t base = 0; base < n; base += CLOSED - 1) {
            open_job(pool, body, arg, base, (uint32_t)MIN(n - base, (int64_t)CLOSED - 1));
            run_job(pool);
        }
    }
    if (gate != NULL)
        pthread_mutex_unlock(gate);
}

static void init_locks(anert_pool *pool) {
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&pool->gate, &recursive);
    pthread_mutex_init(&pool->child_gate, &recursive);
    pthread_mutexattr_destroy(&recursive);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
}

anert_status anert_pool_new(int32_t n_threads, int32_t isa, anert_pool **out, anert_error *err) {
    if (out == NULL)
        return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    if (n_threads < 1 || n_threads > MAX_THREADS)
        return anert_fail(err, ANERT_EINVAL, "a pool takes 1 to %d threads, not %d", MAX_THREADS, n_threads);
    if (isa != ANERT_ISA_AUTO && anert_isa_name(isa) == NULL)
        return anert_fail(err, ANERT_EINVAL, "no instruction set has the number %d", isa);
    if (isa == ANERT_ISA_BLAS && !anert_isa_supported(isa))
        return anert_fail(err, ANERT_EUNAVAILABLE, "no BLAS is open: anert_blas_open comes before a pool of it");
    if (!anert_isa_supported(isa))
        return anert_fail(err, ANERT_EUNSUPPORTED, "this CPU has no %s; it has %s", anert_isa_name(isa),
                          anert_isa_name(anert_isa_best()));
    anert_pool *pool = calloc(1, sizeof *pool);
    if (pool == NULL)
        return anert_fail(err, ANERT_ENOMEM, "no memory for a pool of %zu bytes", sizeof *pool);
    pool->n_threads = n_threads;
    pool->isa = isa == ANERT_ISA_AUTO ? anert_isa_best() : isa;
    pthread_once(&watch, watch_forks);
    pool->owner = atomic_load(&forks);
    init_locks(pool);
    void *ranges = NULL;
    if (posix_memalign(&ranges, _Alignof(range), (size_t)n_threads * sizeof *pool->ranges) == 0)
        pool->ranges = ranges;
    for (int32_t r = 0; pool->ranges != NULL && r < n_threads; r++)
        atomic_init(&pool->ranges[r].state, CLOSED);
    pool->workers = calloc((size_t)n_threads, sizeof *pool->workers);
    pool->scratch = calloc((size_t)n_threads * SLOTS, sizeof *pool->scratch);
    anert_status status = ANERT_OK;
    if (pool->ranges == NULL || pool->workers == NULL || pool->scratch == NULL)
        status = anert_fail(err, ANERT_ENOMEM, "no memory for a pool of %d threads", n_threads);
    else
        status = start_workers(pool, err);
    if (status != ANERT_OK) {
        anert_pool_free(pool);
        return status;
    }
    *out = pool;
    return ANERT_OK;
}

void anert_pool_free(anert_pool *pool) {
    if (pool == NULL)
        return;
    if (!forked(pool)) {
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->stop, true);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (int32_t i = 0; i < pool->n_workers; i++)
            pthread_join(pool->workers[i], NULL);
        pthread_cond_destroy(&pool->wake);
        pthread_cond_destroy(&pool->done);
        pthread_mutex_destroy(&pool->mutex);
        pthread_mutex_destroy(&pool->gate);
        pthread_mutex_destroy(&pool->child_gate);
    }
    for (int32_t i = 0; pool->scratch != NULL && i < pool->n_threads * SLOTS; i++)
        free(pool->scratch[i].data);
    free(pool->scratch);
    free(pool->workers);
    free(pool->ranges);
    free(pool);
}

int32_t anert_pool_threads(const anert_pool *pool) { return pool == NULL ? 1 : pool->n_threads; }

int32_t anert_pool_isa(const anert_pool *pool) { return pool == NULL ? anert_isa_best() : pool->isa; }

void *anert_pool_scratch(anert_pool *pool, int32_t thread, int32_t slot, size_t nbytes) {
    if (pool == NULL || thread < 0 || thread >= pool->n_threads || slot < 0 || slot >= SLOTS)
        return NULL;
    block *held = &pool->scratch[thread * SLOTS + slot];
    if (held->data == NULL || held->size < nbytes) {
        size_t align = nbytes < HUGE_PAGE ? 64 : HUGE_PAGE, size = ROUND_UP(MAX(nbytes, (size_t)64), align);
        void *data = NULL;
        if (size < nbytes || posix_memalign(&data, align, size) != 0)
            return NULL;
#if defined(__linux__)
        if (align == HUGE_PAGE)
            madvise(data, size, MADV_HUGEPAGE);
#endif
        free(held->data);
        *held = (block){data, size};
    }
    return held->data;
}
