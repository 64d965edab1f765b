/* IOSurfaceRef.h: the types of Apple's IOSurface that the shim names; its functions are looked up when it runs. */
#pragma once
#include <mach/kern_return.h>
#include <stdint.h>
typedef struct __IOSurface *IOSurfaceRef;
typedef uint32_t IOSurfaceLockOptions;
enum { kIOSurfaceLockReadOnly = 1 };
