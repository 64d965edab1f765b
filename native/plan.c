/* plan.c: a plan is a flat list of steps, checked once when it is made and run without another look. */
#include <stdlib.h>

#include "plan.h"

enum { MAX_COUNT = 1 << 24 };
static const int64_t MAX_DIM = (int64_t)1 << 40, MAX_STRIDE = (int64_t)1 << 40;

/* ---- Validation ---- */
static bool known_dtype(int32_t dtype) { return dtype >= ANERT_F32 && dtype <= ANERT_I8; }

/* Adds an axis of n indices at a stride to the range of reached elements; false if the stride is out of range. */
static bool widen(int64_t n, int64_t stride, __int128 *low, __int128 *high) {
    if (stride > MAX_STRIDE || stride < -MAX_STRIDE) return false;
    __int128 reach = (__int128)(n - 1) * stride;
    if (reach < 0) *low += reach;
    else *high += reach;
    return true;
}

anert_status plan_check_view(const anert_plan *plan, int32_t step, int32_t view, const view_box *box, anert_error *err) {
    const anert_view *v = &plan->views[view];
    const anert_step *region = plan->region;
    bool scratch = v->buffer == SCRATCH_REGION && region != NULL;
    if ((!scratch && (v->buffer < 0 || v->buffer >= plan->n_buffers)) || !known_dtype(v->dtype))
        return anert_fail(err, ANERT_EINVAL, "step %d: view %d has buffer %d, dtype %d", step, view, v->buffer,
                          v->dtype);
    if (box->write && !scratch && !plan->buffers[v->buffer].writable)
        return anert_fail(err, ANERT_EINVAL, "step %d: view %d writes the read-only buffer %d", step, view,
                          v->buffer);
    __int128 low = v->offset, high = v->offset;
    bool ok = widen(MAX(1, box->extent), box->stride, &low, &high);
    for (int d = 0; d < ANERT_DIMS; d++) {
        int64_t n = box->dims[d];
        if (region != NULL && d == box->query && v->loops[3] == 0) n = MIN(n, region->args[0]);
        ok = ok && widen(n, v->strides[d], &low, &high);
    }
    for (int d = 0; d < 3; d++)
        ok = ok && (region != NULL ? widen(region->dims[d], v->loops[d], &low, &high) : v->loops[d] == 0);
    if (v->loops[3] != 0) ok = ok && region != NULL && box->query >= 0 && v->loops[3] == v->strides[box->query];
    if (!ok) return anert_fail(err, ANERT_EINVAL, "step %d: view %d has a stride out of range", step, view);
    int64_t nbytes = scratch ? region->args[4] : plan->buffers[v->buffer].nbytes;
    if (low < 0 || (high + 1) * (__int128)dtype_bytes(v->dtype) > nbytes)
        return anert_fail(err, ANERT_EINVAL, "step %d: view %d leaves buffer %d of %lld bytes", step, view, v->buffer,
                          (long long)nbytes);
    return ANERT_OK;
}

/* GEMM: which of (batch, batch, m, n, k) the four view dims of a, b, c, bias are. */
static const int GEMM_DIMS[4][4] = {{0, 1, 2, 4}, {0, 1, 4, 3}, {0, 1, 2, 3}, {0, 1, 2, -1}};

/* An encoded A: all of a buffer that is large enough. */
static anert_status q8_check(const anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    const anert_view *v = &plan->views[s->first_view];
    size_t needs = anert_q8_bytes(s->dims[2], s->dims[4]);
    bool whole = v->buffer > 0 && v->buffer < plan->n_buffers && v->offset == 0 && plan->region == NULL &&
                 s->dims[0] == 1 && s->dims[1] == 1 && s->n_views == 3;
    for (int d = 0; d < 4; d++) whole = whole && v->loops[d] == 0;
    if (!whole || needs == 0 || plan->buffers[v->buffer].nbytes < (int64_t)needs)
        return anert_fail(err, ANERT_EINVAL, "step %d: int8 operand of %lld x %lld in buffer %d", step,
                          (long long)s->dims[2], (long long)s->dims[4], v->buffer);
    return ANERT_OK;
}

anert_status gemm_check(const anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    if (s->n_views < 3 || s->n_views > 4 || (s->precision != ANERT_F32 && s->precision != ANERT_BF16) ||
        (s->beta != 0.0f && s->beta != 1.0f))
        return anert_fail(err, ANERT_EINVAL, "step %d: gemm with %d views, precision %d", step, s->n_views,
                          s->precision);
    for (int i = 0; i < s->n_views; i++) {
        view_box box = {.query = -1, .write = i == 2};
        if (i == 0 && plan->views[s->first_view].dtype == ANERT_Q8) {
            anert_status status = q8_check(plan, step, err);
            if (status) return status;
            continue;
        }
        for (int d = 0; d < ANERT_DIMS; d++) {
            int dim = d < 4 ? GEMM_DIMS[i][d] : -1;
            box.dims[d] = dim < 0 ? 1 : s->dims[dim];
            if (plan->region != NULL && dim >= 2 && dim - 2 == s->args[0]) box.query = d;
        }
        anert_status status = plan_check_view(plan, step, s->first_view + i, &box, err);
        if (status) return status;
        int32_t dtype = plan->views[s->first_view + i].dtype;
        if (i == 3 ? dtype != ANERT_F32 : dtype > ANERT_BF16)
            return anert_fail(err, ANERT_EINVAL, "step %d: gemm operand %d has dtype %d", step, i, dtype);
    }
    return ANERT_OK;
}

static anert_status shape_check(const anert_plan *plan, int32_t i, anert_error *err) {
    const anert_step *s = &plan->steps[i];
    if (s->kind < 0 || s->kind >= ANERT_STEP_KINDS)
        return anert_fail(err, ANERT_EINVAL, "step %d: kind %d is unknown", i, s->kind);
    if (s->first_view < 0 || s->n_views < 0 || s->first_view > plan->n_views - s->n_views || s->first_instr < 0 ||
        s->n_instrs < 0 || s->first_instr > plan->n_instrs - s->n_instrs)
        return anert_fail(err, ANERT_EINVAL, "step %d: its views or instructions are not there", i);
    __int128 n = 1;
    for (int d = 0; d < ANERT_DIMS; d++) {
        if (s->dims[d] < 1 || s->dims[d] > MAX_DIM)
            return anert_fail(err, ANERT_EINVAL, "step %d: dim %d is %lld", i, d, (long long)s->dims[d]);
        n *= s->dims[d];
        if (n > MAX_DIM) return anert_fail(err, ANERT_EINVAL, "step %d: its space is too large", i);
    }
    if (s->reduced < 0 || s->reduced >= 1 << ANERT_DIMS)
        return anert_fail(err, ANERT_EINVAL, "step %d: reduced dims %d", i, s->reduced);
    return ANERT_OK;
}

static anert_status step_check(anert_plan *plan, int32_t i, anert_error *err) {
    const anert_step *s = &plan->steps[i];
    anert_status status = shape_check(plan, i, err);
    if (status) return status;
    if (plan->region != NULL && i > plan->region - plan->steps + plan->region->args[1]) plan->region = NULL;
    if (plan->region != NULL && s->kind != ANERT_STEP_TILE && s->kind != ANERT_STEP_GEMM)
        return anert_fail(err, ANERT_EINVAL, "step %d: kind %d cannot be part of a region", i, s->kind);
    switch (s->kind) {
    case ANERT_STEP_TILE:
        status = tile_check(plan, i, err);
        if (status == ANERT_OK) plan->tile_scratch = MAX(plan->tile_scratch, tile_scratch_bytes(s));
        return status;
    case ANERT_STEP_GEMM: return gemm_check(plan, i, err);
    case ANERT_STEP_REGION:
        status = region_check(plan, i, err);
        plan->region = s;
        return status;
    default: return move_check(plan, i, err);
    }
}

/* ---- Making ---- */
static void *copy_of(const void *items, int32_t n, size_t size) {
    void *copy = calloc((size_t)n + 1, size);
    if (copy != NULL && n > 0) memcpy(copy, items, (size_t)n * size);
    return copy;
}

anert_status anert_plan_new(const anert_plan_def *def, anert_plan **out, anert_error *err) {
    *out = NULL;
    int32_t counts[5] = {def->n_buffers, def->n_views, def->n_instrs, def->n_steps, def->n_counters};
    for (int i = 0; i < 5; i++)
        if (counts[i] < 0 || counts[i] > MAX_COUNT)
            return anert_fail(err, ANERT_EINVAL, "plan: a count of %d is out of range", counts[i]);
    anert_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) return anert_fail(err, ANERT_ENOMEM, "plan: no memory");
    plan->n_buffers = def->n_buffers, plan->n_views = def->n_views, plan->n_instrs = def->n_instrs;
    plan->n_steps = def->n_steps, plan->n_counters = def->n_counters;
    plan->buffers = copy_of(def->buffers, def->n_buffers, sizeof *plan->buffers);
    plan->views = copy_of(def->views, def->n_views, sizeof *plan->views);
    plan->steps = copy_of(def->steps, def->n_steps, sizeof *plan->steps);
    plan->instrs = calloc((size_t)def->n_instrs + 1, sizeof *plan->instrs);
    plan->counters = calloc((size_t)def->n_counters + 1, sizeof *plan->counters);
    anert_status status = ANERT_OK;
    if (!plan->buffers || !plan->views || !plan->steps || !plan->instrs || !plan->counters)
        status = anert_fail(err, ANERT_ENOMEM, "plan: no memory");
    for (int32_t i = 0; status == ANERT_OK && i < def->n_instrs; i++) plan->instrs[i].i = def->instrs[i];
    for (int32_t i = 0; status == ANERT_OK && i < def->n_steps; i++) status = step_check(plan, i, err);
    if (status != ANERT_OK) {
        anert_plan_free(plan);
        return status;
    }
    *out = plan;
    return ANERT_OK;
}

void anert_plan_free(anert_plan *plan) {
    if (plan == NULL) return;
    free(plan->buffers);
    free(plan->views);
    free(plan->steps);
    free(plan->instrs);
    free(plan->counters);
    free(plan);
}

uint64_t anert_plan_counter(anert_plan *plan, int32_t i, int32_t reset) {
    if (i < 0 || i >= plan->n_counters) return 0;
    return reset ? atomic_exchange(&plan->counters[i], 0) : atomic_load(&plan->counters[i]);
}

/* ---- Running ---- */
anert_matrix gemm_operand(const plan_run *run, const anert_view *v, int64_t outer, bool collapsed) {
    char *base = view_base(run, v) + outer * v->strides[0] * (int64_t)dtype_bytes(v->dtype);
    return (anert_matrix){base, v->dtype, v->strides[2], v->strides[3], v->strides[collapsed ? 0 : 1]};
}

static anert_status gemm_run(const plan_run *run, const anert_step *s, anert_error *err) {
    const anert_view *v = run->plan->views + s->first_view;
    bool collapsed = s->dims[1] == 1;
    if (v[0].dtype == ANERT_Q8)
        return anert_q8_gemm(run->pool, s->precision, s->dims[2], s->dims[3], s->dims[4], s->alpha, run->bases[v[0].buffer],
                             gemm_operand(run, &v[1], 0, true), s->beta, gemm_operand(run, &v[2], 0, true), err);
    for (int64_t o = 0; o < (collapsed ? 1 : s->dims[0]); o++) {
        anert_matrix a = gemm_operand(run, &v[0], o, collapsed), b = gemm_operand(run, &v[1], o, collapsed),
                     c = gemm_operand(run, &v[2], o, collapsed);
        anert_status status = anert_gemm(run->pool, s->precision, s->dims[collapsed ? 0 : 1], s->dims[2], s->dims[3],
                                         s->dims[4], s->alpha, a, b, s->beta, c, err);
        if (status) return status;
    }
    return ANERT_OK;
}

static anert_status step_run(const plan_run *run, const anert_step *s, anert_error *err) {
    switch (s->kind) {
    case ANERT_STEP_TILE: tile_run(run, s); return ANERT_OK;
    case ANERT_STEP_GEMM: return gemm_run(run, s, err);
    case ANERT_STEP_REGION: return region_run(run, s, err);
    default: return move_run(run, s, err);
    }
}

anert_status anert_plan_run(const anert_plan *plan, anert_pool *pool, void *const *bases, int32_t n_bases, void *arena,
                            anert_error *err) {
    if (n_bases != plan->n_buffers)
        return anert_fail(err, ANERT_EINVAL, "plan: %d buffers expected, %d came", plan->n_buffers, n_bases);
    plan_run run = {.plan = plan, .pool = pool, .bases = bases, .arena = arena, .isa = anert_pool_isa(pool)};
    anert_pool_enter(pool);
    anert_status status = ANERT_OK;
    for (int32_t t = 0; t < anert_pool_threads(pool) && status == ANERT_OK; t++)
        if (plan->tile_scratch > 0 && anert_pool_scratch(pool, t, 1, plan->tile_scratch) == NULL)
            status = anert_fail(err, ANERT_ENOMEM, "plan: no memory for %zu bytes of scratch", plan->tile_scratch);
    for (int32_t i = 0; i < plan->n_steps && status == ANERT_OK; i++) {
        status = step_run(&run, &plan->steps[i], err);
        if (plan->steps[i].kind == ANERT_STEP_REGION) i += (int32_t)plan->steps[i].args[1];
    }
    anert_pool_leave(pool);
    return status;
}
