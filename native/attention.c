/* attention.c: regions. Steps that share batch dims (heads) run place by place: for a head and a block of queries the
 * scores, their softmax and the products with them stay in the running thread's scratch, and blocks that a causal mask
 * takes away are not computed. A head's blocks run last to first on one thread, so sums over queries have one order. */
#include "plan.h"

enum { SLOT = 2 };

typedef struct {
    const plan_run *run;
    const anert_step *region;
    int64_t blocks;
    size_t scratch; /* of the region, then the GEMM's */
} region_job;

static int64_t block_rows(const anert_step *r) { return r->args[0]; }
static int64_t n_steps(const anert_step *r) { return r->args[1]; }
static int64_t scratch_bytes(const anert_step *r) { return ROUND_UP(r->args[4], 64); }

static void gemm_block(const plan_run *run, const anert_step *s, int64_t rows, int64_t keys, bool first) {
    const anert_view *v = run->plan->views + s->first_view;
    int64_t mnk[3] = {s->dims[2], s->dims[3], s->dims[4]};
    if (s->args[0] >= 0) mnk[s->args[0]] = rows;
    if (s->args[1] >= 0) mnk[s->args[1]] = keys;
    float beta = s->args[2] && !first ? 1.0f : s->beta;
    char *scratch = run->region + scratch_bytes(run->region_step);
    anert_gemm_serial(run->isa, s->precision, mnk[0], mnk[1], mnk[2], s->alpha, gemm_operand(run, &v[0], 0, true),
                      gemm_operand(run, &v[1], 0, true), beta, gemm_operand(run, &v[2], 0, true), scratch);
}

static void run_block(plan_run *run, const anert_step *r, int64_t block, bool first, int32_t thread) {
    int64_t q = block * block_rows(r), rows = MIN(block_rows(r), r->dims[3] - q);
    int64_t keys = r->args[2] ? MIN(r->dims[4], q + rows + r->args[3]) : r->dims[4];
    run->loops[3] = q;
    for (int64_t i = 1; i <= n_steps(r); i++) {
        const anert_step *s = r + i;
        if (s->kind == ANERT_STEP_GEMM) {
            gemm_block(run, s, rows, keys, first);
            continue;
        }
        anert_step part = *s;
        part.dims[ANERT_DIMS - 2] = rows;
        part.dims[ANERT_DIMS - 1] = keys;
        tile_run_serial(run, &part, thread);
    }
}

static void region_body(void *arg, int64_t index, int32_t thread) {
    const region_job *job = arg;
    const anert_step *r = job->region;
    plan_run run = *job->run;
    run.region_step = r;
    run.region = anert_pool_scratch(run.pool, thread, SLOT, job->scratch);
    int64_t block = -1;
    if (r->args[5]) {
        block = job->blocks - 1 - index % job->blocks;
        index /= job->blocks;
    }
    for (int d = 2; d >= 0; d--) {
        run.loops[d] = index % r->dims[d];
        index /= r->dims[d];
    }
    if (block >= 0) {
        run_block(&run, r, block, true, thread);
        return;
    }
    for (block = job->blocks - 1; block >= 0; block--) run_block(&run, r, block, block == job->blocks - 1, thread);
}

anert_status region_run(const plan_run *run, const anert_step *r, anert_error *err) {
    region_job job = {.run = run, .region = r, .blocks = (r->dims[3] + block_rows(r) - 1) / block_rows(r)};
    size_t gemm = 0;
    for (int64_t i = 1; i <= n_steps(r); i++)
        if (r[i].kind == ANERT_STEP_GEMM) gemm = MAX(gemm, anert_gemm_scratch(run->isa, r[i].dims[4]));
    job.scratch = (size_t)scratch_bytes(r) + gemm;
    for (int32_t t = 0; t < anert_pool_threads(run->pool); t++)
        if (anert_pool_scratch(run->pool, t, SLOT, job.scratch) == NULL)
            return anert_fail(err, ANERT_ENOMEM, "plan: no memory for %zu bytes of scratch", job.scratch);
    int64_t places = r->dims[0] * r->dims[1] * r->dims[2] * (r->args[5] ? job.blocks : 1);
    anert_parallel_for(run->pool, places, region_body, &job);
    return ANERT_OK;
}

anert_status region_check(anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *r = &plan->steps[step];
    if (plan->region != NULL || block_rows(r) < 1 || n_steps(r) < 1 || n_steps(r) >= plan->n_steps - step ||
        r->args[3] < 0 || r->args[3] > r->dims[4] || r->args[4] < 0 || r->args[4] > (int64_t)1 << 32)
        return anert_fail(err, ANERT_EINVAL, "step %d: region out of bounds", step);
    for (int64_t i = 1; i <= n_steps(r); i++) {
        const anert_step *s = r + i;
        bool gemm = s->kind == ANERT_STEP_GEMM;
        if (!gemm && s->kind != ANERT_STEP_TILE)
            return anert_fail(err, ANERT_EINVAL, "step %d: a region holds tile programs and GEMMs", step + (int)i);
        int64_t query = gemm ? s->args[0] : 2, key = gemm ? s->args[1] : 3;
        bool placed = query >= -1 && query <= 2 && key >= -1 && key <= 2 && query != key;
        if (gemm && (!placed || s->dims[0] != 1 || s->dims[1] != 1 || s->n_views != 3))
            return anert_fail(err, ANERT_EINVAL, "step %d: gemm does not fit its region", step + (int)i);
        if ((query >= 0 && s->dims[2 + query] != r->dims[3]) || (key >= 0 && s->dims[2 + key] != r->dims[4]))
            return anert_fail(err, ANERT_EINVAL, "step %d: its queries or keys are not the region's", step + (int)i);
    }
    return ANERT_OK;
}
