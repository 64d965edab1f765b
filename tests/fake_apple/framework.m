/* framework.m: the four classes of AppleNeuralEngine.framework that the shim uses.
 *
 * They are made at run time, so that one can be missing or have another type encoding. A BOOL comes back with the upper
 * bits of its register set: whoever reads more than a byte reads YES. */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "contract.h"

#define DOMAIN @"com.apple.appleneuralengine"
#define COMPILER @"com.apple.appleneuralengine.compiler"
enum { MAX_PORTS = 256, MAX_QOS = 63 };
typedef unsigned long wide_bool;
static const wide_bool GARBAGE = 0xdead00;

static bool poisoned; /* an op has spoilt the engine */

static void raise_if_asked(const char *call) {
    if (strcmp(fake_now.throws, call) != 0) return;
    fake_now.throws[0] = '\0';
    [NSException raise:@"ANEFakeException" format:@"thrown\nby %s", call];
}

static wide_bool refuse(NSError **error, NSString *domain, NSInteger code, NSString *text, NSError *below) {
    if (error != NULL)
        *error = [NSError errorWithDomain:domain
                                     code:code
                                 userInfo:[NSDictionary dictionaryWithObjectsAndKeys:text, NSLocalizedDescriptionKey, below,
                                                                                    NSUnderlyingErrorKey, nil]];
    return GARBAGE | NO;
}

static wide_bool refuse_state(NSError **error, const char *what) {
    fake_violate("%s", what);
    return refuse(error, DOMAIN, 1, [NSString stringWithUTF8String:what], nil);
}

static wide_bool inference_error(NSError **error) {
    return refuse(error, DOMAIN, 8,
                  @"processRequest:model:qos:qIndex:modelStringID:options:error:: ANEProgramProcessRequestDirect() Failed "
                  @"with status=0x1d : statusType=0x9: Program Inference error",
                  nil);
}

static void check_call(const char *call, unsigned int qos, id options) {
    raise_if_asked(call);
    if (qos > MAX_QOS) fake_violate("%s: QoS %u", call, qos);
    if (![options isKindOfClass:[NSDictionary class]]) fake_violate("%s: options are no dictionary", call);
}

/* ---- _ANEInMemoryModelDescriptor ---- */
@interface FakeDescriptor : FakeObject {
@public
    NSData *mil;
    NSDictionary *weights;
}
@end
@implementation FakeDescriptor
- (void)end {
    [mil release];
    [weights release];
}
@end

static bool weights_are_whole(NSDictionary *weights) {
    for (id path in weights) {
        NSDictionary *entry = [weights objectForKey:path];
        bool known = [path isKindOfClass:[NSString class]] && [path hasPrefix:@"@model_path/"];
        known = known && [entry isKindOfClass:[NSDictionary class]];
        id offset = known ? [entry objectForKey:@"offset"] : nil, data = known ? [entry objectForKey:@"data"] : nil;
        if (![offset isKindOfClass:[NSNumber class]] || [offset intValue] != 0 || ![data isKindOfClass:[NSData class]]) {
            fake_violate("modelWithMILText: weights are @model_path/... -> {offset: @0, data: NSData}");
            return false;
        }
        fake_handed_in(data);
    }
    return true;
}

static id new_descriptor(id self, SEL selector, id text, id weights, id plist) {
    (void)selector;
    raise_if_asked("modelWithMILText");
    if (![text isKindOfClass:[NSData class]]) {
        fake_violate("modelWithMILText: the text is %s, not NSData", object_getClassName(text));
        return nil;
    }
    if (![weights isKindOfClass:[NSDictionary class]]) {
        fake_violate("modelWithMILText: the weights are %s", weights == nil ? "nil" : "no dictionary");
        return nil;
    }
    if (plist != nil) fake_violate("modelWithMILText: optionsPlist is not nil");
    if ([[[NSString alloc] initWithData:text encoding:NSUTF8StringEncoding] autorelease] == nil) {
        fake_violate("modelWithMILText: the text is not UTF-8");
        return nil;
    }
    if (!weights_are_whole(weights) || fake_now.nil_descriptor) return nil;
    fake_handed_in(text);
    fake_handed_in(weights);
    FakeDescriptor *made = [[[self alloc] init] autorelease];
    fake_born(made, &fake_seen.descriptors);
    made->mil = [text copy];
    made->weights = [weights copy];
    return made;
}

/* ---- _ANEInMemoryModel ---- */
@interface FakeModel : FakeObject {
@public
    FakeDescriptor *descriptor;
    NSString *hex;
    bool compiled, loaded, planned;
    int running;
    fake_job job;
    fake_blob *blobs;
    void *arena;
}
@end
@implementation FakeModel
- (void)end {
    if (running) fake_violate("a model is freed while it is evaluated");
    if (loaded) {
        fake_violate("a model is freed while it is loaded");
        fake_add(&fake_seen.loaded, -1);
    }
    [descriptor release];
    [hex release];
    free(blobs);
    free(arena);
}
@end

static uint64_t fnv(uint64_t hash, const void *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

static NSArray *sorted_paths(NSDictionary *weights) {
    return [[weights allKeys] sortedArrayUsingSelector:@selector(compare:)];
}

static NSData *blob_at(FakeModel *model, NSString *path) {
    return [[model->descriptor->weights objectForKey:path] objectForKey:@"data"];
}

static NSString *content_hash(FakeModel *model) {
    NSData *mil = model->descriptor->mil;
    uint64_t low = fnv(0xcbf29ce484222325u, [mil bytes], [mil length]), high = fnv(low, "anert", 5);
    for (NSString *path in sorted_paths(model->descriptor->weights)) {
        NSData *data = blob_at(model, path);
        low = fnv(fnv(low, [path UTF8String], strlen([path UTF8String])), [data bytes], [data length]);
        high = fnv(high, &low, sizeof low);
    }
    /* of this process: on a Mac two processes with one program would share a directory */
    NSString *format = fake_now.odd_hash ? @"../%08X%016llX%016llX" : @"%08X%016llX%016llX_%064d_%064d";
    return [NSString stringWithFormat:format, getpid(), (unsigned long long)high, (unsigned long long)low, 0, 0];
}

static id new_model(id self, SEL selector, id descriptor) {
    (void)selector;
    raise_if_asked("inMemoryModelWithDescriptor");
    if (!fake_is(descriptor, @"_ANEInMemoryModelDescriptor")) {
        fake_violate("inMemoryModelWithDescriptor: not a living descriptor");
        return nil;
    }
    if (fake_now.nil_model) return nil;
    FakeModel *made = [[[self alloc] init] autorelease];
    fake_born(made, &fake_seen.models);
    made->descriptor = [descriptor retain];
    made->hex = [content_hash(made) retain];
    return made;
}

static id model_hex(FakeModel *self, SEL selector) {
    (void)selector;
    raise_if_asked("hexStringIdentifier");
    return [[self->hex copy] autorelease];
}

static NSString *staged(FakeModel *model, NSString *name) {
    NSString *folder = [NSTemporaryDirectory() stringByAppendingPathComponent:model->hex];
    return [folder stringByAppendingPathComponent:name];
}

/* Whether the staging directory holds the sources. */
static bool sources_are_staged(FakeModel *model) {
    NSData *mil = [NSData dataWithContentsOfFile:staged(model, @"model.mil")];
    if (![mil isEqual:model->descriptor->mil]) {
        fake_violate("model.mil in the staging directory is %s", mil == nil ? "missing" : "another text");
        return false;
    }
    for (NSString *path in model->descriptor->weights) {
        NSData *data = [NSData dataWithContentsOfFile:staged(model, [path substringFromIndex:strlen("@model_path/")])];
        if ([data isEqual:blob_at(model, path)]) continue;
        fake_violate("%s in the staging directory is %s", [path UTF8String], data == nil ? "missing" : "other data");
        return false;
    }
    return true;
}

static NSData *compiled_data(FakeModel *model) {
    NSMutableData *all = [NSMutableData data];
    for (NSString *path in sorted_paths(model->descriptor->weights)) [all appendData:blob_at(model, path)];
    return all;
}

/* Hands the text to the hook, once. False with an error where it refuses. */
static bool plan(FakeModel *model, NSError **error) {
    if (model->planned) return true;
    fake_job *job = &model->job;
    NSArray *paths = sorted_paths(model->descriptor->weights);
    model->blobs = calloc([paths count] + 1, sizeof *model->blobs);
    for (NSUInteger i = 0; i < [paths count]; i++) {
        NSString *path = [paths objectAtIndex:i];
        NSData *data = blob_at(model, path);
        model->blobs[i] = (fake_blob){[path UTF8String], [data bytes], [data length]};
    }
    job->text = [model->descriptor->mil bytes];
    job->text_bytes = [model->descriptor->mil length];
    job->blobs = model->blobs;
    job->n_blobs = (int32_t)[paths count];
    fake_compiler(job);
    if (job->violation[0] != '\0') fake_violate("%s", job->violation);
    if (job->verdict != FAKE_COMPILED) {
        const char *kind = job->verdict == FAKE_INVALID_MIL ? "InvalidMILProgram" : "CompilationFailure";
        refuse(error, COMPILER, 1,
               [NSString stringWithFormat:@"_ANECompiler : ANECCompile() FAILED : err=(%s): %s", kind, job->message], nil);
        return false;
    }
    if (posix_memalign(&model->arena, 4096, job->arena_bytes + 64) != 0) return false;
    return model->planned = true;
}

static wide_bool model_compile(FakeModel *self, SEL selector, unsigned int qos, id options, NSError **error) {
    (void)selector;
    check_call("compileWithQoS", qos, options);
    fake_add(&fake_seen.compiles, 1);
    if (fake_take(&fake_now.compile_failures)) {
        NSError *below = nil;
        refuse(&below, COMPILER, 7, @"below", nil);
        return refuse(error, COMPILER, 1, @"_ANECompiler : ANECCompile() FAILED\n : err=()", below);
    }
    if (fake_seen.compiles > fake_now.compile_limit) return GARBAGE | NO; /* silently */
    if (!sources_are_staged(self)) return refuse(error, COMPILER, 1, @"err=(InvalidMILProgram)", nil);
    if (!plan(self, error)) return GARBAGE | NO;
    [[self->hex dataUsingEncoding:NSUTF8StringEncoding] writeToFile:staged(self, @"net.plist") atomically:NO];
    if ([self->descriptor->weights count] > 0) [compiled_data(self) writeToFile:staged(self, @"data") atomically:NO];
    self->compiled = true;
    return GARBAGE | YES;
}

/* Whether the staging directory holds what a compile of this content leaves there. */
static bool artifacts_are_staged(FakeModel *model) {
    NSData *net = [NSData dataWithContentsOfFile:staged(model, @"net.plist")];
    if (![net isEqual:[model->hex dataUsingEncoding:NSUTF8StringEncoding]]) return false;
    return [model->descriptor->weights count] == 0 ||
           [[NSData dataWithContentsOfFile:staged(model, @"data")] isEqual:compiled_data(model)];
}

static wide_bool model_load(FakeModel *self, SEL selector, unsigned int qos, id options, NSError **error) {
    (void)selector;
    check_call("loadWithQoS", qos, options);
    fake_add(&fake_seen.loads, 1);
    if (self->loaded) return refuse_state(error, "load of a model that is loaded");
    if (!artifacts_are_staged(self)) return refuse_state(error, "load without a compiled program in the staging directory");
    if (fake_take(&fake_now.load_failures) || fake_seen.loaded >= fake_now.load_limit) return GARBAGE | NO;
    if (!plan(self, error)) return GARBAGE | NO;
    self->loaded = true;
    fake_add(&fake_seen.loaded, 1);
    return GARBAGE | YES;
}

static wide_bool model_unload(FakeModel *self, SEL selector, unsigned int qos, NSError **error) {
    (void)selector;
    check_call("unloadWithQoS", qos, [NSDictionary dictionary]);
    fake_add(&fake_seen.unloads, 1);
    if (!self->loaded) return refuse_state(error, "unload of a model that is not loaded");
    if (self->running) fake_violate("unload during an evaluate");
    if (fake_take(&fake_now.unload_failures)) return refuse(error, DOMAIN, 3, @"unload failed", nil);
    self->loaded = false;
    fake_add(&fake_seen.loaded, -1);
    if (!fake_now.keep_stage) [[NSFileManager defaultManager] removeItemAtPath:staged(self, @"") error:NULL];
    return GARBAGE | YES;
}

/* ---- _ANEIOSurfaceObject: does not keep its surface alive ---- */
@interface FakeWrapper : FakeObject {
@public
    FakeSurface *surface;
}
@end
@implementation FakeWrapper
@end

static id new_wrapper(id self, SEL selector, id surface) {
    (void)selector;
    raise_if_asked("objectWithIOSurface");
    if (!fake_is(surface, @"FakeSurface")) {
        fake_violate("objectWithIOSurface: not a living IOSurface");
        return nil;
    }
    if (fake_now.nil_wrapper) return nil;
    FakeWrapper *made = [[[self alloc] init] autorelease];
    fake_born(made, &fake_seen.wrappers);
    made->surface = surface;
    return made;
}

/* ---- _ANERequest ---- */
@interface FakeRequest : FakeObject {
@public
    NSArray *inputs, *outputs; /* wrappers, by index */
}
@end
@implementation FakeRequest
- (void)end {
    [inputs release];
    [outputs release];
}
@end

/* The wrappers in the order of their indices; nil, and a violation, unless these are 0 to n-1. */
static NSArray *by_index(id objects, id indices, const char *side) {
    if (![objects isKindOfClass:[NSArray class]] || ![indices isKindOfClass:[NSArray class]] ||
        [objects count] != [indices count] || [objects count] >= MAX_PORTS) {
        fake_violate("requestWithInputs: %s are not two arrays of one length", side);
        return nil;
    }
    NSUInteger n = [objects count];
    id ordered[MAX_PORTS] = {nil};
    for (NSUInteger i = 0; i < n; i++) {
        id object = [objects objectAtIndex:i], index = [indices objectAtIndex:i];
        if (!fake_is(object, @"_ANEIOSurfaceObject") || ![index isKindOfClass:[NSNumber class]]) {
            fake_violate("requestWithInputs: %s are _ANEIOSurfaceObject with NSNumber indices", side);
            return nil;
        }
        NSUInteger at = [index unsignedIntegerValue];
        if (at >= n || ordered[at] != nil) {
            fake_violate("requestWithInputs: indices of %s are not 0 to %lu", side, (unsigned long)n - 1);
            return nil;
        }
        ordered[at] = object;
    }
    return [NSArray arrayWithObjects:ordered count:n];
}

static id new_request(id self, SEL selector, id inputs, id input_indices, id outputs, id output_indices, id weights,
                      id stats, id procedure) {
    (void)selector;
    raise_if_asked("requestWithInputs");
    if (weights != nil || stats != nil) fake_violate("requestWithInputs: weightsBuffer and perfStats are not nil");
    if ((uintptr_t)procedure < 4096 || ![procedure isKindOfClass:[NSNumber class]] || [procedure intValue] != 0) {
        fake_violate("requestWithInputs: procedureIndex is not the NSNumber 0");
        return nil;
    }
    NSArray *in = by_index(inputs, input_indices, "inputs"), *out = by_index(outputs, output_indices, "outputs");
    if (in == nil || out == nil || fake_now.nil_request) return nil;
    FakeRequest *made = [[[self alloc] init] autorelease];
    fake_born(made, &fake_seen.requests);
    made->inputs = [in retain];
    made->outputs = [out retain];
    return made;
}

static id new_short_request(id self, SEL selector, id inputs, id input_indices, id outputs, id output_indices, id procedure) {
    return new_request(self, selector, inputs, input_indices, outputs, output_indices, nil, nil, procedure);
}

/* ---- Evaluate ---- */
static int by_name(const void *a, const void *b) {
    return strcmp((*(const fake_port *const *)a)->name, (*(const fake_port *const *)b)->name);
}

/* The ports of one side in the order that the engine binds; returns how many. */
static size_t bound_order(const FakeModel *model, int32_t output, const fake_port **order) {
    size_t n = 0;
    for (int32_t i = 0; i < model->job.n_ports && n < MAX_PORTS; i++)
        if (model->job.ports[i].output == output) order[n++] = &model->job.ports[i];
    if (!fake_now.declaration_order) qsort(order, n, sizeof *order, by_name);
    if (!output && n > (size_t)fake_now.max_inputs) /* silently misbound */
        for (size_t i = 0; i < n / 2; i++) {
            const fake_port *other = order[n - 1 - i];
            order[n - 1 - i] = order[i];
            order[i] = other;
        }
    return n;
}

/* Whether the surfaces of one side suit its ports; a dead surface is a violation. */
static bool fits(NSArray *wrappers, const fake_port *const *ports, size_t n) {
    if ([wrappers count] != n) return false;
    size_t first = 0;
    for (size_t i = 0; i < n; i++) {
        FakeSurface *surface = ((FakeWrapper *)[wrappers objectAtIndex:i])->surface;
        if (!fake_is(surface, @"FakeSurface")) {
            fake_violate("evaluate: the surface of %s was freed", ports[i]->name);
            return false;
        }
        if (i == 0) first = surface->nbytes;
        if (surface->nbytes < ports[i]->nbytes || (fake_now.equal_sizes && surface->nbytes != first)) return false;
        if (!ports[i]->output && ports[i]->width % fake_now.width_multiple != 0) return false;
    }
    return true;
}

static void fill_with_nan(char *memory, size_t nbytes) {
    const uint16_t nan = 0x7e01;
    for (size_t i = 0; i + 1 < nbytes; i += 2) memcpy(memory + i, &nan, 2);
}

/* Runs the plan on the surfaces; 0, or what anert_plan_run says. */
static int32_t compute(FakeModel *model, FakeRequest *request, const fake_port *const *in, size_t n_in,
                       const fake_port *const *out, size_t n_out) {
    void *bases[2 * MAX_PORTS + 4096];
    char err[512];
    if (model->job.n_bases > (int32_t)(sizeof bases / sizeof *bases)) return -2;
    memcpy(bases, model->job.bases, (size_t)model->job.n_bases * sizeof *bases);
    for (size_t i = 0; i < n_in + n_out; i++) {
        const fake_port *port = i < n_in ? in[i] : out[i - n_in];
        FakeWrapper *wrapper = [i < n_in ? request->inputs : request->outputs objectAtIndex:i < n_in ? i : i - n_in];
        fake_surface_enter(wrapper->surface, port->name);
        if (port->output) fill_with_nan(wrapper->surface->base, port->nbytes);
        if (port->buffer >= 0) bases[port->buffer] = wrapper->surface->base;
    }
    int32_t status = fake_plan_run(model->job.plan, model->job.pool, bases, model->job.n_bases, model->arena, err);
    for (size_t i = 0; i < n_in + n_out; i++)
        fake_surface_leave(((FakeWrapper *)[i < n_in ? request->inputs : request->outputs
                               objectAtIndex:i < n_in ? i : i - n_in])
                               ->surface);
    return status;
}

static int64_t now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static wide_bool evaluate_loaded(FakeModel *self, FakeRequest *request, NSError **error) {
    const fake_port *in[MAX_PORTS], *out[MAX_PORTS];
    size_t n_in = bound_order(self, 0, in), n_out = bound_order(self, 1, out);
    bool suits = fits(request->inputs, in, n_in) && fits(request->outputs, out, n_out);
    if (fake_take(&fake_now.evaluate_failures) || poisoned || !suits) {
        fake_add(&fake_seen.refused, 1);
        return inference_error(error);
    }
    int32_t status = compute(self, request, in, n_in, out, n_out);
    if (status != 0) return refuse(error, DOMAIN, status, @"the engine of the stand-in failed", nil);
    if (self->job.poison) poisoned = true;
    return GARBAGE | YES;
}

static wide_bool model_evaluate(FakeModel *self, SEL selector, unsigned int qos, id options, id request, NSError **error) {
    (void)selector;
    check_call("evaluateWithQoS", qos, options);
    int64_t end = now_us() + fake_now.evaluate_us;
    fake_add(&fake_seen.evaluates, 1);
    if (!self->loaded) return refuse_state(error, "evaluate of a model that is not loaded");
    if (!fake_is(request, @"_ANERequest")) return refuse_state(error, "evaluate: not a living request");
    if (__atomic_exchange_n(&self->running, 1, __ATOMIC_SEQ_CST)) fake_violate("two evaluates of one model at a time");
    wide_bool answer = evaluate_loaded(self, request, error);
    while ((answer & 0xff) == YES && now_us() < end) continue; /* a NO is quick */
    __atomic_store_n(&self->running, 0, __ATOMIC_SEQ_CST);
    return answer;
}

/* ---- Registration ---- */
typedef struct {
    const char *class_name, *base;
    bool class_method;
    const char *selector, *types; /* as Apple's compilers write them, with offsets; 'B' is BOOL */
    IMP body;
} method;
#define REQUEST "requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:"
static const method METHODS[] = {
    {"_ANEInMemoryModelDescriptor", "FakeDescriptor", true, "modelWithMILText:weights:optionsPlist:", "@40@0:8@16@24@32",
     (IMP)new_descriptor},
    {"_ANEInMemoryModel", "FakeModel", true, "inMemoryModelWithDescriptor:", "@24@0:8@16", (IMP)new_model},
    {"_ANEInMemoryModel", "FakeModel", false, "hexStringIdentifier", "@16@0:8", (IMP)model_hex},
    {"_ANEInMemoryModel", "FakeModel", false, "compileWithQoS:options:error:", "B36@0:8I16@20^@28", (IMP)model_compile},
    {"_ANEInMemoryModel", "FakeModel", false, "loadWithQoS:options:error:", "B36@0:8I16@20^@28", (IMP)model_load},
    {"_ANEInMemoryModel", "FakeModel", false, "evaluateWithQoS:options:request:error:", "B44@0:8I16@20@28o^@36",
     (IMP)model_evaluate},
    {"_ANEInMemoryModel", "FakeModel", false, "unloadWithQoS:error:", "B28@0:8I16^@20", (IMP)model_unload},
    {"_ANEIOSurfaceObject", "FakeWrapper", true, "objectWithIOSurface:", "@24@0:8^{__IOSurface=}16", (IMP)new_wrapper},
    {"_ANERequest", "FakeRequest", true, REQUEST, "@72@0:8@16@24@32@40@48@56@64", (IMP)new_request},
    {"_ANERequest", "FakeRequest", true, "requestWithInputs:inputIndices:outputs:outputIndices:procedureIndex:",
     "@56@0:8@16@24@32@40@48", (IMP)new_short_request},
};

/* What follows "Class selector" in an option of several, separated by '|': "", "=types"; NULL if it is not named. */
static const char *named(const char *option, const method *m, char *rest, size_t size) {
    char name[256], all[512];
    snprintf(name, sizeof name, "|%s %s", m->class_name, m->selector);
    snprintf(all, sizeof all, "|%s|", option == NULL ? "" : option);
    const char *found = strstr(all, name);
    if (found == NULL || (found[strlen(name)] != '|' && found[strlen(name)] != '=')) return NULL;
    snprintf(rest, size, "%s", found + strlen(name));
    *strchr(rest, '|') = '\0';
    return rest;
}

void fake_install(const char *missing, const char *changed) {
    for (size_t i = 0; i < sizeof METHODS / sizeof *METHODS; i++) {
        const method *m = &METHODS[i];
        if (missing != NULL && strcmp(missing, m->class_name) == 0) continue;
        Class class = objc_lookUpClass(m->class_name);
        if (class == Nil) {
            class = objc_allocateClassPair(objc_getClass(m->base), m->class_name, 0);
            objc_registerClassPair(class);
        }
        char rest[128], types[64];
        if (named(missing, m, rest, sizeof rest) != NULL) continue;
        const char *other = named(changed, m, rest, sizeof rest);
        snprintf(types, sizeof types, "%s", other == NULL ? m->types : *other == '=' ? other + 1 : "v16@0:8");
        for (char *c = types; *c != '\0'; c++)
            if (*c == 'B') *c = *@encode(BOOL);
        Class target = m->class_method ? object_getClass(class) : class;
        class_addMethod(target, sel_registerTypedName(m->selector, types), m->body, strdup(types));
    }
}

void fake_forget_poison(void) { poisoned = false; }
