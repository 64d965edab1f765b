/* ane.m: MIL text to the Neural Engine through the private AppleNeuralEngine.framework: compile, load, evaluate, unload.
 * Order of calls and argument types are those of the in-memory path; ane_apple.h describes them. */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "ane_apple.h"

#define MODEL_PATH @"@model_path/"
enum { QOS = 21, HEX_BYTES = 256, LOAD_ATTEMPTS = 2, RETRY_MICROSECONDS = 100000 };

static _Atomic int64_t compiles, loaded;

/* ---- Staging directories: the framework names one by content, so programs of the same content share it ---- */
typedef struct stage {
    char hex[HEX_BYTES];
    int holders;
    pthread_mutex_t mutex; /* of the directory: held while its files are written, compiled, loaded or removed */
    struct stage *next;
} stage;
static pthread_mutex_t stages_mutex = PTHREAD_MUTEX_INITIALIZER;
static stage *stages;

static stage *stage_hold(const char *hex) {
    pthread_mutex_lock(&stages_mutex);
    stage *found = stages;
    while (found != NULL && strcmp(found->hex, hex) != 0) found = found->next;
    if (found == NULL && (found = calloc(1, sizeof *found)) != NULL) {
        snprintf(found->hex, sizeof found->hex, "%s", hex);
        pthread_mutex_init(&found->mutex, NULL);
        found->next = stages;
        stages = found;
    }
    if (found != NULL) found->holders++;
    pthread_mutex_unlock(&stages_mutex);
    return found;
}

static NSString *stage_path(const char *hex) {
    return [NSTemporaryDirectory() stringByAppendingPathComponent:[NSString stringWithUTF8String:hex]];
}

/* The last holder removes the directory; a failure leaves files in the temporary directory and nothing else. */
static void stage_drop(stage *held) {
    if (held == NULL) return;
    pthread_mutex_lock(&stages_mutex);
    if (--held->holders == 0) {
        stage **link = &stages;
        while (*link != held) link = &(*link)->next;
        *link = held->next;
        @autoreleasepool {
            [[NSFileManager defaultManager] removeItemAtPath:stage_path(held->hex) error:NULL];
        }
        pthread_mutex_destroy(&held->mutex);
        free(held);
    }
    pthread_mutex_unlock(&stages_mutex);
}

/* Writes every file that is not there, folders included. */
static anert_status stage_write(const char *hex, NSDictionary *files, anert_error *err) {
    NSFileManager *manager = [NSFileManager defaultManager];
    for (NSString *name in files) {
        NSString *path = [stage_path(hex) stringByAppendingPathComponent:name];
        NSError *error = nil;
        if ([manager fileExistsAtPath:path]) continue;
        BOOL made = [manager createDirectoryAtPath:[path stringByDeletingLastPathComponent]
                       withIntermediateDirectories:YES
                                        attributes:nil
                                             error:&error];
        if (!made || ![[files objectForKey:name] writeToFile:path options:NSDataWritingAtomic error:&error])
            return ane_fail(err, ANERT_ESYSTEM,
                        [NSString stringWithFormat:@"the staging file %@ cannot be written: %@", path,
                                                   [error localizedDescription]]);
    }
    return ANERT_OK;
}

/* ---- Programs ---- */
struct anert_ane_program {
    _Atomic int32_t holders;
    anert_ane *ane;
    pthread_mutex_t mutex; /* one compile, load, evaluate or unload at a time */
    id<AneModel> model;    /* +1 */
    NSMutableDictionary *files; /* +1: what the staging directory must hold, by path below it */
    stage *stage;
    bool loaded;
    char hex[HEX_BYTES];
};

/* The path below the staging directory of a BLOBFILE path; nil for one that is not @model_path/ and a plain way down. */
static NSString *blob_name(NSString *path) {
    if (![path hasPrefix:MODEL_PATH]) return nil;
    NSString *name = [path substringFromIndex:[MODEL_PATH length]];
    for (NSString *part in [name componentsSeparatedByString:@"/"])
        if ([part length] == 0 || [part isEqualToString:@".."] || [part isEqualToString:@"."]) return nil;
    NSArray *taken = @[ @"model.mil", @"net.plist", @"data" ];
    return [taken containsObject:name] ? nil : name;
}

/* Copies blobs into `files`, by name, and into `weights`, as the descriptor wants them. */
static anert_status take_blobs(const anert_ane_blob *blobs, int32_t n, NSMutableDictionary *files,
                               NSMutableDictionary *weights, anert_error *err) {
    for (int32_t i = 0; i < n; i++) {
        NSString *path = blobs[i].path == NULL ? nil : [NSString stringWithUTF8String:blobs[i].path];
        NSString *name = blob_name(path);
        bool whole = blobs[i].data != NULL || blobs[i].nbytes == 0;
        if (path == nil || name == nil || [weights objectForKey:path] != nil || !whole)
            return anert_fail(err, ANERT_EINVAL, "blob %d, %s, is not a new file below @model_path/", i,
                              blobs[i].path == NULL ? "without a path" : blobs[i].path);
        NSData *data = [NSData dataWithBytes:blobs[i].data length:blobs[i].nbytes];
        [files setObject:data forKey:name];
        [weights setObject:@{@"offset" : @0, @"data" : data} forKey:path];
    }
    return ANERT_OK;
}

static anert_status take_hex(anert_ane_program *program, anert_error *err) {
    const char *hex = [[program->model hexStringIdentifier] UTF8String];
    if (hex == NULL || *hex == '\0' || *hex == '.' || strlen(hex) >= HEX_BYTES || strchr(hex, '/') != NULL)
        return anert_fail(err, ANERT_EUNAVAILABLE, "hexStringIdentifier is %s, expected the name of a directory",
                          hex == NULL ? "nil" : hex);
    snprintf(program->hex, sizeof program->hex, "%s", hex);
    program->stage = stage_hold(hex);
    return program->stage != NULL ? ANERT_OK : anert_fail(err, ANERT_ENOMEM, "no memory for a staging record");
}

/* Descriptor, model and staging claim. */
static anert_status describe(anert_ane_program *program, const char *text, size_t text_bytes,
                             const anert_ane_blob *blobs, int32_t n_blobs, anert_error *err) {
    GUARDED
    NSData *mil = [NSData dataWithBytes:text length:text_bytes];
    NSMutableDictionary *weights = [NSMutableDictionary dictionary];
    program->files = [[NSMutableDictionary alloc] initWithObjectsAndKeys:mil, @"model.mil", nil];
    anert_status status = take_blobs(blobs, n_blobs, program->files, weights, err);
    if (status != ANERT_OK) return status;
    id descriptor = [program->ane->descriptor_class modelWithMILText:mil weights:weights optionsPlist:nil];
    if (descriptor == nil)
        return anert_fail(err, ANERT_EREFUSED, "the engine makes no descriptor of %zu bytes of MIL text", text_bytes);
    id model = [program->ane->model_class inMemoryModelWithDescriptor:descriptor];
    if (model == nil) return anert_fail(err, ANERT_EREFUSED, "the engine makes no model of its descriptor");
    program->model = [model retain];
    return take_hex(program, err);
    UNGUARDED(err)
}

/* The staging mutex is held. What the compiler leaves is kept, because an unload removes it. */
static anert_status compile_staged(anert_ane_program *program, anert_error *err) {
    GUARDED
    anert_status status = stage_write(program->hex, program->files, err);
    if (status != ANERT_OK) return status;
    NSError *error = nil;
    atomic_fetch_add(&compiles, 1);
    if (![program->model compileWithQoS:QOS options:@{} error:&error])
        return ane_refused(err, @"to compile the program", error);
    for (NSString *name in @[ @"net.plist", @"data" ]) {
        NSData *data = [NSData dataWithContentsOfFile:[stage_path(program->hex) stringByAppendingPathComponent:name]];
        if (data != nil) [program->files setObject:data forKey:name];
    }
    return ANERT_OK;
    UNGUARDED(err)
}

anert_status anert_ane_compile(anert_ane *ane, const char *text, size_t text_bytes, const anert_ane_blob *blobs,
                               int32_t n_blobs, anert_ane_program **out, anert_error *err) {
    if (out == NULL) return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    if (ane == NULL || text == NULL || text_bytes == 0 || n_blobs < 0 || (blobs == NULL && n_blobs > 0))
        return anert_fail(err, ANERT_EINVAL, "an opened engine, MIL text and its blobs are needed");
    anert_ane_program *program = calloc(1, sizeof *program);
    if (program == NULL) return anert_fail(err, ANERT_ENOMEM, "no memory for the record of a program");
    program->holders = 1;
    program->ane = ane_hold(ane);
    pthread_mutex_init(&program->mutex, NULL);
    anert_status status = describe(program, text, text_bytes, blobs, n_blobs, err);
    if (status == ANERT_OK) {
        pthread_mutex_lock(&program->stage->mutex);
        status = compile_staged(program, err);
        pthread_mutex_unlock(&program->stage->mutex);
    }
    if (status == ANERT_OK) *out = program;
    else anert_ane_program_free(program);
    return status;
}

/* Both mutexes are held, here and below. */
static anert_status load_staged(anert_ane_program *program, anert_error *err) {
    GUARDED
    NSError *error = nil;
    BOOL yes = NO;
    for (int attempt = 0; attempt < LOAD_ATTEMPTS && !yes; attempt++) {
        if (attempt > 0) usleep(RETRY_MICROSECONDS); /* a slot is being reclaimed */
        anert_status status = stage_write(program->hex, program->files, err); /* another process may have removed them */
        if (status != ANERT_OK) return status;
        error = nil;
        yes = [program->model loadWithQoS:QOS options:@{} error:&error];
    }
    if (!yes) return ane_refused(err, @"to load the program", error);
    program->loaded = true;
    atomic_fetch_add(&loaded, 1);
    return ANERT_OK;
    UNGUARDED(err)
}

static anert_status unload_staged(anert_ane_program *program, anert_error *err) {
    GUARDED
    NSError *error = nil;
    if (![program->model unloadWithQoS:QOS error:&error]) return ane_refused(err, @"to unload the program", error);
    program->loaded = false;
    atomic_fetch_sub(&loaded, 1);
    return ANERT_OK;
    UNGUARDED(err)
}

typedef anert_status staged_call(anert_ane_program *program, anert_error *err);

/* Runs `call` if the program is loaded, or is not, as `expected` says. */
static anert_status with_program(anert_ane_program *program, bool expected, staged_call *call, anert_error *err) {
    if (program == NULL) return anert_fail(err, ANERT_EINVAL, "program is NULL");
    pthread_mutex_lock(&program->mutex);
    pthread_mutex_lock(&program->stage->mutex);
    anert_status status;
    if (program->loaded == expected) status = call(program, err);
    else status = anert_fail(err, ANERT_ESTATE, "the program is %s loaded", expected ? "not" : "already");
    pthread_mutex_unlock(&program->stage->mutex);
    pthread_mutex_unlock(&program->mutex);
    return status;
}

anert_status anert_ane_program_load(anert_ane_program *program, anert_error *err) {
    return with_program(program, false, load_staged, err);
}

anert_status anert_ane_program_unload(anert_ane_program *program, anert_error *err) {
    return with_program(program, true, unload_staged, err);
}

int32_t anert_ane_program_loaded(const anert_ane_program *program) {
    if (program == NULL) return 0;
    anert_ane_program *locked = (anert_ane_program *)program;
    pthread_mutex_lock(&locked->mutex);
    bool is = program->loaded;
    pthread_mutex_unlock(&locked->mutex);
    return is;
}

const char *anert_ane_program_id(const anert_ane_program *program) { return program == NULL ? NULL : program->hex; }

void anert_ane_program_free(anert_ane_program *program) {
    if (program == NULL || atomic_fetch_sub(&program->holders, 1) > 1) return;
    if (program->loaded) with_program(program, true, unload_staged, NULL); /* refused: stays in the count of the loaded */
    @autoreleasepool {
        [program->model release];
        [program->files release];
    }
    stage_drop(program->stage);
    pthread_mutex_destroy(&program->mutex);
    anert_ane_free(program->ane);
    free(program);
}

int64_t anert_ane_compiles(void) { return atomic_load(&compiles); }

int64_t anert_ane_loaded(void) { return atomic_load(&loaded); }

/* ---- Bindings ---- */
struct anert_ane_binding {
    anert_ane_program *program;
    id request; /* +1 */
    _Atomic bool running;
    int32_t n_inputs, n_ports;
    anert_ane_port ports[]; /* inputs, then outputs, each in byte order of their names; names are not kept */
};

static int by_name(const void *a, const void *b) {
    return strcmp(((const anert_ane_port *)a)->name, ((const anert_ane_port *)b)->name);
}

static anert_status check_ports(const anert_ane_port *ports, int32_t n, anert_error *err) {
    for (int32_t i = 0; i < n; i++) {
        const anert_ane_port *port = &ports[i];
        if (port->name == NULL || port->surface == NULL)
            return anert_fail(err, ANERT_EINVAL, "port %d has no %s", i, port->name == NULL ? "name" : "surface");
        if (port->surface->nbytes < port->nbytes)
            return anert_fail(err, ANERT_EINVAL, "port %s needs %zu bytes, its surface has %zu", port->name, port->nbytes,
                              port->surface->nbytes);
    }
    return ANERT_OK;
}

/* Sorted ports: no name twice on one side, no surface that is written and bound again. */
static anert_status check_sorted(const anert_ane_binding *binding, anert_error *err) {
    const anert_ane_port *ports = binding->ports;
    for (int32_t i = 1; i < binding->n_ports; i++)
        if (i != binding->n_inputs && strcmp(ports[i - 1].name, ports[i].name) == 0)
            return anert_fail(err, ANERT_EINVAL, "port %s comes twice", ports[i].name);
    for (int32_t i = binding->n_inputs; i < binding->n_ports; i++)
        for (int32_t j = 0; j < i; j++)
            if (ports[i].surface == ports[j].surface)
                return anert_fail(err, ANERT_EINVAL, "output %s is on the surface of port %s", ports[i].name,
                                  ports[j].name);
    return ANERT_OK;
}

/* Appends ports[0..n) to the two arrays that a request wants; false if the framework wraps no surface. */
static bool wrap(const anert_ane *ane, const anert_ane_port *ports, int32_t n, NSMutableArray *objects,
                 NSMutableArray *indices) {
    for (int32_t i = 0; i < n; i++) {
        id object = [ane->surface_class objectWithIOSurface:ports[i].surface->ref];
        if (object == nil) return false;
        [objects addObject:object];
        [indices addObject:[NSNumber numberWithInt:i]];
    }
    return true;
}

static id request_of(const anert_ane *ane, NSArray *inputs, NSArray *input_indices, NSArray *outputs,
                     NSArray *output_indices) {
    if (ane->short_request)
        return [ane->request_class requestWithInputs:inputs
                                        inputIndices:input_indices
                                             outputs:outputs
                                       outputIndices:output_indices
                                      procedureIndex:@0];
    return [ane->request_class requestWithInputs:inputs
                                    inputIndices:input_indices
                                         outputs:outputs
                                   outputIndices:output_indices
                                   weightsBuffer:nil
                                       perfStats:nil
                                  procedureIndex:@0];
}

static anert_status make_request(anert_ane_binding *binding, anert_error *err) {
    const anert_ane *ane = binding->program->ane;
    GUARDED
    NSMutableArray *inputs = [NSMutableArray array], *input_indices = [NSMutableArray array];
    NSMutableArray *outputs = [NSMutableArray array], *output_indices = [NSMutableArray array];
    if (!wrap(ane, binding->ports, binding->n_inputs, inputs, input_indices) ||
        !wrap(ane, binding->ports + binding->n_inputs, binding->n_ports - binding->n_inputs, outputs, output_indices))
        return anert_fail(err, ANERT_EREFUSED, "the engine does not take a surface");
    id request = request_of(ane, inputs, input_indices, outputs, output_indices);
    if (request == nil)
        return anert_fail(err, ANERT_EREFUSED, "the engine makes no request of %d inputs and %d outputs",
                          binding->n_inputs, binding->n_ports - binding->n_inputs);
    binding->request = [request retain];
    return ANERT_OK;
    UNGUARDED(err)
}

anert_status anert_ane_bind(anert_ane_program *program, const anert_ane_port *inputs, int32_t n_inputs,
                            const anert_ane_port *outputs, int32_t n_outputs, anert_ane_binding **out,
                            anert_error *err) {
    if (out == NULL) return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    if (program == NULL || n_inputs < 0 || n_outputs < 1 || outputs == NULL || (inputs == NULL && n_inputs > 0))
        return anert_fail(err, ANERT_EINVAL, "a program, its inputs and at least one output are needed");
    anert_status status = check_ports(inputs, n_inputs, err);
    if (status == ANERT_OK) status = check_ports(outputs, n_outputs, err);
    if (status != ANERT_OK) return status;
    size_t n = (size_t)n_inputs + (size_t)n_outputs;
    anert_ane_binding *binding = calloc(1, sizeof *binding + n * sizeof *binding->ports);
    if (binding == NULL) return anert_fail(err, ANERT_ENOMEM, "no memory for a binding of %zu ports", n);
    binding->n_inputs = n_inputs;
    binding->n_ports = (int32_t)n;
    if (n_inputs > 0) memcpy(binding->ports, inputs, (size_t)n_inputs * sizeof *inputs);
    memcpy(binding->ports + n_inputs, outputs, (size_t)n_outputs * sizeof *outputs);
    qsort(binding->ports, (size_t)n_inputs, sizeof *binding->ports, by_name);
    qsort(binding->ports + n_inputs, (size_t)n_outputs, sizeof *binding->ports, by_name);
    status = check_sorted(binding, err);
    for (size_t i = 0; i < n; i++) {
        binding->ports[i].name = NULL; /* the caller's */
        surface_hold(binding->ports[i].surface);
    }
    atomic_fetch_add(&program->holders, 1);
    binding->program = program;
    if (status == ANERT_OK) status = make_request(binding, err);
    if (status == ANERT_OK) *out = binding;
    else anert_ane_binding_free(binding);
    return status;
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static anert_status evaluate(anert_ane_binding *binding, uint64_t *nanoseconds, anert_error *err) {
    GUARDED
    NSError *error = nil;
    uint64_t start = now_ns();
    BOOL yes = [binding->program->model evaluateWithQoS:QOS options:@{} request:binding->request error:&error];
    if (nanoseconds != NULL) *nanoseconds = now_ns() - start;
    return yes ? ANERT_OK : ane_refused(err, @"to evaluate the program", error);
    UNGUARDED(err)
}

/* The program's mutex is held. */
static anert_status run_claimed(anert_ane_binding *binding, uint64_t *nanoseconds, anert_error *err) {
    if (!binding->program->loaded) return anert_fail(err, ANERT_ESTATE, "the program is not loaded");
    anert_status status = ANERT_OK;
    int32_t claimed = 0;
    for (; claimed < binding->n_ports && status == ANERT_OK; claimed++)
        status = surface_claim(binding->ports[claimed].surface, claimed >= binding->n_inputs, err);
    if (status == ANERT_OK) {
        status = evaluate(binding, nanoseconds, err);
        for (int32_t i = binding->n_inputs; i < binding->n_ports; i++)
            atomic_fetch_add(&binding->ports[i].surface->seed, 1);
    } else {
        claimed--; /* the last was not granted */
    }
    while (claimed-- > 0) surface_release(binding->ports[claimed].surface, claimed >= binding->n_inputs);
    return status;
}

anert_status anert_ane_run(anert_ane_binding *binding, uint64_t *nanoseconds, anert_error *err) {
    if (binding == NULL) return anert_fail(err, ANERT_EINVAL, "binding is NULL");
    if (nanoseconds != NULL) *nanoseconds = 0;
    if (atomic_exchange(&binding->running, true))
        return anert_fail(err, ANERT_ESTATE, "this binding is already running: bind the program again to run it twice");
    pthread_mutex_lock(&binding->program->mutex);
    anert_status status = run_claimed(binding, nanoseconds, err);
    pthread_mutex_unlock(&binding->program->mutex);
    atomic_store(&binding->running, false);
    return status;
}

void anert_ane_binding_free(anert_ane_binding *binding) {
    if (binding == NULL) return;
    @autoreleasepool {
        [binding->request release];
    }
    for (int32_t i = 0; i < binding->n_ports; i++) anert_ane_surface_free(binding->ports[i].surface);
    anert_ane_program_free(binding->program);
    free(binding);
}
