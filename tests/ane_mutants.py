"""The table of tests/test_ane_mutants.py: rule, edits of the shim's source, tests that must notice."""

from __future__ import annotations

ANE, FRAMEWORK, SURFACE, HEADER = "ane.m", "ane_framework.m", "surface_iosurface.m", "ane_apple.h"
FLOW, WEIGHTS, ORDER = "numbers_flow", "weights_are_staged_and_reach_the_program", "handles_may_be_freed_in_any_order"
BACK = "a_program_comes_back_without_a_compile(keep_stage=False)"
SHARED = "programs_of_one_content_share_a_directory"
BUSY = "a_run_keeps_its_surfaces_and_its_program"
LOCKS = "locks_follow_the_rules_of_a_surface"
OTHERS = "other_versions_of_the_framework"
SHORT, SPELT = "the_shorter_request_does_too", "types_that_differ_in_spelling_alone"
FIT = "ports_that_do_not_fit"
COMPILE = "if (![program->model compileWithQoS:QOS options:@{} error:&error])"
UNLOAD = "if (![program->model unloadWithQoS:QOS error:&error])"
LOAD = "yes = [program->model loadWithQoS:QOS options:@{} error:&error];"
EVALUATE = "BOOL yes = [binding->program->model evaluateWithQoS:QOS options:@{} request:binding->request error:&error];"

Mutant = tuple[str, tuple[tuple[str, str, str], ...], tuple[str, ...]]


def in_ane(rule: str, old: str, new: str, *tests: str) -> Mutant:
    return rule, ((ANE, old, new),), tests


def in_framework(rule: str, old: str, new: str, *tests: str) -> Mutant:
    return rule, ((FRAMEWORK, old, new),), tests


def in_surface(rule: str, old: str, new: str, *tests: str) -> Mutant:
    return rule, ((SURFACE, old, new),), tests


def throws(selector: str) -> str:
    return f"an_exception_becomes_an_error(selector={selector!r})"


def nil(option: str, words: str) -> str:
    return f"nil_is_a_refusal(option={option!r}, words={words!r})"


STRING = "(NSData *)[[[NSString alloc] initWithData:mil encoding:NSUTF8StringEncoding] autorelease]"

ARGUMENTS = [
    in_ane("text as NSString", "modelWithMILText:mil", f"modelWithMILText:{STRING}", FLOW),
    in_ane("weights nil", "weights:weights optionsPlist", "weights:nil optionsPlist", FLOW),
    in_ane("plist not nil", "optionsPlist:nil]", "optionsPlist:@{}]", FLOW),
    in_ane("weight offset 64", '@{@"offset" : @0,', '@{@"offset" : @64,', WEIGHTS),
    in_ane("weights without their path", "forKey:path];", "forKey:name];", WEIGHTS),
    in_ane("the other request", "if (ane->short_request)", "if (!ane->short_request)", SHORT),
    in_ane("procedure nil in the other request", "output_indices\n                                      procedureIndex:@0",
           "output_indices\n                                      procedureIndex:nil", SHORT),
    in_ane("QoS out of range", "QOS = 21", "QOS = 99", FLOW),
    in_ane("compile options nil", COMPILE, COMPILE.replace("@{}", "nil"), FLOW),
    in_ane("load options nil", LOAD, LOAD.replace("@{}", "nil"), FLOW),
    in_ane("evaluate options nil", EVALUATE, EVALUATE.replace("@{}", "nil"), FLOW),
    in_ane("procedure as int", "perfStats:nil\n                                  procedureIndex:@0", "perfStats:nil procedureIndex:(NSNumber *)(void *)1", FLOW),
    in_ane("procedure nil", "perfStats:nil\n                                  procedureIndex:@0", "perfStats:nil procedureIndex:nil", FLOW),
    in_ane("procedure 1", "perfStats:nil\n                                  procedureIndex:@0", "perfStats:nil procedureIndex:@1", FLOW),
    in_ane("weights buffer", "weightsBuffer:nil", "weightsBuffer:@[]", FLOW),
    in_ane("raw surfaces", "[ane->surface_class objectWithIOSurface:ports[i].surface->ref]",
           "ane ? (id)ports[i].surface->ref : nil", FLOW),
    in_ane("one index for all", "numberWithInt:i]", "numberWithInt:0]", FLOW),
    in_ane("indices backwards", "numberWithInt:i]", "numberWithInt:n - 1 - i]", FLOW),
    in_ane("inputs in the caller's order", "qsort(binding->ports, (size_t)n_inputs,", "qsort(binding->ports, 0,",
           "ports_bind_in_byte_order_of_their_names(names=('b', 'a'))"),
    in_ane("outputs in the caller's order", "(size_t)n_outputs, sizeof *binding->ports, by_name", "0, 8, by_name",
           "names_that_agree_bind_in_either_order(declaration_order=False)"),
    in_ane("names without case", "return strcmp(((const anert_ane_port *)a)", "return strcasecmp(((const anert_ane_port *)a)",
           "ports_bind_in_byte_order_of_their_names(names=('a', 'B'))"),
]  # fmt: skip

UNREAD = [
    ("evaluate's BOOL read as int", ((HEADER, "(BOOL)evaluateWithQoS", "(int)evaluateWithQoS"),
                                     (ANE, EVALUATE, EVALUATE.replace("BOOL yes", "int yes"))),
     ("an_evaluate_that_answers_no",)),
    ("compile's BOOL read as int", ((HEADER, "(BOOL)compileWithQoS", "(int)compileWithQoS"),),
     ("a_program_that_the_compiler_refuses",)),
    in_ane("compile's BOOL unread", COMPILE, COMPILE.replace("if (!", "if (0 && !"), "a_program_that_the_compiler_refuses"),
    in_ane("load's BOOL unread", 'if (!yes) return ane_refused(err, @"to load', 'if (0) return ane_refused(err, @"to load',
           "a_load_that_fails_twice_is_refused"),
    in_ane("evaluate's BOOL unread", "return yes ? ANERT_OK :", "return yes || 1 ? ANERT_OK :", "an_evaluate_that_answers_no"),
    in_ane("unload's BOOL unread", UNLOAD, UNLOAD.replace("if (", "if (0 & ").replace("[", "(bool)[", 1),
           "an_unload_that_is_refused"),
    in_ane("a staging file that was not written", "if (!made || ![[files", "if (0 && ![[files",
           "a_staging_directory_that_cannot_be_written"),
    in_ane("NSError unread", 'return ane_refused(err, @"to compile the program", error)',
           'return ane_refused(err, @"to compile the program", nil)', "a_program_that_the_compiler_refuses"),
    in_framework("underlying error unread", "error = [[error userInfo] objectForKey:NSUnderlyingErrorKey];", "error = nil;",
           "the_engines_words_are_one_line_with_what_lies_below"),
    in_framework("message of many lines", "if (*c == '\\n' ||", "if (*c == 1 ||", throws("compileWithQoS"),
           "the_engines_words_are_one_line_with_what_lies_below"),
    in_ane("descriptor nil unread", "if (descriptor == nil)", "if (0)", nil("nil_descriptor", "makes no descriptor")),
    in_ane("model nil unread", "if (model == nil)", "if (0)", nil("nil_model", "makes no model of its descriptor")),
    in_ane("wrapper nil unread", "if (object == nil) return false;", "if (object == nil) continue;",
           nil("nil_wrapper", "does not take a surface")),
    in_ane("request nil unread", "if (request == nil)", "if (0)", nil("nil_request", "makes no request of 2 inputs")),
    ("exceptions uncaught", ((HEADER, "#define GUARDED @autoreleasepool { @try {", "#define GUARDED @autoreleasepool { {"),
      (HEADER, "#define UNGUARDED(err) } @catch (NSException *exception) { return ane_caught(err, exception); } \\\n"
               "    @catch (...) { return ane_caught(err, nil); } }", "#define UNGUARDED(err) } }")),
     (throws("compileWithQoS"),)),
    in_surface("IOSurfaceCreate unread", "if (surface->ref == NULL)", "if (0)",
               "a_surface_that_cannot_be_had(options={'create_failures': 1}, words='gives no surface of 4096 bytes')"),
    in_surface("short surface unread", "if (granted < surface->nbytes)", "if (0)",
               "a_surface_that_cannot_be_had(options={'short_surface': 1}, words='gives 2048 bytes')"),
    in_surface("first lock unread", "if (code != 0) return anert_fail(err, ANERT_ESYSTEM, \"IOSurfaceLock of a new",
               "if (0) return anert_fail(err, ANERT_ESYSTEM, \"IOSurfaceLock of a new",
               "a_surface_that_cannot_be_had(options={'lock_failures': 1}, words='IOSurfaceLock of a new surface')"),
    in_surface("first unlock unread", "if (surface->base == NULL || code != 0)", "if (surface->base == NULL)",
               "a_surface_that_cannot_be_had(options={'unlock_failures': 1}, words='IOSurfaceUnlock answers')"),
    in_surface("lock unread", "if (code != 0) return anert_fail(err, ANERT_ESYSTEM, \"IOSurfaceLock answers",
               "if (0) return anert_fail(err, ANERT_ESYSTEM, \"IOSurfaceLock answers", "a_lock_that_iosurface_refuses"),
    in_surface("a refused lock counts", "surface->writer = code == 0 && !read_only;", "surface->writer = !read_only;",
               "a_lock_that_iosurface_refuses"),
    in_surface("unlock unread", "if (code != 0) return anert_fail(err, ANERT_ESYSTEM, \"IOSurfaceUnlock answers",
               "if (0) return anert_fail(err, ANERT_ESYSTEM, \"IOSurfaceUnlock answers",
               "an_unlock_that_iosurface_refuses"),
]  # fmt: skip

MEMORY = [
    ("no autorelease pool", ((HEADER, "#define GUARDED @autoreleasepool { @try {", "#define GUARDED { @try {"),), (FLOW,)),
    in_ane("model not retained", "[model retain]", "model", FLOW),
    in_ane("model not released", "[program->model release];", "", FLOW),
    in_ane("sources not released", "[program->files release];", "", FLOW),
    in_ane("request not retained", "[request retain]", "request", FLOW),
    in_ane("request not released", "[binding->request release];", "", FLOW),
    in_ane("request released twice", "[binding->request release];",
           "[binding->request release]; [binding->request release];", FLOW),
    in_surface("surface not released", "surface->ane->ios.release(surface->ref);", "", FLOW),
    in_surface("surface released twice", "surface->ane->ios.release(surface->ref);",
               "surface->ane->ios.release(surface->ref); surface->ane->ios.release(surface->ref);", FLOW),
    ("binding without its surfaces", ((ANE, "        surface_hold(binding->ports[i].surface);\n", ""),
     (ANE, "for (int32_t i = 0; i < binding->n_ports; i++) anert_ane_surface_free(binding->ports[i].surface);", "")),
     (ORDER,)),
    ("binding without its program", ((ANE, "    atomic_fetch_add(&program->holders, 1);\n", ""),
     (ANE, "    anert_ane_program_free(binding->program);\n", "")), (ORDER,)),
    ("surface without its engine", ((SURFACE, "surface->ane = ane_hold(ane);", "surface->ane = ane;"),
     (SURFACE, "    anert_ane_free(surface->ane);\n", "")),
     ("a_surface_outlives_its_engine",)),
    in_ane("no unload at the end", "if (program->loaded) with_program(", "if (0) with_program(", ORDER, FLOW),
]  # fmt: skip

STAGING = [
    in_ane("sources not staged", "    anert_status status = stage_write(program->hex, program->files, err);\n"
           "    if (status != ANERT_OK) return status;\n    NSError *error = nil;\n    atomic_fetch_add(&compiles, 1);",
           "    NSError *error = nil;\n    atomic_fetch_add(&compiles, 1);", FLOW),
    in_ane("weights not staged", "[files setObject:data forKey:name];\n        [weights", "(void)files; [weights", WEIGHTS),
    in_ane("directory left behind",
           "[[NSFileManager defaultManager] removeItemAtPath:stage_path(held->hex) error:NULL];", "",
           "a_program_that_the_compiler_refuses"),
    in_ane("directory not counted", "stage *found = stages;", "stage *found = NULL;", SHARED),
    in_ane("directory removed by the first", "if (--held->holders == 0) {", "if (--held->holders >= 0) {", SHARED),
    in_ane("not staged again before a load", "stage_write(program->hex, program->files, err); /* another",
           "ANERT_OK; /* another", BACK),
    in_ane("not staged again before the second load", "stage_write(program->hex, program->files, err); /* another",
           "attempt > 0 ? ANERT_OK : stage_write(program->hex, program->files, err); /* another",
           "a_staging_directory_that_goes_away_during_a_load"),
    in_ane("what the compiler left is not kept", 'for (NSString *name in @[ @"net.plist", @"data" ]) {',
           "for (NSString *name in @[]) {", BACK),
    in_ane("data is not kept", 'for (NSString *name in @[ @"net.plist", @"data" ]) {',
           'for (NSString *name in @[ @"net.plist" ]) {', BACK),
    in_ane("hash of 64 bytes at most", "HEX_BYTES = 256", "HEX_BYTES = 65", FLOW),
    ("hash unchecked", ((ANE, "*hex == '.' || ", ""), (ANE, " || strchr(hex, '/') != NULL)", ")")),
     ("a_hash_that_names_no_directory",)),
    in_ane("any prefix of a weight file", "if (![path hasPrefix:MODEL_PATH]) return nil;", "",
           "a_weight_file_stays_below_its_directory(path='not/a/model_path/weights/w.bin')"),
    in_ane("weight files above", '[part isEqualToString:@".."] ||', "",
           "a_weight_file_stays_below_its_directory(path='@model_path/../w.bin')"),
    in_ane("weight files over the compiler's", "return [taken containsObject:name] ? nil : name;",
           "return taken != nil ? name : nil;", "a_weight_file_stays_below_its_directory(path='@model_path/data')"),
    in_ane("weight files twice", "name == nil || [weights objectForKey:path] != nil ||", "name == nil ||",
           "a_weight_file_that_comes_twice"),
]  # fmt: skip

STATES = [
    in_ane("no second load", "LOAD_ATTEMPTS = 2", "LOAD_ATTEMPTS = 1", "a_load_that_fails_once_is_tried_again"),
    in_ane("three loads", "LOAD_ATTEMPTS = 2", "LOAD_ATTEMPTS = 3", "a_load_that_fails_twice_is_refused"),
    in_ane("second load at once", "RETRY_MICROSECONDS = 100000", "RETRY_MICROSECONDS = 0",
           "a_load_that_fails_once_is_tried_again"),
    in_ane("load in any state", "if (program->loaded == expected)", "if (1)", "states"),
    in_ane("run in any state", "if (!binding->program->loaded)", "if (0)", "states"),
    in_ane("a compile is not counted", "    atomic_fetch_add(&compiles, 1);\n", "", FLOW),
    in_ane("a load is not counted", "    atomic_fetch_add(&loaded, 1);\n", "", FLOW),
    in_ane("an unload is not counted", "    atomic_fetch_sub(&loaded, 1);\n", "", FLOW),
    in_ane("a binding runs twice at once", "if (atomic_exchange(&binding->running, true))",
           "if (atomic_exchange(&binding->running, true) && 0)", BUSY),
    in_ane("a binding stays busy", "    atomic_store(&binding->running, false);\n", "", FLOW),
    ("a program runs twice at once", ((ANE, "    pthread_mutex_lock(&binding->program->mutex);\n", ""),
     (ANE, "    pthread_mutex_unlock(&binding->program->mutex);\n", "")), ("runs_of_one_program_wait_for_each_other",)),
    in_ane("a program stays locked", "    pthread_mutex_unlock(&binding->program->mutex);\n", "", FLOW),
    in_ane("port sizes unchecked", "if (port->surface->nbytes < port->nbytes)", "if (0)", FIT),
    in_ane("names twice", "if (i != binding->n_inputs && strcmp(", "if (0 && strcmp(", FIT),
    in_ane("outputs over inputs", "if (ports[i].surface == ports[j].surface)", "if (0)", FIT),
]  # fmt: skip

LOCKING = [
    in_surface("not zeroed", "if (surface->base != NULL) memset(surface->base, 0, surface->nbytes);", "",
               "a_surface_is_zeroed_and_ends_where_it_ends(nbytes=4096)"),
    in_surface("written past its end", "memset(surface->base, 0, surface->nbytes);", "memset(surface->base, 0, surface->nbytes + 1);",
               "a_surface_is_zeroed_and_ends_where_it_ends(nbytes=4096)"),
    in_surface("written past an odd end", "memset(surface->base, 0, surface->nbytes);", "memset(surface->base, 0, surface->nbytes + 1);",
               "a_surface_is_zeroed_and_ends_where_it_ends(nbytes=63)"),
    in_surface("half a surface", "numberWithUnsignedLong:surface->nbytes]", "numberWithUnsignedLong:surface->nbytes / 2]", FLOW),
    in_surface("rows longer than the surface", "(id)*ios->bytes_per_row : nbytes", "(id)*ios->bytes_per_row : @1", FLOW),
    in_surface("a property missing", "        (id)*ios->height : @1,\n", "", FLOW),
    in_surface("a pixel format", "(id)*ios->pixel_format : @0", "(id)*ios->pixel_format : @1278226536", FLOW),
    in_surface("base without a lock", "    kern_return_t code = ios->lock(surface->ref, 0, NULL);\n",
               "    ios->base(surface->ref);\n    kern_return_t code = ios->lock(surface->ref, 0, NULL);\n", FLOW),
    in_surface("a new surface stays locked", "    code = ios->unlock(surface->ref, 0, NULL);\n", "", FLOW),
    in_surface("readers exclude each other", "ios.lock(surface->ref, read_only ? kIOSurfaceLockReadOnly : 0, NULL)",
               "ios.lock(surface->ref, 0, NULL)", LOCKS),
    in_surface("writes under a lock for reading", "ios.lock(surface->ref, read_only ? kIOSurfaceLockReadOnly : 0, NULL)",
               "ios.lock(surface->ref, kIOSurfaceLockReadOnly, NULL)", FLOW),
    in_surface("unlock with another flag", "ios.unlock(surface->ref, read_only ? kIOSurfaceLockReadOnly : 0, NULL)",
               "ios.unlock(surface->ref, 0, NULL)", FLOW),
    in_surface("no lock of IOSurface's", "code = surface->ane->ios.lock(surface->ref, read_only ? kIOSurfaceLockReadOnly : 0, NULL);",
               "code = 0;", FLOW),
    in_surface("a writer beside readers", "return !shared && surface->readers > 0 ?", "return 0 ?", LOCKS),
    in_surface("evaluates what is locked", "if (surface->writer || surface->readers > 0) reason", "if (0) reason",
               "what_is_locked_is_not_evaluated"),
    in_surface("locks what is evaluated", "if (surface->reading + surface->writing > 0) return", "if (0) return", BUSY),
    in_surface("two runs write a surface", "else if (surface->writing > 0 || (write && surface->reading > 0))",
               "else if (0)", BUSY),
    in_ane("a run keeps its surfaces", "    while (claimed-- > 0) surface_release(", "    while (0) surface_release(", FLOW),
    in_ane("a refused run releases too much", "claimed--; /* the last", "claimed -= 0; /* the last", BUSY),
    in_ane("a run does not advance the seed", "atomic_fetch_add(&binding->ports[i].surface->seed, 1);", "(void)i;", FLOW),
    in_surface("a write does not advance the seed", "if (!read_only) atomic_fetch_add(&surface->seed, 1);", "", LOCKS),
]  # fmt: skip

OPENING = [
    in_framework("nothing checked", "if (status == ANERT_OK) status = check_selectors(&ane->short_request, err);", "", OTHERS),
    in_framework("the other request is not looked for", "bool spare = seen.ok;", "bool spare = false;", SHORT),
    in_framework("the other request for anything", "if (i == N_SELECTORS - 1) *short_request", "*short_request", SHORT, OTHERS),
    in_framework("types unchecked", "out->ok = strcmp(out->found, out->expected) == 0 ||", "out->ok = out->found[0] != 0 ||", OTHERS),
    in_framework("surfaces as objects unknown", "(known->also != NULL && strcmp(", "(0 && strcmp(", SPELT),
    in_framework("class names in types", "c = end;", "end = NULL;", SPELT),
    in_framework("offsets in types", 'strchr("0123456789+-rnNoORV", *c) == NULL', 'strchr("+-rnNoORV", *c) == NULL', SPELT),
    in_framework("qualifiers in types", 'strchr("0123456789+-rnNoORV", *c) == NULL', 'strchr("0123456789", *c) == NULL', SPELT),
    in_framework("class methods unseen", "known->class_method ? class_getClassMethod(class, selector) :", "", FLOW),
    in_framework("framework not opened", "if (dlopen(path == NULL ? FRAMEWORK : path, RTLD_NOW | RTLD_LOCAL) == NULL)", "if (0)",
           "a_framework_that_is_not_there"),
    in_surface("symbols unchecked", "        if (found == NULL)\n            return", "        if (0)\n            return",
               "a_framework_that_is_not_there"),
]  # fmt: skip

MUTANTS: list[Mutant] = [*ARGUMENTS, *UNREAD, *MEMORY, *STAGING, *STATES, *LOCKING, *OPENING]
