/* pages.c: weights that a file holds, read where the system maps it: looked at, and moved to huge pages under their readers.
 *
 * A file's pages are small unless its cache happens to lie in large pieces, and every weight is read for every token: a
 * matrix times a column is up to 1.4 times as slow from 4 KiB pages as from 2 MiB ones. So the bytes are copied to huge pages
 * that then take the place of the file's in the address space, at the same addresses: nobody is told, nobody waits. What no copy
 * would hold either, infinities, is clamped in the same way. */
#if defined(__linux__)
#define _GNU_SOURCE /* madvise, mremap */
#endif
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#define HUGE_PAGE ((uintptr_t)2 << 20)
#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22 /* Linux 5.14; older kernels refuse it, and pages come as they are read */
#endif

/* Maps the pages of these bytes, which may be a file's, by one call instead of by a fault each. Advice: a refusal costs time
 * alone. */
static void ask_for(const void *x, size_t nbytes) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)x / page * page;
#if defined(MADV_POPULATE_READ)
    (void)madvise((void *)from, (uintptr_t)x + nbytes - from, MADV_POPULATE_READ);
#else
    (void)madvise((void *)from, (uintptr_t)x + nbytes - from, MADV_WILLNEED);
#endif
}

anert_status anert_f16_finite(anert_pool *pool, const uint16_t *const *x, const size_t *n, int32_t count, int32_t *finite,
                              anert_error *err) {
    if (count < 0 || (count > 0 && (x == NULL || n == NULL || finite == NULL)))
        return anert_fail(err, ANERT_EINVAL, "%d arrays at %p, their results at %p", count, (const void *)x,
                          (const void *)finite);
    for (int32_t i = 0; i < count; i++) {
        float most;
        if (n[i] > 0 && n[i] <= PTRDIFF_MAX / sizeof(uint16_t))
            ask_for(x[i], n[i] * sizeof(uint16_t));
        anert_status status = anert_f16_amax(pool, x[i], n[i], &most, &finite[i], err);
        if (status != ANERT_OK)
            return status;
    }
    return ANERT_OK;
}

/* A copy of these bytes, on pages of its own that start at a multiple of `align`; NULL if memory is refused. */
static char *copy_of(uintptr_t from, size_t size, uintptr_t align) {
    char *raw = mmap(NULL, size + align, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    char *copy = (char *)ROUND_UP((uintptr_t)raw, align), *rest = copy + size;
    if (copy > raw)
        munmap(raw, (size_t)(copy - raw));
    if (raw + size + align > rest)
        munmap(rest, (size_t)(raw + size + align - rest));
#if defined(MADV_HUGEPAGE)
    if (align == HUGE_PAGE)
        (void)madvise(copy, size, MADV_HUGEPAGE); /* refused: the same bytes on small pages, no worse than before */
#endif
    memcpy(copy, (const void *)from, size);
    return copy;
}

/* Puts a copy, to be read alone, where the original is mapped. */
static anert_status take_place(char *copy, uintptr_t at, size_t size, anert_error *err) {
    bool moved = mprotect(copy, size, PROT_READ) == 0;
#if defined(__linux__)
    moved = moved && mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)at) != MAP_FAILED;
#else /* a moment without the bytes: for callers whose readers wait */
    moved = moved && mmap((void *)at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
    if (moved) {
        memcpy((void *)at, copy, size);
        mprotect((void *)at, size, PROT_READ);
        munmap(copy, size);
    }
#endif
    if (moved)
        return ANERT_OK;
    munmap(copy, size);
    return anert_fail(err, ANERT_ESYSTEM, "the system does not put %zu bytes in the place of a map", size);
}

anert_status anert_pages_settle(const void *base, size_t nbytes, size_t *settled, anert_error *err) {
    if (settled != NULL)
        *settled = 0;
    if (base == NULL || nbytes > (size_t)PTRDIFF_MAX - 2 * HUGE_PAGE)
        return anert_fail(err, ANERT_EINVAL, "no map can be %zu bytes at %p", nbytes, base);
#if defined(__linux__)
    uintptr_t from = ROUND_UP((uintptr_t)base, HUGE_PAGE), end = ((uintptr_t)base + nbytes) / HUGE_PAGE * HUGE_PAGE;
    if (from >= end)
        return ANERT_OK;
    char *copy = copy_of(from, end - from, HUGE_PAGE);
    if (copy == NULL)
        return anert_fail(err, ANERT_ENOMEM, "no memory for %zu bytes of huge pages", (size_t)(end - from));
    anert_status status = take_place(copy, from, end - from, err);
    if (status != ANERT_OK)
        return status;
    if (settled != NULL)
        *settled = end - from;
#endif
    return ANERT_OK;
}

anert_status anert_pages_clamp(const uint16_t *x, size_t n, uint64_t *clamped, anert_error *err) {
    if (clamped != NULL)
        *clamped = 0;
    if (x == NULL || n > PTRDIFF_MAX / sizeof *x)
        return anert_fail(err, ANERT_EINVAL, "no map can be %zu halves at %p", n, (const void *)x);
    uint64_t past = 0;
    for (size_t i = 0; i < n; i++)
        past += (x[i] & 0x7fff) == 0x7c00;
    if (past == 0)
        return ANERT_OK;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = (uintptr_t)x / page * page;
    size_t size = ROUND_UP((uintptr_t)(x + n), page) - from;
    char *copy = copy_of(from, size, page);
    if (copy == NULL)
        return anert_fail(err, ANERT_ENOMEM, "no memory for a copy of %zu bytes", size);
    uint16_t *own = (uint16_t *)(copy + ((uintptr_t)x - from));
    for (size_t i = 0; i < n; i++)
        if ((own[i] & 0x7fff) == 0x7c00)
            own[i] = (own[i] & 0x8000) | 0x7bff;
    anert_status status = take_place(copy, from, size, err);
    if (status == ANERT_OK && clamped != NULL)
        *clamped = past;
    return status;
}
