/* error.c: how a call fails, fp16 scalars, and which instruction sets this CPU has. */
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(ANERT_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

anert_status anert_fail(anert_error *err, anert_status status, const char *format, ...) {
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        err->status = status;
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return status;
}

uint16_t anert_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) /* NaN: quieted, payload truncated, as F16C and NEON do */
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    if (magnitude >= 0x477ff000u) /* 65520 and up round to inf */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude >= 0x38800000u) { /* normal: rebias the exponent, round to nearest even */
        uint32_t odd = (magnitude >> 13) & 1u;
        return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
    }
    if (magnitude <= 0x33000000u) /* 2^-25 and below round to zero */
        return (uint16_t)sign;
    uint32_t shift = 126u - (magnitude >> 23); /* subnormal: units of 2^-24 */
    uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t half = mantissa >> shift;
    uint32_t rest = mantissa & ((1u << shift) - 1u);
    uint32_t tie = 1u << (shift - 1u);
    half += rest > tie || (rest == tie && (half & 1u));
    return (uint16_t)(sign | half);
}

float anert_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t magnitude = h & 0x7fffu;
    uint32_t bits;
    if (magnitude > 0x7c00u) {
        bits = sign | 0x7fc00000u | (magnitude << 13);
    } else if (magnitude == 0x7c00u) {
        bits = sign | 0x7f800000u;
    } else if (magnitude >= 0x400u) {
        bits = sign | ((magnitude << 13) + 0x38000000u);
    } else { /* subnormal: magnitude * 2^-24 is exact in fp32 */
        float value = (float)magnitude * 0x1p-24f;
        memcpy(&bits, &value, sizeof bits);
        bits |= sign;
    }
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

#if defined(__x86_64__)
enum { AVX_STATE = 0x6, AVX512_STATE = 0xe6 }; /* XCR0: what the OS saves */

/* AMX with bf16: in CPUID 7.0's edx, saved by the OS, and granted to this process (Linux, Documentation/arch/x86/xstate:
 * the tile state is given on request). */
static bool amx_granted(uint32_t xcr0, uint32_t edx) {
#if defined(ANERT_HAS_AMX)
    enum { TILE_STATE = 0x60000, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    const uint32_t bf16_tile = 1u << 22 | 1u << 24;
    return (edx & bf16_tile) == bf16_tile && (xcr0 & TILE_STATE) == TILE_STATE &&
           syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    (void)xcr0, (void)edx;
    return false;
#endif
}

/* A bit per ANERT_ISA number. */
static uint32_t detect_isas(void) {
    uint32_t found = 1u << ANERT_ISA_SCALAR;
    uint32_t a, b, c, d;
    const uint32_t fma_osxsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & fma_osxsave_avx_f16c) != fma_osxsave_avx_f16c)
        return found;
    uint32_t xcr0, high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if ((xcr0 & AVX_STATE) != AVX_STATE || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5))
        return found;
    found |= 1u << ANERT_ISA_AVX2;
    const uint32_t f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    if ((xcr0 & AVX512_STATE) != AVX512_STATE || (b & f_dq_bw_vl) != f_dq_bw_vl)
        return found;
    found |= 1u << ANERT_ISA_AVX512;
    bool tiles = amx_granted(xcr0, d);
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5))
        found |= 1u << ANERT_ISA_AVX512BF16 | (tiles ? 1u << ANERT_ISA_AMX : 0u);
    return found;
}
#elif defined(__aarch64__)
static uint32_t detect_isas(void) { return 1u << ANERT_ISA_SCALAR | 1u << ANERT_ISA_NEON; }
#else
static uint32_t detect_isas(void) { return 1u << ANERT_ISA_SCALAR; }
#endif

static _Atomic uint32_t known, added;

/* CPUID traps in virtual machines, so the answer, which cannot change, is kept. */
static uint32_t isas(void) {
    uint32_t found = atomic_load_explicit(&known, memory_order_relaxed);
    if (found == 0) {
        found = detect_isas();
        atomic_store_explicit(&known, found, memory_order_relaxed);
    }
    return found | atomic_load(&added);
}

void anert_isa_add(int32_t isa) { atomic_fetch_or(&added, 1u << isa); }

int32_t anert_isa_supported(int32_t isa) {
    if (isa == ANERT_ISA_AUTO)
        return 1;
    return isa >= 0 && isa < 32 && (isas() >> isa & 1u);
}

const char *anert_isa_name(int32_t isa) {
    switch (isa) {
    case ANERT_ISA_AUTO: return "auto";
    case ANERT_ISA_SCALAR: return "scalar";
    case ANERT_ISA_AVX2: return "avx2";
    case ANERT_ISA_AVX512: return "avx512";
    case ANERT_ISA_AVX512BF16: return "avx512bf16";
    case ANERT_ISA_NEON: return "neon";
    case ANERT_ISA_AMX: return "amx";
    case ANERT_ISA_BLAS: return "blas";
    default: return NULL;
    }
}

int32_t anert_isa_own(int32_t isa) { return isa == ANERT_ISA_BLAS ? anert_isa_best() : isa; }

int32_t anert_isa_vectors(int32_t isa) {
    isa = anert_isa_own(isa);
    return isa == ANERT_ISA_AMX || isa == ANERT_ISA_AVX512BF16 ? ANERT_ISA_AVX512 : isa;
}

int32_t anert_isa_best(void) {
    static const int32_t order[] = {ANERT_ISA_AMX, ANERT_ISA_AVX512BF16, ANERT_ISA_AVX512, ANERT_ISA_AVX2,
                                    ANERT_ISA_NEON};
    for (size_t i = 0; i < sizeof order / sizeof *order; i++)
        if (anert_isa_supported(order[i]))
            return order[i];
    return ANERT_ISA_SCALAR;
}
