/* surface_iosurface.m: flat IOSurfaces of one row of bytes; a tensor's shape lives in the MIL text alone. */
#include <dlfcn.h>

#include "ane_apple.h"

/* ---- Opening ---- */
typedef struct {
    void *slot; /* the pointer to fill */
    const char *name;
} symbol;

anert_status iosurface_open(const char *path, iosurface_api *ios, anert_error *err) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL); /* never closed: its classes are the process' */
    if (library == NULL) return anert_fail(err, ANERT_EUNAVAILABLE, "IOSurface does not open: %s", dlerror());
    const symbol symbols[] = {
        {&ios->create, "IOSurfaceCreate"},
        {&ios->lock, "IOSurfaceLock"},
        {&ios->unlock, "IOSurfaceUnlock"},
        {&ios->base, "IOSurfaceGetBaseAddress"},
        {&ios->alloc_size, "IOSurfaceGetAllocSize"},
        {&ios->release, "CFRelease"},
        {&ios->width, "kIOSurfaceWidth"},
        {&ios->height, "kIOSurfaceHeight"},
        {&ios->bytes_per_element, "kIOSurfaceBytesPerElement"},
        {&ios->bytes_per_row, "kIOSurfaceBytesPerRow"},
        {&ios->nbytes, "kIOSurfaceAllocSize"},
        {&ios->pixel_format, "kIOSurfacePixelFormat"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *found = dlsym(library, symbols[i].name);
        if (found == NULL) found = dlsym(RTLD_DEFAULT, symbols[i].name); /* CFRelease is CoreFoundation's */
        if (found == NULL)
            return anert_fail(err, ANERT_EUNAVAILABLE, "IOSurface has no symbol %s", symbols[i].name);
        memcpy(symbols[i].slot, &found, sizeof found); /* data or function: dlsym knows one kind of pointer */
    }
    return ANERT_OK;
}

/* ---- Making ---- */
static anert_status create(anert_ane_surface *surface, anert_error *err) {
    const iosurface_api *ios = &surface->ane->ios;
    GUARDED
    NSNumber *nbytes = [NSNumber numberWithUnsignedLong:surface->nbytes];
    NSDictionary *properties = @{
        (id)*ios->width : nbytes,
        (id)*ios->height : @1,
        (id)*ios->bytes_per_element : @1,
        (id)*ios->bytes_per_row : nbytes,
        (id)*ios->nbytes : nbytes,
        (id)*ios->pixel_format : @0
    };
    surface->ref = ios->create((CFDictionaryRef)properties);
    if (surface->ref == NULL)
        return anert_fail(err, ANERT_ENOMEM, "IOSurfaceCreate gives no surface of %zu bytes", surface->nbytes);
    size_t granted = ios->alloc_size(surface->ref);
    if (granted < surface->nbytes)
        return anert_fail(err, ANERT_ESYSTEM, "IOSurfaceCreate gives %zu bytes where %zu were asked for", granted,
                          surface->nbytes);
    kern_return_t code = ios->lock(surface->ref, 0, NULL);
    if (code != 0) return anert_fail(err, ANERT_ESYSTEM, "IOSurfaceLock of a new surface answers %d", (int)code);
    surface->base = ios->base(surface->ref);
    if (surface->base != NULL) memset(surface->base, 0, surface->nbytes); /* new surfaces hold anything */
    code = ios->unlock(surface->ref, 0, NULL);
    if (surface->base == NULL || code != 0)
        return anert_fail(err, ANERT_ESYSTEM, "a new surface has the address %p, IOSurfaceUnlock answers %d",
                          surface->base, (int)code);
    return ANERT_OK;
    UNGUARDED(err)
}

anert_status anert_ane_surface_new(anert_ane *ane, size_t nbytes, anert_ane_surface **out, anert_error *err) {
    if (out == NULL) return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    if (ane == NULL || nbytes == 0)
        return anert_fail(err, ANERT_EINVAL, ane == NULL ? "ane is NULL" : "a surface holds at least 1 byte, not 0");
    anert_ane_surface *surface = calloc(1, sizeof *surface);
    if (surface == NULL) return anert_fail(err, ANERT_ENOMEM, "no memory for the record of a surface");
    surface->holders = 1;
    surface->ane = ane_hold(ane);
    surface->nbytes = nbytes;
    pthread_mutex_init(&surface->mutex, NULL);
    anert_status status = create(surface, err);
    if (status == ANERT_OK) *out = surface;
    else anert_ane_surface_free(surface);
    return status;
}

anert_ane_surface *surface_hold(anert_ane_surface *surface) {
    atomic_fetch_add(&surface->holders, 1);
    return surface;
}

void anert_ane_surface_free(anert_ane_surface *surface) {
    if (surface == NULL || atomic_fetch_sub(&surface->holders, 1) > 1) return;
    if (surface->ref != NULL) {
        @autoreleasepool {
            surface->ane->ios.release(surface->ref);
        }
    }
    pthread_mutex_destroy(&surface->mutex);
    anert_ane_free(surface->ane);
    free(surface);
}

void *anert_ane_surface_base(const anert_ane_surface *surface) { return surface == NULL ? NULL : surface->base; }

size_t anert_ane_surface_size(const anert_ane_surface *surface) { return surface == NULL ? 0 : surface->nbytes; }

uint64_t anert_ane_surface_seed(const anert_ane_surface *surface) {
    return surface == NULL ? 0 : atomic_load(&((anert_ane_surface *)surface)->seed);
}

/* ---- Locks: ours say who may, IOSurface's make memory coherent ---- */

/* Why a surface cannot be had, or NULL; its mutex is held. */
static const char *held(const anert_ane_surface *surface, bool shared) {
    if (surface->reading + surface->writing > 0) return "the surface is in use by a run; wait for its end";
    if (surface->writer) return "the surface is locked by a writer; unlock it first";
    return !shared && surface->readers > 0 ? "the surface is locked by readers; unlock it before writing" : NULL;
}

anert_status anert_ane_surface_lock(anert_ane_surface *surface, int32_t read_only, anert_error *err) {
    if (surface == NULL) return anert_fail(err, ANERT_EINVAL, "surface is NULL");
    pthread_mutex_lock(&surface->mutex);
    const char *reason = held(surface, read_only != 0);
    kern_return_t code = 0;
    if (reason == NULL) {
        code = surface->ane->ios.lock(surface->ref, read_only ? kIOSurfaceLockReadOnly : 0, NULL);
        surface->readers += code == 0 && read_only;
        surface->writer = code == 0 && !read_only;
    }
    pthread_mutex_unlock(&surface->mutex);
    if (reason != NULL) return anert_fail(err, ANERT_ESTATE, "%s", reason);
    if (code != 0) return anert_fail(err, ANERT_ESYSTEM, "IOSurfaceLock answers %d", (int)code);
    return ANERT_OK;
}

anert_status anert_ane_surface_unlock(anert_ane_surface *surface, int32_t read_only, anert_error *err) {
    if (surface == NULL) return anert_fail(err, ANERT_EINVAL, "surface is NULL");
    pthread_mutex_lock(&surface->mutex);
    bool locked = read_only ? surface->readers > 0 : surface->writer;
    kern_return_t code = 0;
    if (locked) {
        code = surface->ane->ios.unlock(surface->ref, read_only ? kIOSurfaceLockReadOnly : 0, NULL);
        if (read_only) surface->readers--;
        else surface->writer = false;
        if (!read_only) atomic_fetch_add(&surface->seed, 1);
    }
    pthread_mutex_unlock(&surface->mutex);
    if (!locked)
        return anert_fail(err, ANERT_ESTATE, "the surface is not locked for %s", read_only ? "reading" : "writing");
    if (code != 0) return anert_fail(err, ANERT_ESYSTEM, "IOSurfaceUnlock answers %d", (int)code);
    return ANERT_OK;
}

anert_status surface_claim(anert_ane_surface *surface, bool write, anert_error *err) {
    pthread_mutex_lock(&surface->mutex);
    const char *reason = NULL;
    if (surface->writer || surface->readers > 0) reason = "a surface of this run is locked; unlock it first";
    else if (surface->writing > 0 || (write && surface->reading > 0)) reason = "another run uses a surface of this one";
    else if (write) surface->writing = 1;
    else surface->reading++;
    pthread_mutex_unlock(&surface->mutex);
    return reason == NULL ? ANERT_OK : anert_fail(err, ANERT_ESTATE, "%s", reason);
}

void surface_release(anert_ane_surface *surface, bool write) {
    pthread_mutex_lock(&surface->mutex);
    if (write) surface->writing = 0;
    else surface->reading--;
    pthread_mutex_unlock(&surface->mutex);
}
