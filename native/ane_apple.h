/* ane_apple.h: what the shim's files share: Apple's types, the private classes as protocols, the handles.
 *
 * Manual retain/release: what ships is what the tests ran. Private classes are reached through Class<P> and id<P>, so the
 * compiler sends with the right ABI and a misspelt selector does not compile (-Werror=objc-method-access). */
#ifndef ANERT_ANE_APPLE_H
#define ANERT_ANE_APPLE_H
#include <pthread.h>
#include <stdlib.h>

#include "ane.h"
#include "internal.h"

#import <Foundation/Foundation.h>

#if defined(__APPLE__)
#include <IOSurface/IOSurfaceRef.h>
#else /* a test build: the stand-in takes NSDictionary and NSString for the CF types, as toll-free bridging does */
typedef const void *CFTypeRef;
typedef const void *CFStringRef;
typedef const void *CFDictionaryRef;
typedef struct __IOSurface *IOSurfaceRef;
typedef int kern_return_t;
typedef uint32_t IOSurfaceLockOptions;
enum { kIOSurfaceLockReadOnly = 1 };
#endif

/* Guards an entry: every Objective-C exception becomes a status, every autoreleased object ends here. */
#define GUARDED @autoreleasepool { @try {
#define UNGUARDED(err) } @catch (NSException *exception) { return ane_caught(err, exception); } \
    @catch (...) { return ane_caught(err, nil); } }

/* ---- The private framework (AppleNeuralEngine), each message as training and inference projects of 2024 to 2026 send it
 * on macOS 15 and 26; ane_framework.m compares the type encodings with these before it sends anything. ---- */
@protocol AneDescriptorClass
/* text: UTF-8 as NSData (an NSString crashes). weights: path -> {offset: 0, data: NSData}, never nil. plist: nil. */
+ (id)modelWithMILText:(NSData *)text weights:(NSDictionary *)weights optionsPlist:(id)plist;
@end
@protocol AneModelClass
+ (id)inMemoryModelWithDescriptor:(id)descriptor;
@end
@protocol AneModel <NSObject>
- (NSString *)hexStringIdentifier; /* names the staging directory below NSTemporaryDirectory() */
- (BOOL)compileWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error;
- (BOOL)loadWithQoS:(unsigned int)qos options:(NSDictionary *)options error:(NSError **)error;
- (BOOL)evaluateWithQoS:(unsigned int)qos options:(NSDictionary *)options request:(id)request error:(NSError **)error;
- (BOOL)unloadWithQoS:(unsigned int)qos error:(NSError **)error; /* no options; removes the staging directory */
@end
@protocol AneSurfaceObjectClass
+ (id)objectWithIOSurface:(IOSurfaceRef)surface;
@end
@protocol AneRequestClass
/* arrays of _ANEIOSurfaceObject and NSNumber; weights and stats nil; procedure: an NSNumber, not an int. */
+ (id)requestWithInputs:(NSArray *)inputs
           inputIndices:(NSArray *)inputIndices
                outputs:(NSArray *)outputs
          outputIndices:(NSArray *)outputIndices
          weightsBuffer:(id)weights
              perfStats:(id)stats
         procedureIndex:(NSNumber *)procedure;
+ (id)requestWithInputs:(NSArray *)inputs
           inputIndices:(NSArray *)inputIndices
                outputs:(NSArray *)outputs
          outputIndices:(NSArray *)outputIndices
         procedureIndex:(NSNumber *)procedure;
@end

/* ---- IOSurface.framework and CFRelease, looked up by name ---- */
typedef struct {
    IOSurfaceRef (*create)(CFDictionaryRef properties); /* +1 */
    kern_return_t (*lock)(IOSurfaceRef surface, IOSurfaceLockOptions options, uint32_t *seed);
    kern_return_t (*unlock)(IOSurfaceRef surface, IOSurfaceLockOptions options, uint32_t *seed);
    void *(*base)(IOSurfaceRef surface);
    size_t (*alloc_size)(IOSurfaceRef surface);
    void (*release)(CFTypeRef object);
    CFStringRef *width, *height, *bytes_per_element, *bytes_per_row, *nbytes, *pixel_format;
} iosurface_api;

struct anert_ane {
    _Atomic int32_t holders;
    Class<AneDescriptorClass> descriptor_class;
    Class<AneModelClass> model_class;
    Class<AneSurfaceObjectClass> surface_class;
    Class<AneRequestClass> request_class;
    bool short_request; /* the request without weightsBuffer and perfStats is the one that is as expected */
    iosurface_api ios;
};

struct anert_ane_surface {
    _Atomic int32_t holders;
    anert_ane *ane;
    IOSurfaceRef ref; /* +1 */
    void *base;
    size_t nbytes;
    _Atomic uint64_t seed;
    pthread_mutex_t mutex;               /* of the four below */
    int32_t readers, reading, writing;   /* CPU locks shared; runs that read it; runs that write it (0 or 1) */
    bool writer;                         /* CPU lock exclusive */
};

/* ane_framework.m */
anert_status ane_fail(anert_error *err, anert_status status, NSString *message); /* anert_fail, on one line */
anert_status ane_caught(anert_error *err, NSException *exception); /* ESYSTEM with its name and reason; nil is another's */
/* EREFUSED: domain, code and text of the error and of what lies below it; a NO may come without one. */
anert_status ane_refused(anert_error *err, NSString *call, NSError *error);
anert_ane *ane_hold(anert_ane *ane);
/* surface_iosurface.m */
anert_status iosurface_open(const char *path, iosurface_api *ios, anert_error *err);
anert_ane_surface *surface_hold(anert_ane_surface *surface);
/* A run claims what it reads or writes and gives it back; ESTATE if the CPU holds a lock or another run writes it. */
anert_status surface_claim(anert_ane_surface *surface, bool write, anert_error *err);
void surface_release(anert_ane_surface *surface, bool write);
#endif
