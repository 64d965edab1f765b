/* plan.h: what plan.c, tile.c and their kernels share. */
#ifndef ANERT_PLAN_H
#define ANERT_PLAN_H
#include "internal.h"

enum { TILE_REGS = 64, TILE_MAX_CHUNK = 4096, TILE_PARTIALS = 32 };
enum { SCRATCH_TILE = -1, SCRATCH_REGION = -2 };

/* One instruction on one chunk: rows x lanes results. Operand x is read at x + row * x_row + lane * x_lane, x_lane 0 or 1. */
typedef struct {
    float *d;
    const float *a, *b, *c;
    int64_t d_row, a_row, b_row, c_row;
    int32_t a_lane, b_lane, c_lane;
    int64_t rows, lanes;
    float imm;
    uint64_t overflows; /* out, of HALF */
} tile_args;
typedef void tile_fn(tile_args *args);

/* Reductions fold a (rows, lanes) into d: by rows d[lane] op= a, rows in order; by lanes d[row * 32 + lane % 32] op= a. */
typedef struct {
    tile_fn *op[ANERT_TILE_OPS];
    tile_fn *by_rows[3], *by_lanes[3]; /* SUM, RMAX, RMIN */
    void (*join[3])(float *part);      /* part (TILE_PARTIALS), what a fold by lanes left of a row, into its first */
    void (*to_bf16)(const float *src, uint16_t *dst, int64_t n);
} anert_tile_kernels;
const anert_tile_kernels *anert_tile_kernels_for(int32_t isa); /* isa resolved, not AUTO */

/* An instruction with what validation found out about it. */
typedef struct {
    anert_instr i;
    int32_t ka, kb, kc; /* kinds of the operands */
    int32_t direct;     /* the view that dst is written through, or -1 */
    int32_t skip;       /* a STORE that its producer has done */
} tile_instr;

struct anert_plan {
    anert_buffer *buffers;
    anert_view *views;
    tile_instr *instrs;
    anert_step *steps;
    _Atomic uint64_t *counters;
    int32_t n_buffers, n_views, n_instrs, n_steps, n_counters;
    size_t tile_scratch;      /* bytes a thread needs for the largest tile program */
    const anert_step *region; /* while checking: the region that the step belongs to, or NULL */
};

/* Where a run finds things. loops: coordinates of the enclosing region. */
typedef struct {
    const anert_plan *plan;
    anert_pool *pool;
    void *const *bases; /* bases[0] replaced by the arena */
    void *arena;
    char *region;                  /* the place's scratch */
    const anert_step *region_step; /* of the region being run */
    int64_t loops[4];
    int32_t isa;
} plan_run;

typedef union {
    float f;
    int32_t i;
    uint32_t u;
} lane_word;

static inline size_t dtype_bytes(int32_t dtype) {
    return dtype == ANERT_F32 || dtype == ANERT_I32 ? 4 : dtype == ANERT_F16 || dtype == ANERT_BF16 ? 2 : 1;
}

static inline char *view_base(const plan_run *run, const anert_view *v) {
    char *base = v->buffer == 0 ? run->arena : v->buffer == SCRATCH_REGION ? run->region : run->bases[v->buffer];
    int64_t at = v->offset;
    for (int d = 0; d < 4; d++) at += run->loops[d] * v->loops[d];
    return base + at * (int64_t)dtype_bytes(v->dtype);
}

static inline float load_scalar(const char *base, int32_t dtype, int64_t i) {
    lane_word w = {0};
    switch (dtype) {
    case ANERT_F16: return anert_float(((const uint16_t *)base)[i]);
    case ANERT_BF16: w.u = (uint32_t)((const uint16_t *)base)[i] << 16; return w.f;
    case ANERT_U8: return (float)((const uint8_t *)base)[i];
    case ANERT_I8: return (float)((const int8_t *)base)[i];
    default: return ((const float *)base)[i]; /* F32, and I32 as bits */
    }
}

/* Floor division; x / 0 is 0 and INT32_MIN / -1 wraps, so that no input traps. */
static inline int32_t floor_div(int32_t x, int32_t y) {
    if (y == 0) return 0;
    if (y == -1) return (int32_t)(0u - (uint32_t)x);
    int32_t q = x / y;
    return q - (x % y != 0 && (x < 0) != (y < 0));
}

/* The box of indices that a step walks through a view. query: the dim that a region cuts into blocks, -1 if none. An index
 * in [0, extent) moves it by `stride` more. */
typedef struct {
    int64_t dims[ANERT_DIMS];
    int32_t query;
    bool write;
    int64_t extent, stride;
} view_box;

/* EINVAL unless every element of the box lies in the view's buffer, and that is writable if the step writes it. */
anert_status plan_check_view(const anert_plan *plan, int32_t step, int32_t view, const view_box *box, anert_error *err);
anert_status gemm_check(const anert_plan *plan, int32_t step, anert_error *err);
anert_status tile_check(anert_plan *plan, int32_t step, anert_error *err);
void tile_run(const plan_run *run, const anert_step *step);
void tile_run_serial(const plan_run *run, const anert_step *step, int32_t thread); /* on the calling thread alone */
size_t tile_scratch_bytes(const anert_step *step);

anert_matrix gemm_operand(const plan_run *run, const anert_view *view, int64_t outer, bool collapsed);
anert_status region_check(anert_plan *plan, int32_t step, anert_error *err);
anert_status region_run(const plan_run *run, const anert_step *step, anert_error *err); /* and the steps behind it */

anert_status move_check(anert_plan *plan, int32_t step, anert_error *err);
anert_status move_run(const plan_run *run, const anert_step *step, anert_error *err);
#endif
