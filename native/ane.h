/* ane.h: the C API of the ANE shim, the extension anert._ane, and the only declaration of it.
 *
 * cffi reads this file as it reads anert.h: plain C, no Apple types. The extension exists on macOS, and on Linux in test
 * builds, against a stand-in for the framework. Every fallible function returns an anert_status and takes an anert_error
 * last; it may be NULL. Nothing prints. An Objective-C exception becomes ESYSTEM, a NO of the engine EREFUSED with the
 * framework's own text. Any thread may call; every entry has its autorelease pool.
 *
 * Ownership
 *   anert_ane          the opened framework: classes, IOSurface functions. Everything below holds a reference to it.
 *   anert_ane_surface  one IOSurface.
 *   anert_ane_program  one _ANEInMemoryModel, its sources and its claim on the staging directory.
 *   anert_ane_binding  one _ANERequest; holds its program and its surfaces.
 * Handles may be freed in any order, each once: `free` ends the caller's claim, and what a binding holds lives on with it.
 * A program is unloaded when its last holder is gone.
 *
 * Process-wide state, and no other: the staging directories in use, counted by content hash (two programs of the same
 * content share one), and the two counters below. */
#ifndef ANERT_ANE_H
#define ANERT_ANE_H
#include <stddef.h>
#include <stdint.h>

#include "status.h"

/* ---- Opening ----
 * NULL is the system's path. Another path is for test builds; elsewhere it is EUNSUPPORTED. EUNAVAILABLE says which of
 * framework, symbol, class, selector or type encoding is not as expected. Nothing is cached: each open looks again. */
typedef struct anert_ane anert_ane;
anert_status anert_ane_open(const char *framework, const char *iosurface, anert_ane **out, anert_error *err);
void anert_ane_free(anert_ane *ane); /* NULL is fine, here and in every free */

/* The private API that this build calls, as found: for a report. `found` is "" where class or selector is missing. */
typedef struct {
    const char *class_name, *selector;
    int32_t class_method; /* 1: '+' */
    int32_t ok;
    char expected[64], found[64]; /* type encodings without offsets and names: "B@:I@^@" */
} anert_ane_selector;
int32_t anert_ane_selectors(void); /* how many there are */
/* Fills out[0..anert_ane_selectors()). EUNAVAILABLE if the framework does not open at all. */
anert_status anert_ane_inspect(const char *framework, anert_ane_selector *out, anert_error *err);

/* ---- Surfaces: IOSurfaces, zeroed ----
 * nbytes is taken as it is; rounding up to what the engine likes (16 KiB, 48 KiB at least) is the caller's. The address is
 * the same for the surface's whole life, and its memory may be touched while a lock is held. */
typedef struct anert_ane_surface anert_ane_surface;
anert_status anert_ane_surface_new(anert_ane *ane, size_t nbytes, anert_ane_surface **out, anert_error *err);
void anert_ane_surface_free(anert_ane_surface *surface);
void *anert_ane_surface_base(const anert_ane_surface *surface);
size_t anert_ane_surface_size(const anert_ane_surface *surface);   /* as asked for */
uint64_t anert_ane_surface_seed(const anert_ane_surface *surface); /* advances at each write-unlock and each run into it */
/* read_only: 1 shared with other readers, 0 exclusive. Nobody waits: ESTATE if a writer holds it (or, for a writer, anybody),
 * or while a run uses it. Unlock takes the same flag. No lock may be held on a surface across a run that uses it. */
anert_status anert_ane_surface_lock(anert_ane_surface *surface, int32_t read_only, anert_error *err);
anert_status anert_ane_surface_unlock(anert_ane_surface *surface, int32_t read_only, anert_error *err);

/* ---- Programs ---- */
typedef struct {
    const char *path; /* as the text's BLOBFILE names it: "@model_path/weights/w.bin" */
    const void *data;
    size_t nbytes;
} anert_ane_blob;
typedef struct anert_ane_program anert_ane_program;
/* Compiles MIL text (UTF-8, need not end with NUL) and its weight files; both are copied. EINVAL for a path outside
 * @model_path/, EREFUSED with the compiler's text. Counts as a compile whether it works or not. */
anert_status anert_ane_compile(anert_ane *ane, const char *text, size_t text_bytes, const anert_ane_blob *blobs,
                               int32_t n_blobs, anert_ane_program **out, anert_error *err);
/* Puts the program on the engine; once more after 100 ms if the engine says NO the first time. No compile, even after an
 * unload. ESTATE if it is loaded. */
anert_status anert_ane_program_load(anert_ane_program *program, anert_error *err);
anert_status anert_ane_program_unload(anert_ane_program *program, anert_error *err); /* waits for a run in flight */
int32_t anert_ane_program_loaded(const anert_ane_program *program);
const char *anert_ane_program_id(const anert_ane_program *program); /* the framework's content hash: a file name */
void anert_ane_program_free(anert_ane_program *program);

/* ---- Bindings: a request, built once ----
 * The engine puts inputs on the function's parameters in byte order of their names, outputs likewise: ports may come in
 * any order and are sorted here. EINVAL for a name that comes twice, a surface below nbytes, or one that is written and
 * bound a second time. */
typedef struct {
    const char *name;
    anert_ane_surface *surface;
    size_t nbytes; /* what the port needs */
} anert_ane_port;
typedef struct anert_ane_binding anert_ane_binding;
anert_status anert_ane_bind(anert_ane_program *program, const anert_ane_port *inputs, int32_t n_inputs,
                            const anert_ane_port *outputs, int32_t n_outputs, anert_ane_binding **out,
                            anert_error *err);
/* One evaluate, complete when it returns. *nanoseconds (may be NULL) is the time of the framework's call alone. ESTATE if
 * this binding is running, the program is not loaded, or a surface is locked. Runs of one program wait for each other. */
anert_status anert_ane_run(anert_ane_binding *binding, uint64_t *nanoseconds, anert_error *err);
void anert_ane_binding_free(anert_ane_binding *binding);

/* ---- Counters of this process ---- */
int64_t anert_ane_compiles(void); /* compiles tried: the engine tires after about 119 */
int64_t anert_ane_loaded(void);   /* programs loaded now: at most about 128 */
#endif
