/* tile.c: fused elementwise and reduction programs: an interpreter over register tiles that stay in the first cache.
 *
 * The space of a program is a box of up to six dims, the lanes last, the rows before them. A tile is one chunk (rows x
 * lanes) at one place of the dims that are not reduced; it walks the reduced dims once per pass: pass p folds its
 * reductions, whose results pass p + 1 reads. Every output has one owner and every fold one order, whatever the
 * threads. */
#include "plan.h"

enum { GRAIN = 16384 }; /* elements that one claim of the pool covers at least */

typedef struct {
    float *p;
    int64_t row;
} reg;

typedef struct {
    const plan_run *run;
    const anert_step *step;
    const tile_instr *instrs;
    const anert_tile_kernels *kernels;
    const anert_fp16_kernels *fp16;
    int64_t n_tiles, grain;
    int64_t chunk[ANERT_DIMS]; /* how far one chunk reaches along each dim */
    int64_t tiles[ANERT_DIMS]; /* tiles along each dim */
} tile_job;

/* An instruction's call, worked out once for a shape of chunks: of the next ones only addresses differ. */
typedef struct {
    tile_args args;
    int64_t rows, lanes; /* of the chunk that it was worked out for */
} tile_call;

/* The chunk being computed. */
typedef struct {
    const tile_job *job;
    int64_t tile[ANERT_DIMS], at[ANERT_DIMS];
    int64_t rows, lanes;
    reg regs[TILE_REGS];
    float *storage, *partials;
    char *spill;
    tile_call *calls;
    int64_t reg_size; /* floats */
} tile_state;

static int32_t is_fold(int32_t op) { return op >= ANERT_TILE_SUM && op <= ANERT_TILE_RMIN; }

/* ---- Shape of a program, from its step ---- */
static int64_t passes(const anert_step *s) { return s->args[0]; }
static int64_t n_regs(const anert_step *s) { return s->args[1]; }
static int64_t chunk_rows(const anert_step *s) { return s->args[2]; }
static int64_t chunk_lanes(const anert_step *s) { return s->args[3]; }
static int64_t spill_bytes(const anert_step *s) { return s->args[4]; }
static int64_t reg_floats(const anert_step *s) { return ROUND_UP(chunk_rows(s) * chunk_lanes(s), 16); }

size_t tile_scratch_bytes(const anert_step *s) {
    size_t regs = (size_t)(n_regs(s) * reg_floats(s)) * sizeof(float);
    size_t partials = (size_t)(n_regs(s) * chunk_rows(s) * TILE_PARTIALS) * sizeof(float);
    size_t calls = ROUND_UP((size_t)s->n_instrs * sizeof(tile_call), 64);
    return calls + regs + ((s->reduced & 1 << (ANERT_DIMS - 1)) ? partials : 0) + (size_t)ROUND_UP(spill_bytes(s), 64);
}

/* ---- Loads and stores ---- */
static void store_scalar(char *base, int32_t dtype, int64_t i, float x) {
    switch (dtype) {
    case ANERT_F16: ((uint16_t *)base)[i] = anert_half(x); return;
    case ANERT_BF16: ((uint16_t *)base)[i] = bf16_of(x); return;
    case ANERT_U8: ((uint8_t *)base)[i] = (uint8_t)(x >= 255.0f ? 255 : x > 0.0f ? (int32_t)x : 0); return;
    case ANERT_I8: ((int8_t *)base)[i] = (int8_t)(x >= 127.0f ? 127 : x > -128.0f ? (int32_t)x : -128); return;
    default: ((float *)base)[i] = x; return;
    }
}

/* Where a view is for the current chunk. Spilled views live in the tile: only the reduced dims move them. */
static char *locate(const tile_state *t, const anert_view *v) {
    int64_t at = 0;
    if (v->buffer == SCRATCH_TILE) {
        for (int d = 0; d < ANERT_DIMS; d++) at += (t->at[d] - t->tile[d]) * v->strides[d];
        return t->spill + (v->offset + at) * (int64_t)dtype_bytes(v->dtype);
    }
    for (int d = 0; d < ANERT_DIMS; d++) at += t->at[d] * v->strides[d];
    return view_base(t->job->run, v) + at * (int64_t)dtype_bytes(v->dtype);
}

static void load_rows_f16(const tile_job *job, const uint16_t *src, int64_t rs, int64_t ls, float *dst, int64_t rows,
                          int64_t lanes) {
    if (ls == 1) {
        if (rs == lanes) {
            job->fp16->f16_to_f32(src, dst, (size_t)(rows * lanes));
            return;
        }
        for (int64_t r = 0; r < rows; r++) job->fp16->f16_to_f32(src + r * rs, dst + r * lanes, (size_t)lanes);
        return;
    }
    for (int64_t r = 0; r < rows; r += 64) /* rows are contiguous: rs is 1 */
        for (int64_t i = 0; i < lanes; i += 64)
            job->fp16->transpose_f16_to_f32(src + r + i * ls, (size_t)ls, dst + r * lanes + i, (size_t)lanes,
                                            (size_t)MIN(64, lanes - i), (size_t)MIN(64, rows - r));
}

/* Asks for what the next chunk will load or store: chunks are shorter than what hardware prefetchers take to start, and lines to
 * be written may lie in another core's cache. */
OWNING static void ask_next(const tile_state *t, const anert_view *v, const char *base, int64_t rows, int64_t lanes,
                            bool writes) {
    int64_t rs = v->strides[ANERT_DIMS - 2], size = (int64_t)dtype_bytes(v->dtype);
    const char *next = base + (t->rows < t->job->step->dims[ANERT_DIMS - 2] ? t->rows * rs : lanes) * size;
    if (rs == lanes) lanes *= rows, rows = 1;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t at = 0; at < lanes * size; at += 64) {
            if (writes)
                __builtin_prefetch(next + r * rs * size + at, 1, 3);
            else
                __builtin_prefetch(next + r * rs * size + at, 0, 3);
        }
}

/* A chunk into register dst: fp32 with contiguous lanes is read in place. */
static void load(tile_state *t, const tile_instr *in) {
    const anert_view *v = &t->job->run->plan->views[in->i.view];
    const char *base = locate(t, v);
    int64_t rs = v->strides[ANERT_DIMS - 2], ls = v->strides[ANERT_DIMS - 1];
    int64_t rows = in->i.kind & 2 ? t->rows : 1, lanes = in->i.kind & 1 ? t->lanes : 1;
    if (in->i.kind == 2) lanes = rows, ls = rs, rows = 1, rs = 0;
    reg *d = &t->regs[in->i.dst];
    if (ls == 1 && (in->i.kind & 1)) ask_next(t, v, base, rows, lanes, false);
    if ((v->dtype == ANERT_F32 || v->dtype == ANERT_I32) && (ls == 1 || lanes == 1)) {
        d->p = (float *)base;
        d->row = in->i.kind == 2 ? 1 : rs;
        return;
    }
    d->p = t->storage + in->i.dst * t->reg_size;
    d->row = in->i.kind == 2 ? 1 : lanes;
    if (v->dtype == ANERT_F16 && (ls == 1 || (rs == 1 && ls > 0 && rows > 1))) {
        load_rows_f16(t->job, (const uint16_t *)base, rs, ls, d->p, rows, lanes);
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < lanes; i++) d->p[r * lanes + i] = load_scalar(base, v->dtype, r * rs + i * ls);
}

static void store_rows_f16(const tile_job *job, const float *src, int64_t row, uint16_t *dst, int64_t rs, int64_t ls,
                           int64_t rows, int64_t lanes) {
    if (ls == 1) {
        if (rs == lanes && row == lanes) {
            job->fp16->f32_to_f16(src, dst, (size_t)(rows * lanes));
            return;
        }
        for (int64_t r = 0; r < rows; r++) job->fp16->f32_to_f16(src + r * row, dst + r * rs, (size_t)lanes);
        return;
    }
    for (int64_t r = 0; r < rows; r += 64)
        for (int64_t i = 0; i < lanes; i += 64)
            job->fp16->transpose_f32_to_f16(src + r * row + i, (size_t)row, dst + r + i * ls, (size_t)ls,
                                            (size_t)MIN(64, rows - r), (size_t)MIN(64, lanes - i));
}

static void store(tile_state *t, const tile_instr *in) {
    const anert_view *v = &t->job->run->plan->views[in->i.view];
    char *base = locate(t, v);
    int64_t rs = v->strides[ANERT_DIMS - 2], ls = v->strides[ANERT_DIMS - 1];
    int64_t rows = in->i.kind & 2 ? t->rows : 1, lanes = in->i.kind & 1 ? t->lanes : 1;
    if (ls == 1 && (in->i.kind & 1)) ask_next(t, v, base, rows, lanes, true);
    const float imm = in->i.imm;
    const float *src = in->i.a < 0 ? &imm : t->regs[in->i.a].p;
    int64_t row = in->i.a < 0 || !(in->ka & 2) ? 0 : t->regs[in->i.a].row;
    int64_t lane = in->i.a < 0 ? 0 : in->ka & 1;
    if (in->i.kind == 2) lanes = rows, ls = rs, lane = row != 0, rows = 1, rs = 0, row = 0;
    if (lane == 1 && (row != 0 || rows == 1)) {
        if ((v->dtype == ANERT_F32 || v->dtype == ANERT_I32) && ls == 1) {
            for (int64_t r = 0; r < rows; r++)
                memmove((float *)base + r * rs, src + r * row, (size_t)lanes * sizeof(float));
            return;
        }
        if (v->dtype == ANERT_BF16 && ls == 1) {
            for (int64_t r = 0; r < rows; r++)
                t->job->kernels->to_bf16(src + r * row, (uint16_t *)base + r * rs, lanes);
            return;
        }
        if (v->dtype == ANERT_F16 && (ls == 1 || (rs == 1 && ls > 0 && rows > 1))) {
            store_rows_f16(t->job, src, row, (uint16_t *)base, rs, ls, rows, lanes);
            return;
        }
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < lanes; i++) store_scalar(base, v->dtype, r * rs + i * ls, src[r * row + i * lane]);
}

/* ---- One instruction ---- */
typedef struct {
    const float *p;
    int64_t row;
    int32_t lane;
} operand;

static operand operand_of(const tile_state *t, int32_t r, int32_t kind, const float *imm) {
    if (r < 0) return (operand){imm, 0, 0};
    return (operand){t->regs[r].p, kind & 2 ? t->regs[r].row : 0, kind & 1};
}

/* Whether the rows of an operand lie end to end, or it is one number. A column does neither, though in a chunk of one
 * lane its rows are as far apart as if it did. */
static bool is_flat(const operand *x, int64_t lanes) {
    return x->lane ? x->row == lanes : x->row == 0;
}

static void fold(tile_state *t, const tile_instr *in) {
    const anert_step *s = t->job->step;
    int32_t which = in->i.op - ANERT_TILE_SUM;
    operand a = operand_of(t, in->i.a, in->ka, &in->i.imm);
    tile_args g = {.a = a.p, .a_row = a.row, .a_lane = a.lane, .rows = t->rows, .lanes = t->lanes};
    if (s->reduced >> (ANERT_DIMS - 1) & 1) {
        g.d = t->partials + in->i.dst * chunk_rows(s) * TILE_PARTIALS;
        t->job->kernels->by_lanes[which](&g);
    } else {
        g.d = t->storage + in->i.dst * t->reg_size;
        t->job->kernels->by_rows[which](&g);
    }
}

/* Where a result goes, and its row stride if it goes straight to memory. */
static float *destination(tile_state *t, const tile_instr *in, int64_t *row) {
    if (in->direct < 0) return t->storage + in->i.dst * t->reg_size;
    const anert_view *v = &t->job->run->plan->views[in->direct];
    *row = v->strides[ANERT_DIMS - 2];
    return (float *)locate(t, v);
}

static void work_out(tile_state *t, const tile_instr *in, tile_call *call) {
    operand a = operand_of(t, in->i.a, in->ka, &in->i.imm), b = operand_of(t, in->i.b, in->kb, &in->i.imm),
            c = operand_of(t, in->i.c, in->kc, &in->i.imm);
    int32_t kind = in->i.kind;
    tile_args g = {.a = a.p, .b = b.p, .c = c.p, .a_row = a.row, .b_row = b.row, .c_row = c.row,
                   .a_lane = a.lane, .b_lane = b.lane, .c_lane = c.lane, .imm = in->i.imm,
                   .rows = kind & 2 ? t->rows : 1, .lanes = kind & 1 ? t->lanes : 1};
    g.d_row = kind == 2 ? 1 : g.lanes;
    g.d = destination(t, in, &g.d_row);
    if (kind == 2) { /* a column: its rows are contiguous, so they become the lanes */
        g.lanes = g.rows, g.rows = 1;
        g.a_lane = g.a_row != 0, g.b_lane = g.b_row != 0, g.c_lane = g.c_row != 0;
    } else if (kind == 3 && g.d_row == g.lanes && is_flat(&a, g.lanes) && is_flat(&b, g.lanes) && is_flat(&c, g.lanes)) {
        g.lanes *= g.rows, g.rows = 1;
    }
    *call = (tile_call){g, t->rows, t->lanes};
}

static void compute(tile_state *t, const tile_instr *in) {
    tile_call *call = &t->calls[in - t->job->instrs];
    tile_args *g = &call->args;
    if (call->rows != t->rows || call->lanes != t->lanes) {
        work_out(t, in, call);
    } else {
        if (in->i.a >= 0) g->a = t->regs[in->i.a].p;
        if (in->i.b >= 0) g->b = t->regs[in->i.b].p;
        if (in->i.c >= 0) g->c = t->regs[in->i.c].p;
        if (in->direct >= 0) g->d = destination(t, in, &g->d_row);
    }
    t->regs[in->i.dst] = (reg){g->d, g->d_row};
    t->job->kernels->op[in->i.op](g);
    if (in->i.op == ANERT_TILE_HALF && g->overflows != 0 && in->i.counter >= 0)
        atomic_fetch_add_explicit(&t->job->run->plan->counters[in->i.counter], g->overflows, memory_order_relaxed);
}

static void execute(tile_state *t, int64_t pass, int32_t *next) {
    const anert_step *s = t->job->step;
    for (; *next < s->n_instrs && t->job->instrs[*next].i.pass == pass; ++*next) {
        const tile_instr *in = &t->job->instrs[*next];
        if (in->skip) continue;
        if (in->i.op == ANERT_TILE_LOAD)
            load(t, in);
        else if (in->i.op == ANERT_TILE_STORE)
            store(t, in);
        else if (is_fold(in->i.op))
            fold(t, in);
        else
            compute(t, in);
    }
}

/* ---- Folds: identities before a pass, partial sums into the register after it ---- */
static float identity_of(int32_t op) {
    return op == ANERT_TILE_SUM ? 0.0f : op == ANERT_TILE_RMAX ? -__builtin_inff() : __builtin_inff();
}

static void begin_folds(tile_state *t, int64_t pass) {
    const anert_step *s = t->job->step;
    for (int32_t k = 0; k < s->n_instrs; k++) {
        const tile_instr *in = &t->job->instrs[k];
        if (in->i.pass != pass || !is_fold(in->i.op)) continue;
        bool by_lanes = s->reduced >> (ANERT_DIMS - 1) & 1;
        float *d = by_lanes ? t->partials + in->i.dst * chunk_rows(s) * TILE_PARTIALS
                            : t->storage + in->i.dst * t->reg_size;
        int64_t n = by_lanes ? t->rows * TILE_PARTIALS : t->lanes;
        for (int64_t i = 0; i < n; i++) d[i] = identity_of(in->i.op);
    }
}

static void end_folds(tile_state *t, int64_t pass) {
    const anert_step *s = t->job->step;
    for (int32_t k = 0; k < s->n_instrs; k++) {
        const tile_instr *in = &t->job->instrs[k];
        if (in->i.pass != pass || !is_fold(in->i.op)) continue;
        reg *d = &t->regs[in->i.dst];
        d->p = t->storage + in->i.dst * t->reg_size;
        d->row = 1;
        if (!(s->reduced >> (ANERT_DIMS - 1) & 1)) continue;
        for (int64_t r = 0; r < t->rows; r++) {
            float *part = t->partials + (in->i.dst * chunk_rows(s) + r) * TILE_PARTIALS;
            t->job->kernels->join[in->i.op - ANERT_TILE_SUM](part);
            d->p[r] = part[0];
        }
    }
}

/* ---- Tiles ---- */
/* Steps `at` to the tile's next chunk, along the reduced dims, lanes fastest; false after the last. */
static bool next_chunk(tile_state *t) {
    const tile_job *job = t->job;
    for (int d = ANERT_DIMS - 1; d >= 0; d--) {
        if (!(job->step->reduced >> d & 1)) continue;
        t->at[d] += job->chunk[d];
        if (t->at[d] < job->step->dims[d]) return true;
        t->at[d] = 0;
    }
    return false;
}

static void run_tile(tile_state *t, int64_t index) {
    const tile_job *job = t->job;
    const anert_step *s = job->step;
    for (int d = ANERT_DIMS - 1; d >= 0; d--) {
        t->at[d] = t->tile[d] = index % job->tiles[d] * job->chunk[d];
        index /= job->tiles[d];
    }
    int32_t next = 0;
    for (int64_t p = 0; p < passes(s); p++) {
        int32_t first = next;
        int64_t rows = MIN(job->chunk[4], s->dims[4] - t->at[4]), lanes = MIN(job->chunk[5], s->dims[5] - t->at[5]);
        t->rows = rows, t->lanes = lanes;
        begin_folds(t, 2 * p);
        do {
            next = first;
            t->rows = MIN(job->chunk[4], s->dims[4] - t->at[4]);
            t->lanes = MIN(job->chunk[5], s->dims[5] - t->at[5]);
            execute(t, 2 * p, &next);
        } while (next_chunk(t));
        t->rows = rows, t->lanes = lanes;
        end_folds(t, 2 * p);
        execute(t, 2 * p + 1, &next);
    }
}

static void run_tiles(const tile_job *job, int64_t first, int64_t end, int32_t thread) {
    const anert_step *s = job->step;
    tile_state t = {.job = job, .reg_size = reg_floats(s)};
    char *scratch = anert_pool_scratch(job->run->pool, thread, 1, job->run->plan->tile_scratch);
    t.storage = (float *)scratch;
    t.partials = t.storage + n_regs(s) * t.reg_size;
    t.spill = scratch + tile_scratch_bytes(s) - ROUND_UP(spill_bytes(s), 64);
    t.calls = (tile_call *)t.spill - s->n_instrs;
    memset(t.calls, 0, (size_t)s->n_instrs * sizeof *t.calls);
    for (int64_t i = first; i < end; i++) run_tile(&t, i);
}

static void tile_body(void *arg, int64_t index, int32_t thread) {
    const tile_job *job = arg;
    run_tiles(job, index * job->grain, MIN(job->n_tiles, (index + 1) * job->grain), thread);
}

/* Where rows are reduced, their lanes lie far apart in memory: as many of them in a chunk as leave a tile for every thread, and
 * fewer rows. A fold takes rows in order, so that changes no bit. */
static int64_t chunk_lanes_for(const anert_step *s, int64_t threads) {
    enum { MOST = 128 };
    int64_t lanes = chunk_lanes(s), tiles = 1;
    if (!(s->reduced >> (ANERT_DIMS - 2) & 1) || spill_bytes(s) > 0) return lanes;
    for (int d = 0; d < ANERT_DIMS - 2; d++)
        if (!(s->reduced >> d & 1)) tiles *= s->dims[d];
    while (2 * lanes <= MIN(MOST, reg_floats(s)) && tiles * (s->dims[ANERT_DIMS - 1] / (2 * lanes)) >= threads) lanes *= 2;
    return lanes;
}

static tile_job job_of(const plan_run *run, const anert_step *s) {
    tile_job job = {.run = run, .step = s, .instrs = run->plan->instrs + s->first_instr, .n_tiles = 1,
                    .kernels = anert_tile_kernels_for(run->isa), .fp16 = anert_fp16_kernels_for(run->isa)};
    int64_t lanes = chunk_lanes_for(s, anert_pool_threads(run->pool)), rows = chunk_rows(s);
    if (lanes > chunk_lanes(s)) rows = MIN(s->dims[ANERT_DIMS - 2], reg_floats(s) / lanes);
    int64_t work = rows * lanes;
    for (int d = 0; d < ANERT_DIMS; d++) {
        job.chunk[d] = d == ANERT_DIMS - 2 ? rows : d == ANERT_DIMS - 1 ? lanes : 1;
        bool reduced = s->reduced >> d & 1;
        job.tiles[d] = reduced ? 1 : (s->dims[d] + job.chunk[d] - 1) / job.chunk[d];
        job.n_tiles *= job.tiles[d];
        if (reduced) work = work / job.chunk[d] * s->dims[d];
    }
    job.grain = MAX(1, GRAIN / MAX(1, work));
    return job;
}

void tile_run(const plan_run *run, const anert_step *s) {
    tile_job job = job_of(run, s);
    anert_parallel_for(run->pool, (job.n_tiles + job.grain - 1) / job.grain, tile_body, &job);
}

void tile_run_serial(const plan_run *run, const anert_step *s, int32_t thread) {
    tile_job job = job_of(run, s);
    run_tiles(&job, 0, job.n_tiles, thread);
}

/* ---- Validation ---- */
static int32_t uses_b(int32_t op) {
    return (op >= ANERT_TILE_ADD && op <= ANERT_TILE_SELECT) || (op >= ANERT_TILE_I32_ADD && op <= ANERT_TILE_I32_LE);
}

/* The kind of register r, or EINVAL: unknown, not yet written, or more than `kind` varies over. */
static int32_t operand_kind(const int32_t *kinds, int64_t regs, int32_t r, int32_t kind) {
    if (r == -1) return 0;
    if (r < 0 || r >= regs || kinds[r] < 0 || (kinds[r] & ~kind)) return -1;
    return kinds[r];
}

/* The reduced bits of a kind: what a register may not vary over once its pass is done. */
static int32_t reduced_kind(const anert_step *s) {
    return (s->reduced >> (ANERT_DIMS - 1) & 1) | (s->reduced >> (ANERT_DIMS - 2) & 1) << 1;
}

static anert_status check_view_kind(anert_plan *plan, int32_t step, const tile_instr *in, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    view_box box = {.query = ANERT_DIMS - 2, .write = in->i.op == ANERT_TILE_STORE};
    int64_t *dims = box.dims;
    bool after = in->i.pass & 1;
    if (in->i.view < s->first_view || in->i.view >= s->first_view + s->n_views)
        return anert_fail(err, ANERT_EINVAL, "step %d: view %d is not one of its views", step, in->i.view);
    const anert_view *v = &plan->views[in->i.view];
    for (int d = 0; d < ANERT_DIMS; d++) {
        dims[d] = after && s->reduced >> d & 1 ? 1 : s->dims[d];
        int bit = d == ANERT_DIMS - 1 ? 1 : d == ANERT_DIMS - 2 ? 2 : 0;
        if (bit && !(in->i.kind & bit)) {
            if (dims[d] > 1 && v->strides[d] != 0)
                return anert_fail(err, ANERT_EINVAL, "step %d: view %d varies where its register does not", step,
                                  in->i.view);
        }
    }
    if (v->buffer != SCRATCH_TILE)
        return plan_check_view(plan, step, in->i.view, &box, err);
    int64_t last = v->offset;
    for (int d = 0; d < ANERT_DIMS; d++) {
        int64_t chunk = d == ANERT_DIMS - 2 ? chunk_rows(s) : d == ANERT_DIMS - 1 ? chunk_lanes(s) : 1;
        int64_t extent = s->reduced >> d & 1 ? dims[d] : chunk;
        if (v->strides[d] < 0 || v->offset < 0 || v->strides[d] > spill_bytes(s))
            return anert_fail(err, ANERT_EINVAL, "step %d: view %d leaves its tile's scratch", step, in->i.view);
        last += (extent - 1) * v->strides[d];
    }
    if ((last + 1) * (int64_t)dtype_bytes(v->dtype) > spill_bytes(s))
        return anert_fail(err, ANERT_EINVAL, "step %d: view %d leaves its tile's scratch", step, in->i.view);
    return ANERT_OK;
}

static anert_status check_instr(anert_plan *plan, int32_t step, tile_instr *in, int32_t *kinds, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    int32_t op = in->i.op, kind = in->i.kind, reads = is_fold(op) ? 3 : kind;
    if (op < 0 || op >= ANERT_TILE_OPS || kind < 0 || kind > 3 || in->i.pass < 0 || in->i.pass >= 2 * passes(s))
        return anert_fail(err, ANERT_EINVAL, "step %d: instruction with op %d, kind %d, pass %d", step, op, kind,
                          in->i.pass);
    if ((in->i.pass & 1) && (is_fold(op) || (kind & reduced_kind(s))))
        return anert_fail(err, ANERT_EINVAL, "step %d: instruction varies over a reduced dim after its pass", step);
    if (is_fold(op) && (s->reduced == 0 || (kind & reduced_kind(s))))
        return anert_fail(err, ANERT_EINVAL, "step %d: reduction whose result varies over a reduced dim", step);
    if (in->i.counter >= plan->n_counters)
        return anert_fail(err, ANERT_EINVAL, "step %d: counter %d of %d", step, in->i.counter, plan->n_counters);
    if (op != ANERT_TILE_LOAD) {
        in->ka = operand_kind(kinds, n_regs(s), in->i.a, reads);
        in->kb = uses_b(op) ? operand_kind(kinds, n_regs(s), in->i.b, reads) : 0;
        in->kc = op == ANERT_TILE_SELECT ? operand_kind(kinds, n_regs(s), in->i.c, reads) : 0;
        if (in->ka < 0 || in->kb < 0 || in->kc < 0)
            return anert_fail(err, ANERT_EINVAL, "step %d: op %d reads a register that is not there", step, op);
    }
    if (!uses_b(op)) in->i.b = -1;
    if (op != ANERT_TILE_SELECT) in->i.c = -1;
    in->direct = -1;
    in->skip = 0;
    if (op == ANERT_TILE_LOAD || op == ANERT_TILE_STORE) {
        anert_status status = check_view_kind(plan, step, in, err);
        if (status) return status;
    }
    if (op == ANERT_TILE_STORE) return ANERT_OK;
    if (in->i.dst < 0 || in->i.dst >= n_regs(s))
        return anert_fail(err, ANERT_EINVAL, "step %d: register %d of %lld", step, in->i.dst, (long long)n_regs(s));
    kinds[in->i.dst] = is_fold(op) ? -1 : kind;
    return ANERT_OK;
}

/* A result that is stored next as contiguous fp32 is computed in place. */
static void make_direct(anert_plan *plan, const anert_step *s) {
    for (int32_t k = 1; k < s->n_instrs; k++) {
        tile_instr *in = &plan->instrs[s->first_instr + k], *before = in - 1;
        if (in->i.op != ANERT_TILE_STORE || in->i.a < 0 || before->i.op == ANERT_TILE_LOAD ||
            before->i.op == ANERT_TILE_STORE || is_fold(before->i.op))
            continue;
        const anert_view *v = &plan->views[in->i.view];
        if (before->i.pass == in->i.pass && before->i.dst == in->i.a && before->i.kind == in->i.kind &&
            (in->i.kind & 1) && (v->dtype == ANERT_F32 || v->dtype == ANERT_I32) && v->strides[ANERT_DIMS - 1] == 1) {
            before->direct = in->i.view;
            in->skip = 1;
        }
    }
}

/* Registers at the start of pass `pass` (doubled): bodies leave nothing, folds and what follows them stay. */
static void enter_pass(const anert_plan *plan, const anert_step *s, int32_t pass, int32_t *kinds, bool *stays) {
    for (int64_t r = 0; r < n_regs(s); r++)
        if (!stays[r]) kinds[r] = -1;
    if (!(pass & 1)) return;
    for (int32_t k = 0; k < s->n_instrs; k++) {
        const tile_instr *in = &plan->instrs[s->first_instr + k];
        if (in->i.pass != pass - 1 || !is_fold(in->i.op)) continue;
        kinds[in->i.dst] = in->i.kind;
        stays[in->i.dst] = true;
    }
}

anert_status tile_check(anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    int32_t kinds[TILE_REGS], pass = -1, bits = reduced_kind(s);
    bool stays[TILE_REGS] = {false}, folds[TILE_REGS] = {false};
    if (passes(s) < 1 || passes(s) > 16 || n_regs(s) < 1 || n_regs(s) > TILE_REGS || chunk_rows(s) < 1 ||
        chunk_lanes(s) < 1 || chunk_rows(s) > TILE_MAX_CHUNK || chunk_lanes(s) > TILE_MAX_CHUNK ||
        chunk_rows(s) * chunk_lanes(s) > TILE_MAX_CHUNK || spill_bytes(s) < 0 || spill_bytes(s) > 1 << 24 ||
        (bits & 1 && chunk_lanes(s) % TILE_PARTIALS && chunk_lanes(s) < s->dims[5]))
        return anert_fail(err, ANERT_EINVAL, "step %d: tile program out of bounds", step);
    if (bits == 3 || (bits == 0 && s->reduced != 0))
        return anert_fail(err, ANERT_EINVAL, "step %d: either rows or lanes must be reduced where any dim is", step);
    for (int r = 0; r < TILE_REGS; r++) kinds[r] = -1;
    for (int32_t k = 0; k < s->n_instrs; k++) {
        tile_instr *in = &plan->instrs[s->first_instr + k];
        if (in->i.pass < pass) return anert_fail(err, ANERT_EINVAL, "step %d: passes are out of order", step);
        for (; pass < in->i.pass && pass < 2 * passes(s); pass++) enter_pass(plan, s, pass + 1, kinds, stays);
        anert_status status = check_instr(plan, step, in, kinds, err);
        if (status) return status;
        if (in->i.op == ANERT_TILE_STORE) continue;
        int32_t d = in->i.dst;
        if (stays[d] && !(in->i.pass & 1))
            return anert_fail(err, ANERT_EINVAL, "step %d: register %d outlives its pass, but is written in another",
                              step, d);
        if (folds[d] && is_fold(in->i.op) && in->i.pass == pass)
            return anert_fail(err, ANERT_EINVAL, "step %d: register %d takes two reductions", step, d);
        folds[d] = is_fold(in->i.op);
        if (in->i.pass & 1) stays[d] = true;
    }
    make_direct(plan, s);
    return ANERT_OK;
}

/* ---- Dispatch ---- */
extern const anert_tile_kernels anert_tile_scalar;
#if defined(__x86_64__)
extern const anert_tile_kernels anert_tile_avx2, anert_tile_avx512;
#elif defined(__aarch64__)
extern const anert_tile_kernels anert_tile_neon;
#endif

const anert_tile_kernels *anert_tile_kernels_for(int32_t isa) {
#if defined(__x86_64__)
    isa = anert_isa_vectors(isa);
    if (isa == ANERT_ISA_AVX512) return &anert_tile_avx512;
    if (isa == ANERT_ISA_AVX2) return &anert_tile_avx2;
#elif defined(__aarch64__)
    if (isa == ANERT_ISA_NEON) return &anert_tile_neon;
#endif
    (void)isa;
    return &anert_tile_scalar;
}
