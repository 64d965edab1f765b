/* status.h: how every call of the C APIs (anert.h, ane.h) says whether it worked.
 *
 * Plain C as cffi reads it; build_ffi.py puts it in the place of its #include. */
#ifndef ANERT_STATUS_H
#define ANERT_STATUS_H
#include <stdint.h>

/* ---- Errors: 0 is success. `message` is one line, NUL-terminated. ---- */
typedef int32_t anert_status;
enum {
    ANERT_OK = 0,
    ANERT_EINVAL = -1,       /* an argument is out of range or inconsistent */
    ANERT_ENOMEM = -2,       /* memory was not granted */
    ANERT_ESTATE = -3,       /* right call, wrong moment: locked, busy, released */
    ANERT_EUNSUPPORTED = -4, /* this CPU or build cannot do it */
    ANERT_ESYSTEM = -5,      /* a system call failed */
    ANERT_EREFUSED = -6,     /* the Neural Engine answered NO; the message holds its own words */
    ANERT_EUNAVAILABLE = -7  /* the framework, or a class or selector of it, is not as this build knows it */
};
typedef struct {
    int32_t status;
    char message[508];
} anert_error;
#endif
