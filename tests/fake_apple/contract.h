/* contract.h: what the files of the stand-in share. */
#ifndef FAKE_CONTRACT_H
#define FAKE_CONTRACT_H
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "fake.h"

#import <Foundation/Foundation.h>
#include <objc/runtime.h>

extern fake_options fake_now;
extern fake_counts fake_seen;
extern fake_hook *fake_compiler;
extern int32_t (*fake_plan_run)(const void *plan, void *pool, void *const *bases, int32_t n_bases, void *arena, void *err);
extern pthread_mutex_t fake_mutex; /* of all counters and states */

void fake_violate(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Takes one of `left` (-1: without end); true if there was one. */
bool fake_take(int32_t *left);
void fake_add(int64_t *counter, int64_t by);
/* Notes that the caller handed in `object`, which must not outlive what it was handed to. */
void fake_handed_in(id object);

/* Every object of the stand-in. The dead stay as FakeDead, so that a message to one is a violation and no crash. */
@interface FakeObject : NSObject {
@public
    int64_t *alive; /* its counter */
}
- (void)end; /* releases what it holds */
@end
@interface FakeDead : NSObject
@end
bool fake_is(id object, NSString *name); /* a living object of a class by that name, or of a subclass */
void fake_born(FakeObject *object, int64_t *alive);

void fake_forget_poison(void); /* framework.m */

/* ---- IOSurface ---- */
@interface FakeSurface : FakeObject {
@public
    char *map, *base;
    size_t map_bytes, nbytes, used; /* used: rounded to the memory's alignment */
    int32_t readers, writers;       /* locks */
    int32_t evaluating;
    uint64_t sum; /* of the memory when it was last unlocked */
}
@end
/* An evaluate begins and ends with a surface: checks locks and memory, makes it writable, and takes its sum again. */
void fake_surface_enter(FakeSurface *surface, const char *port);
void fake_surface_leave(FakeSurface *surface);
#endif
