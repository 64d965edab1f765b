/* IOSurfaceRef.h: of Apple's IOSurface what the shim uses: types alone, its functions are looked up at run time. */
#ifndef ANERT_MACSTUB_IOSURFACE_H
#define ANERT_MACSTUB_IOSURFACE_H
#include <mach/kern_return.h>
#include <stdint.h>

typedef struct __IOSurface *IOSurfaceRef;
typedef enum : uint32_t { kIOSurfaceLockReadOnly = 1, kIOSurfaceLockAvoidSync = 2 } IOSurfaceLockOptions;
#endif
