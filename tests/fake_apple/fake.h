/* fake.h: the controls of a stand-in for AppleNeuralEngine.framework and IOSurface.framework.
 *
 * It takes the calls of the real ones, enforces their contract, and computes with anert's CPU engine. What breaks the
 * contract is noted as a violation, in words, and then goes on as the real framework would: NO with an error, nil, or
 * quietly. cffi reads this header as it reads anert.h. */
#ifndef FAKE_APPLE_H
#define FAKE_APPLE_H
#include <stddef.h>
#include <stdint.h>

/* ---- What the compiler hands to Python, and gets back ---- */
typedef struct {
    const char *path;
    const void *data;
    size_t nbytes;
} fake_blob;
typedef struct {
    char name[128];
    int32_t output; /* 1: a result */
    int32_t buffer; /* its number in the plan */
    size_t nbytes;
    int64_t width;  /* the trailing axis */
} fake_port;
enum { FAKE_COMPILED = 0, FAKE_INVALID_MIL = 1, FAKE_COMPILATION_FAILURE = 2 };
typedef struct {
    const char *text; /* in */
    size_t text_bytes;
    const fake_blob *blobs;
    int32_t n_blobs;
    int32_t verdict; /* out: one of the above, then the compiler's words */
    char message[512];
    char violation[512]; /* a breach of contract that the hook found; "" for none */
    int32_t poison;      /* the program holds an op that spoils the engine for this process */
    const void *plan;    /* out: anert_plan, its pool, its buffers' addresses but for ports and arena */
    void *pool;
    void *const *bases;
    int32_t n_bases;
    size_t arena_bytes;
    const fake_port *ports; /* in declaration order */
    int32_t n_ports;
} fake_job;
typedef void fake_hook(fake_job *job); /* what it points `job` to must live until the next fake_reset */

/* ---- Options ---- */
typedef struct {
    int32_t compile_limit;       /* compiles of a process; later ones are NO without an error */
    int32_t load_limit;          /* programs loaded at a time */
    int32_t load_failures;       /* so many loads from now are NO without an error */
    int32_t compile_failures;    /* so many compiles from now are refused with an error below an error */
    int32_t unload_failures;     /* so many unloads from now are refused */
    int32_t evaluate_failures;   /* so many evaluates from now are NO at once; -1: all */
    int32_t declaration_order;   /* 1: ports bind in the order of the text, 0: in byte order of their names */
    int32_t max_inputs;          /* past it inputs are silently permuted */
    int32_t width_multiple;      /* of the trailing axis of inputs, else status 0x1d */
    int32_t equal_sizes;         /* 1: all input surfaces must have one size, outputs too */
    int32_t evaluate_us;         /* no evaluate that works returns sooner */
    int32_t lock_failures;       /* so many IOSurfaceLock from now answer an error */
    int32_t unlock_failures;     /* so many IOSurfaceUnlock from now answer an error, and leave the lock */
    int32_t create_failures;     /* so many IOSurfaceCreate from now give NULL */
    int32_t short_surface;       /* 1: IOSurfaceCreate grants less than it was asked for */
    int32_t seal;                /* 1: memory that is not locked cannot be touched at all: SIGSEGV */
    int32_t keep_stage;          /* 1: unload leaves the staging directory */
    int32_t odd_hash;            /* 1: hexStringIdentifier is no name of a directory */
    int32_t nil_descriptor, nil_model, nil_wrapper, nil_request;
    char throws[64];             /* a selector's first word that raises an exception, once: "compileWithQoS" */
} fake_options;

/* Registers the four classes, once per process: `missing` is a class, or "Class selector|..." that are left out, `changed`
 * "Class selector|Class selector=types|..." whose type encodings differ; "" or NULL for none. */
void fake_install(const char *missing, const char *changed);
/* Forgets all that happened, frees what the plans need no more, takes new options. plan_run: anert_plan_run. */
void fake_reset(const fake_options *options, fake_hook *hook, void *plan_run);
fake_options *fake_settings(void); /* those in force, to be changed in place; counts go down in it */

/* ---- What was seen ---- */
typedef struct {
    int64_t compiles, loads, unloads, evaluates, refused; /* calls; refused: evaluates that were NO */
    int64_t locks, unlocks;
    int64_t loaded;                                           /* now */
    int64_t descriptors, models, wrappers, requests, surfaces; /* alive now */
} fake_counts;
void fake_count(fake_counts *out);
int32_t fake_violations(void);
const char *fake_violation(int32_t i);
/* Notes as violations whatever of the caller's objects is still held by somebody else: call it when all is freed. */
void fake_check_released(void);
const char *fake_temporary_directory(void);
#endif
