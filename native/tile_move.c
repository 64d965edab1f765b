/* tile_move.c: steps that move elements by index: gather, scatter, arg, im2col, col2im. Plain strided loops, split over
 * the first dims; storage types of source and result are equal. */
#include "plan.h"

typedef struct {
    const plan_run *run;
    const anert_step *step;
    char *base[3]; /* the step's views at the origin */
    const anert_view *views;
    int64_t inner; /* elements one index of the loop covers */
    int32_t split; /* dims [0, split) are the loop */
    _Atomic int32_t bad;
} move_job;

static int64_t at_of(const anert_view *v, const int64_t *i) {
    int64_t at = 0;
    for (int d = 0; d < ANERT_DIMS; d++) at += i[d] * v->strides[d];
    return at;
}

/* Position `flat` of the dims [from, to) into i. */
static void unravel(const anert_step *s, int from, int to, int64_t flat, int64_t *i) {
    for (int d = to - 1; d >= from; d--) {
        i[d] = flat % s->dims[d];
        flat /= s->dims[d];
    }
}

static bool next_index(const anert_step *s, int from, int64_t *i) {
    for (int d = ANERT_DIMS - 1; d >= from; d--) {
        if (++i[d] < s->dims[d]) return true;
        i[d] = 0;
    }
    return false;
}

static void copy_element(char *to, const char *from, size_t size) {
    if (size == 4) memcpy(to, from, 4);
    else if (size == 2) memcpy(to, from, 2);
    else *to = *from;
}

/* The index counted from the front, or -1 if it is out of range. */
static int64_t located(int32_t index, int64_t extent) {
    int64_t i = index < 0 ? index + extent : index;
    return i < 0 || i >= extent ? -1 : i;
}

static void gather_body(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    move_job *job = arg;
    const anert_step *s = job->step;
    int64_t i[ANERT_DIMS] = {0};
    size_t size = dtype_bytes(job->views[0].dtype);
    unravel(s, 0, job->split, index, i);
    do {
        int64_t k = located(((const int32_t *)job->base[2])[at_of(&job->views[2], i)], s->args[0]);
        if (k < 0) {
            atomic_store(&job->bad, 1);
            return;
        }
        copy_element(job->base[0] + at_of(&job->views[0], i) * (int64_t)size,
                     job->base[1] + (at_of(&job->views[1], i) + k * s->args[1]) * (int64_t)size, size);
    } while (next_index(s, job->split, i));
}

static float combined(float old, float x, int64_t mode) {
    switch (mode) {
    case ANERT_SCATTER_ADD: return old + x;
    case ANERT_SCATTER_SUB: return old - x;
    case ANERT_SCATTER_MUL: return old * x;
    case ANERT_SCATTER_DIV: return old / x;
    case ANERT_SCATTER_MAX: return old > x || old != old ? old : x;
    case ANERT_SCATTER_MIN: return old < x || old != old ? old : x;
    default: return x;
    }
}

static int32_t combined_i32(int32_t old, int32_t x, int64_t mode) {
    switch (mode) {
    case ANERT_SCATTER_ADD: return (int32_t)((uint32_t)old + (uint32_t)x);
    case ANERT_SCATTER_SUB: return (int32_t)((uint32_t)old - (uint32_t)x);
    case ANERT_SCATTER_MUL: return (int32_t)((uint32_t)old * (uint32_t)x);
    case ANERT_SCATTER_DIV: return floor_div(old, x);
    case ANERT_SCATTER_MAX: return MAX(old, x);
    case ANERT_SCATTER_MIN: return MIN(old, x);
    default: return x;
    }
}

static void scatter_all(move_job *job) {
    const anert_step *s = job->step;
    int64_t i[ANERT_DIMS] = {0};
    bool integer = job->views[0].dtype == ANERT_I32;
    do {
        int64_t k = located(((const int32_t *)job->base[2])[at_of(&job->views[2], i)], s->args[0]);
        if (k < 0) {
            job->bad = 1;
            return;
        }
        int64_t to = at_of(&job->views[0], i) + k * s->args[1], from = at_of(&job->views[1], i);
        if (integer) {
            int32_t *y = (int32_t *)job->base[0] + to;
            *y = combined_i32(*y, ((const int32_t *)job->base[1])[from], s->args[2]);
        } else {
            float *y = (float *)job->base[0] + to;
            *y = combined(*y, load_scalar(job->base[1], job->views[1].dtype, from), s->args[2]);
        }
    } while (next_index(s, 0, i));
}

static void arg_body(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    move_job *job = arg;
    const anert_step *s = job->step;
    int64_t i[ANERT_DIMS] = {0}, best = 0, stride = job->views[1].strides[ANERT_DIMS - 1];
    unravel(s, 0, ANERT_DIMS - 1, index, i);
    int64_t from = at_of(&job->views[1], i);
    bool integer = job->views[1].dtype == ANERT_I32;
    float top = 0.0f;
    int32_t itop = 0;
    for (int64_t k = 0; k < s->dims[ANERT_DIMS - 1]; k++) {
        if (integer) {
            int32_t x = ((const int32_t *)job->base[1])[from + k * stride];
            if (k == 0 || (s->args[0] ? x > itop : x < itop)) itop = x, best = k;
        } else {
            float x = load_scalar(job->base[1], job->views[1].dtype, from + k * stride);
            bool first_nan = x != x && top == top;
            if (k == 0 || first_nan || (s->args[0] ? x > top : x < top)) top = x, best = k;
        }
    }
    ((int32_t *)job->base[0])[at_of(&job->views[0], i)] = (int32_t)best;
}

/* Where column (kernel h, w, out h, w) of a channel looks in the image; false outside. */
static bool pixel(const anert_step *s, const int64_t *i, int64_t *h, int64_t *w) {
    *h = i[4] * s->args[0] + i[2] * s->args[2] - s->args[4];
    *w = i[5] * s->args[1] + i[3] * s->args[3] - s->args[5];
    return *h >= 0 && *w >= 0 && *h < s->args[6] && *w < s->args[7];
}

static void columns_body(void *arg, int64_t index, int32_t thread) {
    (void)thread;
    move_job *job = arg;
    const anert_step *s = job->step;
    const anert_view *y = &job->views[0], *x = &job->views[1];
    bool gather = s->kind == ANERT_STEP_IM2COL;
    int64_t i[ANERT_DIMS] = {0}, h, w;
    size_t size = dtype_bytes(y->dtype);
    static const char zero[4] = {0};
    unravel(s, 0, 2, index, i);
    int64_t channel = i[0] * x->strides[0] + i[1] * x->strides[1];
    if (!gather)
        for (h = 0; h < s->args[6]; h++)
            for (w = 0; w < s->args[7]; w++)
                ((float *)job->base[1])[channel + h * x->strides[4] + w * x->strides[5]] = 0.0f;
    do {
        bool inside = pixel(s, i, &h, &w);
        int64_t from = inside ? channel + h * x->strides[4] + w * x->strides[5] : 0, to = at_of(y, i);
        if (gather)
            copy_element(job->base[0] + to * (int64_t)size, inside ? job->base[1] + from * (int64_t)size : zero, size);
        else if (inside)
            ((float *)job->base[1])[from] += ((const float *)job->base[0])[to];
    } while (next_index(s, 2, i));
}

anert_status move_run(const plan_run *run, const anert_step *s, anert_error *err) {
    move_job job = {.run = run, .step = s, .views = run->plan->views + s->first_view};
    for (int v = 0; v < s->n_views && v < 3; v++) job.base[v] = view_base(run, &job.views[v]);
    int64_t n = 1;
    switch (s->kind) {
    case ANERT_STEP_GATHER:
        for (; job.split < ANERT_DIMS && n < 64; job.split++) n *= s->dims[job.split];
        anert_parallel_for(run->pool, n, gather_body, &job);
        break;
    case ANERT_STEP_SCATTER: scatter_all(&job); break;
    case ANERT_STEP_ARG:
        for (int d = 0; d < ANERT_DIMS - 1; d++) n *= s->dims[d];
        anert_parallel_for(run->pool, n, arg_body, &job);
        break;
    default: anert_parallel_for(run->pool, s->dims[0] * s->dims[1], columns_body, &job); break;
    }
    if (job.bad)
        return anert_fail(err, ANERT_EINVAL, "step %d: an index is out of range for an axis of %lld",
                          (int)(s - run->plan->steps), (long long)s->args[0]);
    return ANERT_OK;
}

/* ---- Validation ---- */
static view_box box_of(const int64_t *dims, bool write) {
    view_box box = {.query = -1, .write = write};
    memcpy(box.dims, dims, sizeof box.dims);
    return box;
}

static anert_status check_indexed(const anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    const anert_view *v = plan->views + s->first_view;
    bool gather = s->kind == ANERT_STEP_GATHER;
    int moved = gather ? 1 : 0; /* the view that the index moves */
    bool typed = gather ? v[0].dtype == v[1].dtype
                        : (v[0].dtype == ANERT_F32 && v[1].dtype != ANERT_I32) ||
                              (v[0].dtype == ANERT_I32 && v[1].dtype == ANERT_I32);
    if (s->args[0] < 1 || s->args[0] > (int64_t)1 << 31 || v[2].dtype != ANERT_I32 || s->args[2] < 0 ||
        s->args[2] > ANERT_SCATTER_MIN || !typed)
        return anert_fail(err, ANERT_EINVAL, "step %d: indices of another type or range", step);
    for (int i = 0; i < 3; i++) {
        view_box box = box_of(s->dims, i == 0);
        if (i == moved) box.extent = s->args[0], box.stride = s->args[1];
        anert_status status = plan_check_view(plan, step, s->first_view + i, &box, err);
        if (status) return status;
    }
    return ANERT_OK;
}

static anert_status check_columns(const anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    const anert_view *v = plan->views + s->first_view;
    bool gather = s->kind == ANERT_STEP_IM2COL;
    for (int i = 0; i < 8; i++)
        if (s->args[i] < (i < 4 || i > 5 ? 1 : -(1 << 24)) || s->args[i] > 1 << 24)
            return anert_fail(err, ANERT_EINVAL, "step %d: window argument %d is %lld", step, i, (long long)s->args[i]);
    if (v[0].dtype != v[1].dtype || (!gather && v[0].dtype != ANERT_F32))
        return anert_fail(err, ANERT_EINVAL, "step %d: columns and image differ in type", step);
    int64_t image[ANERT_DIMS] = {s->dims[0], s->dims[1], 1, 1, s->args[6], s->args[7]};
    view_box columns = box_of(s->dims, gather), pixels = box_of(image, !gather);
    anert_status status = plan_check_view(plan, step, s->first_view, &columns, err);
    return status ? status : plan_check_view(plan, step, s->first_view + 1, &pixels, err);
}

anert_status move_check(anert_plan *plan, int32_t step, anert_error *err) {
    const anert_step *s = &plan->steps[step];
    bool indexed = s->kind == ANERT_STEP_GATHER || s->kind == ANERT_STEP_SCATTER;
    if (s->n_views != (indexed ? 3 : 2))
        return anert_fail(err, ANERT_EINVAL, "step %d: kind %d with %d views", step, s->kind, s->n_views);
    if (indexed) return check_indexed(plan, step, err);
    if (s->kind != ANERT_STEP_ARG) return check_columns(plan, step, err);
    if (plan->views[s->first_view].dtype != ANERT_I32 || s->dims[ANERT_DIMS - 1] > INT32_MAX)
        return anert_fail(err, ANERT_EINVAL, "step %d: arg needs an int32 result", step);
    view_box y = box_of(s->dims, true), x = box_of(s->dims, false);
    anert_status status = plan_check_view(plan, step, s->first_view, &y, err);
    return status ? status : plan_check_view(plan, step, s->first_view + 1, &x, err);
}
