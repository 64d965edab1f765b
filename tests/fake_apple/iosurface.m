/* iosurface.m: the part of IOSurface.framework and CoreFoundation that the shim looks up.
 *
 * A surface lies between two pages that cannot be touched, its end against the second one. New memory is the fp16 NaN
 * 0x7e01. The sum of its bytes is taken at each unlock and compared at the next lock or evaluate, so that a write without
 * a lock, or under one for reading, is noticed even where memory is not sealed. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "contract.h"

typedef const void *CFTypeRef;
typedef NSString *Key;
#define EXPORT __attribute__((visibility("default")))
EXPORT Key kIOSurfaceWidth = @"IOSurfaceWidth", kIOSurfaceHeight = @"IOSurfaceHeight";
EXPORT Key kIOSurfaceBytesPerElement = @"IOSurfaceBytesPerElement", kIOSurfaceBytesPerRow = @"IOSurfaceBytesPerRow";
EXPORT Key kIOSurfaceAllocSize = @"IOSurfaceAllocSize", kIOSurfacePixelFormat = @"IOSurfacePixelFormat";

enum { READ_ONLY = 1, LINE = 64, BAD_ARGUMENT = (int)0xe00002c2, NOT_PERMITTED = (int)0xe00002e2 };
static const uint16_t NEW_NAN = 0x7e01;

static uint64_t sum_of(const FakeSurface *s) {
    uint64_t lanes[4] = {1, 2, 3, 4};
    const uint64_t *words = (const uint64_t *)(const void *)s->base;
    for (size_t i = 0; i < s->used / 8; i += 4)
        for (size_t k = 0; k < 4; k++) lanes[k] = lanes[k] * 0x9e3779b97f4a7c15u + words[i + k];
    return lanes[0] ^ lanes[1] << 1 ^ lanes[2] << 2 ^ lanes[3] << 3;
}

/* Memory as locks and evaluates allow it, where the option seals it. */
static void protect(FakeSurface *s) {
    int rights = s->writers > 0 || s->evaluating > 0 ? PROT_READ | PROT_WRITE : s->readers > 0 ? PROT_READ : PROT_NONE;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (!fake_now.seal) rights = PROT_READ | PROT_WRITE;
    mprotect(s->map + page, s->map_bytes - 2 * page, rights);
}

static void open_memory(FakeSurface *s) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    if (fake_now.seal) mprotect(s->map + page, s->map_bytes - 2 * page, PROT_READ | PROT_WRITE);
}

static bool slack_is_whole(const FakeSurface *s) {
    for (size_t i = s->nbytes; i < s->used; i++)
        if ((unsigned char)s->base[i] != 0xa5) return false;
    return true;
}

@implementation FakeSurface
- (void)end {
    if (map == NULL) return;
    open_memory(self);
    if (readers > 0 || writers > 0) fake_violate("a surface is freed while it is locked");
    if (evaluating > 0) fake_violate("a surface is freed while it is evaluated");
    if (!slack_is_whole(self)) fake_violate("somebody wrote past the end of a surface of %zu bytes", nbytes);
    munmap(map, map_bytes);
    map = NULL;
}
@end

static size_t property(NSDictionary *properties, Key key) {
    id value = [properties objectForKey:key];
    if (![value isKindOfClass:[NSNumber class]]) {
        fake_violate("IOSurfaceCreate: the property %s is %s, not an NSNumber", [key UTF8String],
                     value == nil ? "missing" : object_getClassName(value));
        return 0;
    }
    return [value unsignedLongValue];
}

static bool map_memory(FakeSurface *s) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    s->used = (s->nbytes + LINE - 1) / LINE * LINE;
    size_t inside = (s->used + page - 1) / page * page;
    s->map_bytes = inside + 2 * page;
    s->map = mmap(NULL, s->map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (s->map == MAP_FAILED) {
        s->map = NULL;
        return false;
    }
    mprotect(s->map, page, PROT_NONE);
    mprotect(s->map + page + inside, page, PROT_NONE);
    s->base = s->map + page + inside - s->used;
    for (size_t i = 0; i + 1 < s->nbytes; i += 2) memcpy(s->base + i, &NEW_NAN, 2);
    memset(s->base + s->nbytes, 0xa5, s->used - s->nbytes);
    s->sum = sum_of(s);
    protect(s);
    return true;
}

EXPORT FakeSurface *IOSurfaceCreate(const void *dictionary) {
    NSDictionary *properties = (NSDictionary *)dictionary;
    if (![properties isKindOfClass:[NSDictionary class]]) {
        fake_violate("IOSurfaceCreate takes a dictionary");
        return nil;
    }
    size_t width = property(properties, kIOSurfaceWidth), height = property(properties, kIOSurfaceHeight);
    size_t element = property(properties, kIOSurfaceBytesPerElement), row = property(properties, kIOSurfaceBytesPerRow);
    size_t nbytes = property(properties, kIOSurfaceAllocSize), format = property(properties, kIOSurfacePixelFormat);
    if (nbytes == 0 || height == 0 || width * element > row || row * height > nbytes || format != 0) {
        fake_violate("IOSurfaceCreate: %zu x %zu elements of %zu bytes, rows of %zu, in %zu bytes of format %zu", width,
                     height, element, row, nbytes, format);
        return nil;
    }
    if (height != 1 || element != 1) fake_violate("IOSurfaceCreate: not one row of bytes");
    if (fake_take(&fake_now.create_failures)) return nil;
    FakeSurface *s = [[FakeSurface alloc] init];
    s->nbytes = fake_now.short_surface ? nbytes / 2 : nbytes;
    fake_born(s, &fake_seen.surfaces);
    if (map_memory(s)) return s;
    [s release];
    return nil;
}

static bool is_surface(id s, const char *call) {
    bool is = fake_is(s, @"FakeSurface");
    if (!is) fake_violate("%s of what is no living IOSurface", call);
    return is;
}

EXPORT int IOSurfaceLock(FakeSurface *s, uint32_t options, uint32_t *seed) {
    if (!is_surface(s, "IOSurfaceLock")) return BAD_ARGUMENT;
    if (options > READ_ONLY) fake_violate("IOSurfaceLock with options %u", options);
    if (fake_take(&fake_now.lock_failures)) return NOT_PERMITTED;
    pthread_mutex_lock(&fake_mutex);
    fake_seen.locks++;
    if (s->evaluating > 0) fake_violate("IOSurfaceLock during an evaluate of the surface");
    if (s->writers > 0 || (s->readers > 0 && !(options & READ_ONLY)))
        fake_violate("IOSurfaceLock of a surface that is locked already");
    open_memory(s);
    if (s->readers + s->writers == 0 && sum_of(s) != s->sum)
        fake_violate("a surface of %zu bytes was written without a lock", s->nbytes);
    if (options & READ_ONLY) s->readers++;
    else s->writers++;
    protect(s);
    pthread_mutex_unlock(&fake_mutex);
    if (seed != NULL) *seed = 0;
    return 0;
}

EXPORT int IOSurfaceUnlock(FakeSurface *s, uint32_t options, uint32_t *seed) {
    if (!is_surface(s, "IOSurfaceUnlock")) return BAD_ARGUMENT;
    if (fake_take(&fake_now.unlock_failures)) return NOT_PERMITTED;
    pthread_mutex_lock(&fake_mutex);
    fake_seen.unlocks++;
    int32_t *held = options & READ_ONLY ? &s->readers : &s->writers;
    bool locked = *held > 0;
    if (!locked) {
        fake_violate("IOSurfaceUnlock with options %u of a surface with %d locks for reading and %d for writing", options,
                     s->readers, s->writers);
    } else {
        uint64_t sum = sum_of(s);
        if (held == &s->readers && sum != s->sum)
            fake_violate("a surface of %zu bytes was written under a lock for reading", s->nbytes);
        s->sum = sum;
        --*held;
        protect(s);
    }
    pthread_mutex_unlock(&fake_mutex);
    if (seed != NULL) *seed = 0;
    return locked ? 0 : BAD_ARGUMENT;
}

EXPORT void *IOSurfaceGetBaseAddress(FakeSurface *s) {
    if (!is_surface(s, "IOSurfaceGetBaseAddress")) return NULL;
    if (s->readers + s->writers == 0) fake_violate("IOSurfaceGetBaseAddress of a surface that is not locked");
    return s->base;
}

EXPORT size_t IOSurfaceGetAllocSize(FakeSurface *s) {
    return is_surface(s, "IOSurfaceGetAllocSize") ? s->nbytes : 0;
}

EXPORT void CFRelease(CFTypeRef object) {
    if (object == NULL) fake_violate("CFRelease of NULL");
    [(id)object release];
}

/* ---- For evaluate ---- */
void fake_surface_enter(FakeSurface *s, const char *port) {
    pthread_mutex_lock(&fake_mutex);
    if (s->readers + s->writers > 0) fake_violate("the surface of %s is locked during an evaluate", port);
    open_memory(s);
    if (s->readers + s->writers + s->evaluating == 0 && sum_of(s) != s->sum)
        fake_violate("the surface of %s was written without a lock", port);
    s->evaluating++;
    pthread_mutex_unlock(&fake_mutex);
}

void fake_surface_leave(FakeSurface *s) {
    pthread_mutex_lock(&fake_mutex);
    s->sum = sum_of(s);
    s->evaluating--;
    protect(s);
    pthread_mutex_unlock(&fake_mutex);
}
