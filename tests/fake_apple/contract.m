/* contract.m: options, counters, violations, and objects that may be watched after their death. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdio.h>

#include "contract.h"

enum { MAX_VIOLATIONS = 64, VIOLATION_BYTES = 512 };

fake_options fake_now;
fake_counts fake_seen;
fake_hook *fake_compiler;
int32_t (*fake_plan_run)(const void *plan, void *pool, void *const *bases, int32_t n_bases, void *arena, void *err);
pthread_mutex_t fake_mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP; /* arrays die inside it, and what they hold is counted */

static pthread_mutex_t violations_mutex = PTHREAD_MUTEX_INITIALIZER; /* a leaf: taken inside any other */
static char violations[MAX_VIOLATIONS][VIOLATION_BYTES];
static int32_t n_violations;
static NSMutableArray *handed_in; /* +1 each */

void fake_violate(const char *format, ...) {
    va_list args;
    va_start(args, format);
    pthread_mutex_lock(&violations_mutex);
    if (n_violations < MAX_VIOLATIONS) vsnprintf(violations[n_violations++], VIOLATION_BYTES, format, args);
    pthread_mutex_unlock(&violations_mutex);
    va_end(args);
}

int32_t fake_violations(void) { return n_violations; }

const char *fake_violation(int32_t i) { return i >= 0 && i < n_violations ? violations[i] : NULL; }

bool fake_take(int32_t *left) {
    pthread_mutex_lock(&fake_mutex);
    bool is = *left != 0;
    if (*left > 0) --*left;
    pthread_mutex_unlock(&fake_mutex);
    return is;
}

void fake_add(int64_t *counter, int64_t by) {
    pthread_mutex_lock(&fake_mutex);
    *counter += by;
    pthread_mutex_unlock(&fake_mutex);
}

void fake_count(fake_counts *out) {
    pthread_mutex_lock(&fake_mutex);
    *out = fake_seen;
    pthread_mutex_unlock(&fake_mutex);
}

fake_options *fake_settings(void) { return &fake_now; }

void fake_handed_in(id object) {
    pthread_mutex_lock(&fake_mutex);
    if ([handed_in indexOfObjectIdenticalTo:object] == NSNotFound) [handed_in addObject:object];
    pthread_mutex_unlock(&fake_mutex);
}

void fake_check_released(void) {
    @autoreleasepool {
        pthread_mutex_lock(&fake_mutex);
        for (NSUInteger before = 0; before != [handed_in count];) { /* a dictionary before what it holds */
            before = [handed_in count];
            for (NSUInteger i = before; i-- > 0;)
                if ([[handed_in objectAtIndex:i] retainCount] == 1) [handed_in removeObjectAtIndex:i]; /* ours alone */
        }
        for (NSUInteger i = 0; i < [handed_in count]; i++) {
            id object = [handed_in objectAtIndex:i];
            fake_violate("a %s that was handed in is still retained %lu times", object_getClassName(object),
                         (unsigned long)[object retainCount] - 1);
        }
        pthread_mutex_unlock(&fake_mutex);
    }
}

void fake_reset(const fake_options *options, fake_hook *hook, void *plan_run) {
    @autoreleasepool {
        pthread_mutex_lock(&fake_mutex);
        if (handed_in == nil) handed_in = [[NSMutableArray alloc] init];
        [handed_in removeAllObjects];
        fake_now = *options;
        fake_seen.compiles = fake_seen.loads = fake_seen.unloads = fake_seen.evaluates = fake_seen.refused = 0;
        fake_seen.locks = fake_seen.unlocks = 0;
        fake_forget_poison();
        fake_compiler = hook;
        memcpy(&fake_plan_run, &plan_run, sizeof plan_run);
        n_violations = 0;
        pthread_mutex_unlock(&fake_mutex);
    }
}

const char *fake_temporary_directory(void) {
    static char path[1024];
    @autoreleasepool {
        snprintf(path, sizeof path, "%s", [NSTemporaryDirectory() UTF8String]);
    }
    return path;
}

/* ---- Objects ---- */
void fake_born(FakeObject *object, int64_t *alive) {
    object->alive = alive;
    fake_add(alive, 1);
}

@implementation FakeObject
- (void)end {
}
- (void)dealloc {
    [self end];
    if (alive != NULL) fake_add(alive, -1);
    object_setClass(self, [FakeDead class]); /* the memory stays: a message to it is noticed */
    if (0) [super dealloc];
}
@end

bool fake_is(id object, NSString *name) {
    Class class = NSClassFromString(name);
    for (Class c = object == nil ? Nil : object_getClass(object); c != Nil; c = class_getSuperclass(c))
        if (c == class) return true;
    return false;
}

@implementation FakeDead
- (id)retain {
    fake_violate("retain of a freed object");
    return self;
}
- (oneway void)release {
    fake_violate("release of a freed object");
}
- (id)autorelease {
    fake_violate("autorelease of a freed object");
    return self;
}
- (NSString *)hexStringIdentifier {
    fake_violate("hexStringIdentifier of a freed model");
    return nil;
}
- (BOOL)compileWithQoS:(unsigned int)qos options:(id)options error:(NSError **)error {
    (void)qos, (void)options, (void)error;
    fake_violate("compile of a freed model");
    return NO;
}
- (BOOL)loadWithQoS:(unsigned int)qos options:(id)options error:(NSError **)error {
    (void)qos, (void)options, (void)error;
    fake_violate("load of a freed model");
    return NO;
}
- (BOOL)evaluateWithQoS:(unsigned int)qos options:(id)options request:(id)request error:(NSError **)error {
    (void)qos, (void)options, (void)request, (void)error;
    fake_violate("evaluate of a freed model");
    return NO;
}
- (BOOL)unloadWithQoS:(unsigned int)qos error:(NSError **)error {
    (void)qos, (void)error;
    fake_violate("unload of a freed model");
    return NO;
}
@end
