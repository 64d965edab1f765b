/* loops.h: plain C loops, compiled once for each instruction set. Before it, a file defines `loops`, a struct of functions, and
 * COMPILE_LOOPS(isa, target), which makes loops_<isa> of them. */
#ifndef ANERT_LOOPS_H
#define ANERT_LOOPS_H
#include "internal.h"

enum { SERIAL = 1 << 15 }; /* elements below which waking a thread costs more than it saves */

COMPILE_LOOPS(base, ) /* SSE2, or NEON */
#if defined(__x86_64__)
COMPILE_LOOPS(avx2, TARGET("avx2,fma,f16c"))
COMPILE_LOOPS(avx512, TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))
#endif

static const loops *loops_for(int32_t isa) {
    switch (anert_isa_vectors(isa)) {
#if defined(__x86_64__)
    case ANERT_ISA_AVX2: return &loops_avx2;
    case ANERT_ISA_AVX512: return &loops_avx512;
#endif
    default: return &loops_base;
    }
}

/* A pool for `n` elements, or NULL where they are too few for its threads. */
static anert_pool *workers(anert_pool *pool, int64_t n) { return n < SERIAL ? NULL : pool; }
#endif
