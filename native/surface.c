/* surface.c: zeroed memory in 2 MiB-aligned slabs, handed out as refcounted surfaces; and memory of others, to read alone.
 *
 * A slab keeps its free ranges sorted by offset and coalesced; a surface takes the first range that fits. A slab without
 * surfaces is unmapped. A heap lives until its handle is freed and its last surface is gone. */
#if defined(__linux__)
#define _GNU_SOURCE /* MADV_HUGEPAGE, MAP_ANONYMOUS */
#endif
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "internal.h"

#define HUGE_PAGE ((size_t)2 << 20)
#define PAGE ((size_t)16 << 10)     /* the largest page of the platforms: Apple's */
#define SLAB_MAX ((size_t)64 << 20) /* slabs grow with the heap up to here */
#define LINE ((size_t)64)

typedef struct range {
    size_t offset, size;
    struct range *next;
} range;

typedef struct slab {
    char *base;
    size_t size, used;
    size_t fresh; /* bytes from here on were never handed out: still the kernel's zeros */
    range *free_ranges;
    struct slab *next;
} slab;

struct anert_heap {
    pthread_mutex_t mutex;
    slab *slabs;
    size_t mapped;
    size_t owners; /* the handle and every surface */
};

struct anert_surface {
    anert_heap *heap; /* NULL: somebody else's memory, which nobody writes */
    slab *slab;
    range *spare; /* the node that takes the range back: freeing never allocates */
    char *base;
    size_t offset, extent, nbytes;
    _Atomic int32_t lock; /* readers, or WRITER */
    _Atomic uint64_t seed;
};
enum { WRITER = -1 };

static void *map_aligned(size_t size) {
    size_t padded = size + HUGE_PAGE;
    char *raw = mmap(NULL, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    size_t head = (HUGE_PAGE - (uintptr_t)raw % HUGE_PAGE) % HUGE_PAGE;
    if (head > 0)
        munmap(raw, head);
    if (padded - head > size)
        munmap(raw + head + size, padded - head - size);
#if defined(MADV_HUGEPAGE)
    madvise(raw + head, size, MADV_HUGEPAGE); /* advice: a refusal costs speed alone */
#endif
    return raw + head;
}

static slab *slab_new(anert_heap *heap, size_t need) {
    size_t grown = MIN(SLAB_MAX, MAX(HUGE_PAGE, heap->mapped / 4));
    size_t size = ROUND_UP(MAX(need, grown), HUGE_PAGE);
    slab *new = calloc(1, sizeof *new);
    range *all = calloc(1, sizeof *all);
    char *base = new != NULL && all != NULL ? map_aligned(size) : NULL;
    if (base == NULL) {
        free(new);
        free(all);
        return NULL;
    }
    *all = (range){0, size, NULL};
    *new = (slab){base, size, 0, 0, all, heap->slabs};
    heap->slabs = new;
    heap->mapped += size;
    return new;
}

static void slab_free(anert_heap *heap, slab *old) {
    slab **link = &heap->slabs;
    while (*link != old)
        link = &(*link)->next;
    *link = old->next;
    heap->mapped -= old->size;
    munmap(old->base, old->size);
    while (old->free_ranges != NULL) {
        range *next = old->free_ranges->next;
        free(old->free_ranges);
        old->free_ranges = next;
    }
    free(old);
}

/* Takes `extent` bytes at `align` out of the first range that fits; false if none does. *split becomes the node of the part
 * behind, and NULL, where the taken part lies inside a range. */
static bool slab_take(slab *from, size_t extent, size_t align, range **split, size_t *offset) {
    for (range **link = &from->free_ranges; *link != NULL; link = &(*link)->next) {
        range *found = *link;
        size_t start = ROUND_UP(found->offset, align);
        size_t gap = start - found->offset;
        if (found->size < gap || found->size - gap < extent)
            continue;
        size_t tail = found->size - gap - extent;
        *offset = start;
        from->used += extent;
        if (gap > 0 && tail > 0) {
            **split = (range){start + extent, tail, found->next};
            found->size = gap;
            found->next = *split;
            *split = NULL;
        } else if (gap > 0) {
            found->size = gap;
        } else if (tail > 0) {
            found->offset += extent;
            found->size = tail;
        } else {
            *link = found->next;
            free(found);
        }
        return true;
    }
    return false;
}

static void slab_give(slab *to, range *node, size_t offset, size_t extent) {
    to->used -= extent;
    range **link = &to->free_ranges;
    range *before = NULL;
    while (*link != NULL && (*link)->offset < offset) {
        before = *link;
        link = &(*link)->next;
    }
    *node = (range){offset, extent, *link};
    *link = node;
    if (node->next != NULL && node->offset + node->size == node->next->offset) {
        range *after = node->next;
        node->size += after->size;
        node->next = after->next;
        free(after);
    }
    if (before != NULL && before->offset + before->size == node->offset) {
        before->size += node->size;
        before->next = node->next;
        free(node);
    }
}

/* Unlocks, and releases the heap itself when its last owner left. */
static void heap_leave(anert_heap *heap) {
    bool last = --heap->owners == 0;
    pthread_mutex_unlock(&heap->mutex);
    if (last) {
        pthread_mutex_destroy(&heap->mutex);
        free(heap);
    }
}

anert_status anert_heap_new(anert_heap **out, anert_error *err) {
    if (out == NULL)
        return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = calloc(1, sizeof **out);
    if (*out == NULL)
        return anert_fail(err, ANERT_ENOMEM, "no memory for a heap of %zu bytes", sizeof **out);
    (*out)->owners = 1;
    pthread_mutex_init(&(*out)->mutex, NULL);
    return ANERT_OK;
}

void anert_heap_free(anert_heap *heap) {
    if (heap == NULL)
        return;
    pthread_mutex_lock(&heap->mutex);
    heap_leave(heap);
}

size_t anert_heap_bytes(const anert_heap *heap) {
    if (heap == NULL)
        return 0;
    anert_heap *locked = (anert_heap *)heap;
    pthread_mutex_lock(&locked->mutex);
    size_t mapped = locked->mapped;
    pthread_mutex_unlock(&locked->mutex);
    return mapped;
}

/* Finds the memory of a new surface; the heap is locked. */
static bool surface_place(anert_heap *heap, anert_surface *surface, size_t align, range **split) {
    slab *from = heap->slabs;
    while (from != NULL && !slab_take(from, surface->extent, align, split, &surface->offset))
        from = from->next;
    if (from == NULL) {
        from = slab_new(heap, surface->extent);
        if (from == NULL || !slab_take(from, surface->extent, align, split, &surface->offset))
            return false;
    }
    surface->slab = from;
    surface->base = from->base + surface->offset;
    if (surface->offset < from->fresh) /* used before: zero what the kernel did not */
        memset(surface->base, 0, MIN(surface->extent, from->fresh - surface->offset));
    from->fresh = MAX(from->fresh, surface->offset + surface->extent);
    return true;
}

anert_status anert_surface_new(anert_heap *heap, size_t nbytes, anert_surface **out, anert_error *err) {
    if (out == NULL)
        return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    if (heap == NULL || nbytes == 0)
        return anert_fail(err, ANERT_EINVAL, heap == NULL ? "heap is NULL" : "a surface holds at least 1 byte, not 0");
    if (nbytes > (size_t)PTRDIFF_MAX - 2 * HUGE_PAGE)
        return anert_fail(err, ANERT_ENOMEM, "a surface of %zu bytes exceeds the address space", nbytes);
    anert_surface *surface = calloc(1, sizeof *surface);
    range *spare = malloc(sizeof *spare);
    range *split = malloc(sizeof *split);
    if (surface == NULL || spare == NULL || split == NULL) {
        free(surface);
        free(spare);
        free(split);
        return anert_fail(err, ANERT_ENOMEM, "no memory for the record of a surface of %zu bytes", nbytes);
    }
    size_t align = nbytes >= PAGE ? PAGE : LINE;
    surface->heap = heap;
    surface->nbytes = nbytes;
    surface->extent = ROUND_UP(nbytes, align);
    surface->spare = spare;
    pthread_mutex_lock(&heap->mutex);
    bool placed = surface_place(heap, surface, align, &split);
    size_t mapped = heap->mapped;
    heap->owners += placed;
    pthread_mutex_unlock(&heap->mutex);
    free(split);
    if (!placed) {
        free(spare);
        free(surface);
        return anert_fail(err, ANERT_ENOMEM, "no memory for a surface of %zu bytes beside the %zu that are mapped",
                          nbytes, mapped);
    }
    *out = surface;
    return ANERT_OK;
}

anert_status anert_surface_over(const void *base, size_t nbytes, anert_surface **out, anert_error *err) {
    if (out == NULL)
        return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    if (base == NULL || nbytes == 0 || nbytes > (size_t)PTRDIFF_MAX)
        return anert_fail(err, ANERT_EINVAL, "no surface can be %zu bytes at %p", nbytes, base);
    anert_surface *surface = calloc(1, sizeof *surface);
    if (surface == NULL)
        return anert_fail(err, ANERT_ENOMEM, "no memory for the record of a surface of %zu bytes", nbytes);
    surface->base = (char *)base;
    surface->nbytes = nbytes;
    *out = surface;
    return ANERT_OK;
}

void anert_surface_free(anert_surface *surface) {
    if (surface == NULL)
        return;
    anert_heap *heap = surface->heap;
    if (heap != NULL) {
        pthread_mutex_lock(&heap->mutex);
        slab_give(surface->slab, surface->spare, surface->offset, surface->extent);
        if (surface->slab->used == 0)
            slab_free(heap, surface->slab);
        heap_leave(heap);
    }
    free(surface);
}

void *anert_surface_base(const anert_surface *surface) { return surface == NULL ? NULL : surface->base; }

size_t anert_surface_size(const anert_surface *surface) { return surface == NULL ? 0 : surface->nbytes; }

uint64_t anert_surface_seed(const anert_surface *surface) {
    return surface == NULL ? 0 : atomic_load(&((anert_surface *)surface)->seed);
}

void anert_surface_touch(anert_surface *surface) {
    if (surface != NULL && surface->heap != NULL)
        atomic_fetch_add(&surface->seed, 1);
}

anert_status anert_surface_lock(anert_surface *surface, int32_t read_only, anert_error *err) {
    if (surface == NULL)
        return anert_fail(err, ANERT_EINVAL, "surface is NULL");
    if (!read_only && surface->heap == NULL)
        return anert_fail(err, ANERT_ESTATE, "the surface is over memory that is read alone; write to a copy of it");
    int32_t held = atomic_load(&surface->lock);
    do {
        if (held == WRITER)
            return anert_fail(err, ANERT_ESTATE, "the surface is locked by a writer; unlock it first");
        if (!read_only && held > 0)
            return anert_fail(err, ANERT_ESTATE, "the surface is locked by %d readers; unlock it before writing", held);
    } while (!atomic_compare_exchange_weak(&surface->lock, &held, read_only ? held + 1 : WRITER));
    return ANERT_OK;
}

anert_status anert_surface_unlock(anert_surface *surface, int32_t read_only, anert_error *err) {
    if (surface == NULL)
        return anert_fail(err, ANERT_EINVAL, "surface is NULL");
    int32_t held = atomic_load(&surface->lock);
    if (!read_only && held == WRITER)
        atomic_fetch_add(&surface->seed, 1); /* before the lock goes: the next reader sees it */
    do {
        if (read_only ? held <= 0 : held != WRITER)
            return anert_fail(err, ANERT_ESTATE, "the surface is not locked for %s", read_only ? "reading" : "writing");
    } while (!atomic_compare_exchange_weak(&surface->lock, &held, read_only ? held - 1 : 0));
    return ANERT_OK;
}

anert_status anert_surface_hold(anert_surface *const *surfaces, int32_t n, int32_t reads, int32_t *which,
                                anert_error *err) {
    for (int32_t i = 0; i < n; i++) {
        anert_status status = anert_surface_lock(surfaces[i], i < reads, err);
        if (status == ANERT_OK) continue;
        for (int32_t j = 0; j < i; j++) { /* not release: nothing was written, so no seed advances */
            if (j < reads) atomic_fetch_sub(&surfaces[j]->lock, 1);
            else atomic_store(&surfaces[j]->lock, 0);
        }
        if (which != NULL) *which = i;
        return status;
    }
    return ANERT_OK;
}

void anert_surface_release(anert_surface *const *surfaces, int32_t n, int32_t reads) {
    for (int32_t i = 0; i < n; i++) (void)anert_surface_unlock(surfaces[i], i < reads, NULL);
}
