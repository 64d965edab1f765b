/* blas.c: a BLAS that is opened at run time, never linked: Accelerate on macOS, elsewhere the library that the user names.
 *
 * It is asked for one product alone, of packed panels of one size (gemm_blas.h), by many threads at once, each with tiles of
 * its own; so its own threading is switched off where it can be: Accelerate's for the calling thread (BLASSetThreading, macOS
 * 15 on), OpenBLAS' and MKL's for the process. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

#include "blas.h"

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112, MULTI_THREADED = 0, SINGLE_THREADED = 1 };

/* CBLAS of the reference BLAS, with 32-bit integers (LP64). */
typedef void sgemm_fn(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                      const float *b, int ldb, float beta, float *c, int ldc);

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static char *opened; /* the library's path; NULL: none is open */
/* Written before the instruction set is offered, and never again. */
static sgemm_fn *sgemm;
static int (*set_threading)(unsigned);
static unsigned (*get_threading)(void);
static _Thread_local unsigned threading_before;

void anert_blas_multiply(int32_t m, int32_t n, int32_t k, const float *a, const float *b, float *c) {
    sgemm(ROW_MAJOR, TRANS, NO_TRANS, m, n, k, 1.0f, a, m, b, n, 0.0f, c, n);
}

void anert_blas_begin(void) {
    if (set_threading != NULL && get_threading != NULL) {
        threading_before = get_threading();
        set_threading(SINGLE_THREADED);
    }
}

void anert_blas_end(void) {
    if (set_threading != NULL && get_threading != NULL && threading_before == MULTI_THREADED)
        set_threading(MULTI_THREADED);
}

/* A function of the library, whose address dlsym gives as an object's. */
static void find(void *library, const char *name, void *function) {
    void *address = dlsym(library, name);
    memcpy(function, &address, sizeof address);
}

/* Does it multiply as CBLAS says: A^T B with A (2, 3) and B (2, 2). */
static bool multiplies(sgemm_fn *function) {
    const float a[] = {1, 2, 3, 4, 5, 6}, b[] = {1, -1, 2, 0.5f}, want[] = {9, 1, 12, 0.5f, 15, 0};
    float c[6] = {-1, -1, -1, -1, -1, -1};
    function(ROW_MAJOR, TRANS, NO_TRANS, 3, 2, 2, 1.0f, a, 3, b, 2, 0.0f, c, 2);
    return memcmp(c, want, sizeof want) == 0;
}

static anert_status take(void *library, const char *path, anert_error *err) {
    sgemm_fn *function;
    char *(*config)(void);
    void (*set_threads)(int);
    find(library, "cblas_sgemm", &function);
    if (function == NULL)
        return anert_fail(err, ANERT_EUNAVAILABLE, "%s has no cblas_sgemm: name a BLAS with the C interface", path);
    find(library, "openblas_get_config", &config);
    if (config != NULL && strstr(config(), "USE64BITINT") != NULL)
        return anert_fail(err, ANERT_EUNAVAILABLE, "%s takes 64-bit integers: name a build with 32-bit ones (LP64)", path);
    static const char *const names[] = {"openblas_set_num_threads", "MKL_Set_Num_Threads"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        find(library, names[i], &set_threads);
        if (set_threads != NULL)
            set_threads(1);
    }
    if (!multiplies(function))
        return anert_fail(err, ANERT_EUNAVAILABLE, "%s: its cblas_sgemm multiplies 2 x 3 by 2 x 2 wrongly", path);
    find(library, "BLASSetThreading", &set_threading);
    find(library, "BLASGetThreading", &get_threading);
    sgemm = function;
    anert_isa_add(ANERT_ISA_BLAS);
    return ANERT_OK;
}

static anert_status open_once(const char *path, anert_error *err) {
    if (opened != NULL && strcmp(opened, path) == 0)
        return ANERT_OK;
    if (opened != NULL)
        return anert_fail(err, ANERT_ESTATE, "this process multiplies with %s already, not with %s: one BLAS a process", opened,
                          path);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return anert_fail(err, ANERT_EUNAVAILABLE, "the BLAS %s does not open: %s", path, dlerror());
    char *copy = strdup(path);
    anert_status status =
        copy == NULL ? anert_fail(err, ANERT_ENOMEM, "no memory for the path of a BLAS") : take(library, path, err);
    if (status == ANERT_OK) {
        opened = copy;
    } else {
        free(copy);
        dlclose(library);
    }
    return status;
}

const char *anert_blas_path(void) {
    pthread_mutex_lock(&opening);
    const char *path = opened;
    pthread_mutex_unlock(&opening);
    return path;
}

anert_status anert_blas_open(const char *path, anert_error *err) {
    if (path == NULL || *path == '\0')
        return anert_fail(err, ANERT_EINVAL, "no path of a BLAS");
    pthread_mutex_lock(&opening);
    anert_status status = open_once(path, err);
    pthread_mutex_unlock(&opening);
    return status;
}
