/* ane_framework.m: opens AppleNeuralEngine.framework, checks that it is the one this build knows, and puts its refusals
 * into words. */
#include <dlfcn.h>
#include <objc/runtime.h>
#include <stdio.h>

#include "ane_apple.h"

#define FRAMEWORK "/System/Library/PrivateFrameworks/AppleNeuralEngine.framework/AppleNeuralEngine"
#define IOSURFACE "/System/Library/Frameworks/IOSurface.framework/IOSurface"

/* ---- Failing in the framework's words ---- */

anert_status ane_fail(anert_error *err, anert_status status, NSString *message) {
    char line[sizeof err->message];
    snprintf(line, sizeof line, "%s", [message UTF8String]);
    for (char *c = line; *c != '\0'; c++)
        if (*c == '\n' || *c == '\r' || *c == '\t') *c = ' ';
    return anert_fail(err, status, "%s", line);
}

anert_status ane_caught(anert_error *err, NSException *exception) {
    if (exception == nil) return anert_fail(err, ANERT_ESYSTEM, "an exception that is no NSException");
    return ane_fail(err, ANERT_ESYSTEM, [NSString stringWithFormat:@"%@: %@", [exception name], [exception reason]]);
}

anert_status ane_refused(anert_error *err, NSString *call, NSError *error) {
    NSMutableString *message = [NSMutableString stringWithFormat:@"the engine refuses %@", call];
    if (error == nil) [message appendString:@" and gives no reason"];
    for (int depth = 0; error != nil && depth < 3; depth++) {
        [message appendFormat:@": %@ code %ld: %@", [error domain], (long)[error code], [error localizedDescription]];
        error = [[error userInfo] objectForKey:NSUnderlyingErrorKey];
    }
    return ane_fail(err, ANERT_EREFUSED, message);
}

/* ---- Opening: the calls that this file makes, checked before the first ---- */
typedef struct {
    const char *class_name, *selector;
    bool class_method;
    const char *types; /* 'B' stands for this platform's BOOL */
    const char *also;  /* other types that take the same arguments, or NULL */
} known_selector;
static const known_selector SELECTORS[] = {
    {"_ANEInMemoryModelDescriptor", "modelWithMILText:weights:optionsPlist:", true, "@@:@@@", NULL},
    {"_ANEInMemoryModel", "inMemoryModelWithDescriptor:", true, "@@:@", NULL},
    {"_ANEInMemoryModel", "hexStringIdentifier", false, "@@:", NULL},
    {"_ANEInMemoryModel", "compileWithQoS:options:error:", false, "B@:I@^@", NULL},
    {"_ANEInMemoryModel", "loadWithQoS:options:error:", false, "B@:I@^@", NULL},
    {"_ANEInMemoryModel", "evaluateWithQoS:options:request:error:", false, "B@:I@@^@", NULL},
    {"_ANEInMemoryModel", "unloadWithQoS:error:", false, "B@:I^@", NULL},
    {"_ANEIOSurfaceObject", "objectWithIOSurface:", true, "@@:^{__IOSurface}", "@@:@"}, /* an IOSurface is an object, too */
    {"_ANERequest",
     "requestWithInputs:inputIndices:outputs:outputIndices:weightsBuffer:perfStats:procedureIndex:", true,
     "@@:@@@@@@@", NULL},
};
enum { N_SELECTORS = sizeof SELECTORS / sizeof *SELECTORS };
/* Does for the last of these where that one is not as expected. */
static const known_selector SHORT_REQUEST = {
    "_ANERequest", "requestWithInputs:inputIndices:outputs:outputIndices:procedureIndex:", true, "@@:@@@@@", NULL};

/* A type encoding without offsets, qualifiers, class names and the members of structs: what two builds agree on. */
static void plain_types(const char *types, char *out, size_t size) {
    size_t n = 0;
    bool name = false, members = false; /* of a struct: the name stays, the members go */
    for (const char *c = types; *c != '\0' && n + 1 < size; c++) {
        if (*c == '"') { /* @"NSError" */
            const char *end = strchr(c + 1, '"');
            if (end == NULL) break;
            c = end;
            continue;
        }
        if (*c == '}') name = members = false;
        members = members || (name && *c == '=');
        if (!members && (name || strchr("0123456789+-rnNoORV", *c) == NULL)) out[n++] = *c;
        name = name || *c == '{';
    }
    out[n] = '\0';
}

static void inspect(const known_selector *known, anert_ane_selector *out) {
    *out = (anert_ane_selector){.class_name = known->class_name, .selector = known->selector};
    out->class_method = known->class_method;
    snprintf(out->expected, sizeof out->expected, "%s", known->types);
    for (char *c = out->expected; *c != '\0'; c++)
        if (*c == 'B') *c = *@encode(BOOL);
    Class class = NSClassFromString([NSString stringWithUTF8String:known->class_name]);
    SEL selector = sel_registerName(known->selector);
    if (class == Nil) return;
    Method method = known->class_method ? class_getClassMethod(class, selector) : class_getInstanceMethod(class, selector);
    const char *types = method == NULL ? NULL : method_getTypeEncoding(method);
    plain_types(types == NULL ? "" : types, out->found, sizeof out->found);
    out->ok = strcmp(out->found, out->expected) == 0 || (known->also != NULL && strcmp(out->found, known->also) == 0);
}

/* EUNSUPPORTED for a path of the caller's, but in a test build. */
static anert_status check_path(const char *what, const char *path, anert_error *err) {
#if defined(ANERT_ANE_TESTING)
    (void)what, (void)path, (void)err;
#else
    if (path != NULL) return anert_fail(err, ANERT_EUNSUPPORTED, "only a test build opens another %s: %s", what, path);
#endif
    return ANERT_OK;
}

static anert_status open_framework(const char *path, anert_error *err) {
    if (dlopen(path == NULL ? FRAMEWORK : path, RTLD_NOW | RTLD_LOCAL) == NULL) /* never closed */
        return anert_fail(err, ANERT_EUNAVAILABLE, "AppleNeuralEngine.framework does not open: %s", dlerror());
    return ANERT_OK;
}

static anert_status check_selectors(bool *short_request, anert_error *err) {
    anert_ane_selector seen;
    inspect(&SHORT_REQUEST, &seen);
    bool spare = seen.ok;
    for (int i = 0; i < N_SELECTORS; i++) {
        inspect(&SELECTORS[i], &seen);
        if (i == N_SELECTORS - 1) *short_request = !seen.ok && spare;
        if (seen.ok || *short_request) continue;
        const char *class = seen.class_name;
        if (NSClassFromString([NSString stringWithUTF8String:class]) == Nil)
            return anert_fail(err, ANERT_EUNAVAILABLE, "AppleNeuralEngine.framework has no class %s", class);
        if (seen.found[0] == '\0')
            return anert_fail(err, ANERT_EUNAVAILABLE, "%s does not answer %c%s", class, seen.class_method ? '+' : '-',
                              seen.selector);
        return anert_fail(err, ANERT_EUNAVAILABLE, "%c[%s %s] has type encoding %s, this build sends %s",
                          seen.class_method ? '+' : '-', class, seen.selector, seen.found, seen.expected);
    }
    return ANERT_OK;
}

static anert_status open_all(anert_ane *ane, const char *framework, const char *iosurface, anert_error *err) {
    GUARDED
    anert_status status = check_path("framework", framework, err);
    if (status == ANERT_OK) status = check_path("IOSurface", iosurface, err);
    if (status == ANERT_OK) status = open_framework(framework, err);
    if (status == ANERT_OK) status = check_selectors(&ane->short_request, err);
    if (status == ANERT_OK) status = iosurface_open(iosurface == NULL ? IOSURFACE : iosurface, &ane->ios, err);
    if (status != ANERT_OK) return status;
    ane->descriptor_class = (Class<AneDescriptorClass>)NSClassFromString(@"_ANEInMemoryModelDescriptor");
    ane->model_class = (Class<AneModelClass>)NSClassFromString(@"_ANEInMemoryModel");
    ane->surface_class = (Class<AneSurfaceObjectClass>)NSClassFromString(@"_ANEIOSurfaceObject");
    ane->request_class = (Class<AneRequestClass>)NSClassFromString(@"_ANERequest");
    return ANERT_OK;
    UNGUARDED(err)
}

anert_status anert_ane_open(const char *framework, const char *iosurface, anert_ane **out, anert_error *err) {
    if (out == NULL) return anert_fail(err, ANERT_EINVAL, "out is NULL");
    *out = NULL;
    anert_ane *ane = calloc(1, sizeof *ane);
    if (ane == NULL) return anert_fail(err, ANERT_ENOMEM, "no memory for the engine's record");
    ane->holders = 1;
    anert_status status = open_all(ane, framework, iosurface, err);
    if (status == ANERT_OK) *out = ane;
    else free(ane);
    return status;
}

anert_ane *ane_hold(anert_ane *ane) {
    atomic_fetch_add(&ane->holders, 1);
    return ane;
}

void anert_ane_free(anert_ane *ane) {
    if (ane != NULL && atomic_fetch_sub(&ane->holders, 1) == 1) free(ane);
}

int32_t anert_ane_selectors(void) { return N_SELECTORS; }

anert_status anert_ane_inspect(const char *framework, anert_ane_selector *out, anert_error *err) {
    if (out == NULL) return anert_fail(err, ANERT_EINVAL, "out is NULL");
    GUARDED
    anert_status status = check_path("framework", framework, err);
    if (status == ANERT_OK) status = open_framework(framework, err);
    for (int i = 0; status == ANERT_OK && i < N_SELECTORS; i++) inspect(&SELECTORS[i], &out[i]);
    return status;
    UNGUARDED(err)
}
