/* Step of a model, from token ids to next tokens: the loop over layers that every thread of the pool runs.
 *
 *     embed | layers: attention, gated MLP, gated delta net, each by its layer_operations | norm, head
 *
 * A bar is a barrier: other threads read after it the data written before it.
 */
#include "layers.h"

#include "pack.h"

static const struct layer_operations *const OPERATIONS[] = {
    [ATTENTION] = &attention_operations,
    [GATED_MLP] = &mlp_operations,
    [GATED_DELTA] = &delta_operations,
};

void *carve(struct arena *arena, uint8_t *base, size_t count, size_t size) {
    size_t at = arena->bytes;
    arena->bytes += (count * size + 63) & ~(size_t)63;
    return base == NULL ? NULL : base + at;
}

void demand_matrix(struct demand *demand, const struct matrix *matrix) {
    demand->activation = larger(demand->activation, activation_bytes(matrix->format, matrix->columns));
}

static int has_out_norms(const struct model *m) { return m->layers[0].out_norm != NULL; }

static struct arena lay_out(const struct model *m, uint8_t *base) {
    struct arena a = {.hidden_stride = (size_t)round_up(m->hidden, 16)};
    size_t threads = (size_t)m->threads, rows = (size_t)m->max_rows, sampled = (size_t)m->max_sampled;
    struct demand *d = &a.demand;
    d->row = a.hidden_stride;
    demand_matrix(d, &m->head);
    for (int i = 0; i < m->num_layers; i++) OPERATIONS[m->layers[i].kind]->demand(m, &m->layers[i], d);
    a.x = carve(&a, base, rows * a.hidden_stride, 4);
    a.projected = carve(&a, base, rows * d->projected, 4);
    a.replayed = carve(&a, base, d->replayed, 4);
    a.mixed = carve(&a, base, rows * d->mixed, 4);
    if (has_out_norms(m)) {
        a.out = carve(&a, base, rows * a.hidden_stride, 4);
        a.own_x = carve(&a, base, threads * PRIVATE_ROWS * a.hidden_stride, 4);
    }
    a.parts = carve(&a, base, d->parts, 4);
    a.shared = carve(&a, base, larger(rows, sampled) * d->activation, 1);
    a.private = carve(&a, base, threads * PRIVATE_ROWS * d->activation, 1);
    a.row = carve(&a, base, threads * d->row, 4);
    a.scratch = carve(&a, base, threads * d->scratch, 4);
    a.best = carve(&a, base, threads * sampled, sizeof *a.best);
    lay_out_attention(m, &a, base);
    return a;
}

size_t arena_bytes(const struct model *m) { return lay_out(m, NULL).bytes; }

void place_layers(struct model *m) {
    memset(m->page_bytes, 0, sizeof m->page_bytes);
    m->slot_bytes = 0;
    for (int i = 0; i < m->num_layers; i++) {
        const struct layer_operations *operations = OPERATIONS[m->layers[i].kind];
        if (operations->place != NULL) operations->place(m, &m->layers[i]);
    }
}

/* ---------------------------------------------------------------- before the layers, on every thread */

static void embed(const struct run *run, int thread) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    const struct arena *a = &run->arena;
    int first, end;
    share_of(s->num_tokens, pool_threads(m->pool), thread, &first, &end);
    for (int row = first; row < end; row++) {
        float *x = a->x + (size_t)row * a->hidden_stride;
        unpack_row(&m->embedding, s->token_ids[row], x);
        if (m->embedding_scale != 1.0f)
            for (int i = 0; i < m->hidden; i++) x[i] *= m->embedding_scale;
        for (size_t i = (size_t)m->hidden; i < a->hidden_stride; i++) x[i] = 0;
        rotate_row(run, row);
    }
}

/* ---------------------------------------------------------------- within the layers, on every thread */

static float *residual_of(const struct run *run, int thread, int row) {
    const struct arena *a = &run->arena;
    if (!run->has_own_x) return a->x + (size_t)row * a->hidden_stride;
    return a->own_x + (size_t)(thread * PRIVATE_ROWS + row) * a->hidden_stride;
}

/* Add a layer's output to a row's residual, normalised. */
static void add_out(const struct run *run, int thread, int row, const struct layer *layer) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    float *x = residual_of(run, thread, row), *normed = temporary_row(run, thread);
    const float *out = a->out + (size_t)row * a->hidden_stride;
    m->kernels->rms_norm(out, layer->out_norm, layer->eps, m->hidden, (int)a->hidden_stride, normed);
    for (size_t i = 0; i < a->hidden_stride; i++) x[i] += normed[i];
}

const uint8_t *prepare(const struct run *run, int thread, row_source *source, const void *context, int columns, int format) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    size_t stride = a->demand.activation;
    int first = 0, end = run->step->num_tokens;
    uint8_t *to = a->shared;
    int is_private = end <= PRIVATE_ROWS;
    if (is_private)
        to = a->private + (size_t)thread * PRIVATE_ROWS * stride;
    else
        share_of(end, pool_threads(m->pool), thread, &first, &end);
    for (int row = first; row < end; row++)
        m->kernels->quantize(format, source(run, context, thread, row), columns, to + (size_t)row * stride);
    if (!is_private) pool_barrier(m->pool);
    return to;
}

/* A layer, and the one before it whose output is not yet in the residual. */
struct pair {
    const struct layer *layer, *before;
};

static const float *normed_row(const struct run *run, const void *context, int thread, int row) {
    const struct model *m = run->model;
    const struct pair *pair = context;
    if (pair->before != NULL && pair->before->out_norm != NULL) add_out(run, thread, row, pair->before);
    float *normed = temporary_row(run, thread);
    const struct layer *l = pair->layer;
    m->kernels->rms_norm(residual_of(run, thread, row), l->norm, l->eps, m->hidden, (int)run->arena.hidden_stride, normed);
    return normed;
}

const uint8_t *prepare_normed(const struct run *run, int thread, const struct layer *layer, const struct layer *before, int format) {
    struct pair pair = {layer, before};
    return prepare(run, thread, normed_row, &pair, run->model->hidden, format);
}

const uint8_t *prepare_again(const struct run *run, int thread, const struct layer *layer, const uint8_t *x, int format, int wanted) {
    if (format == wanted || (format <= W8 && wanted <= W8)) return x;
    /* Others may still read the shared rows. */
    if (run->step->num_tokens > PRIVATE_ROWS) pool_barrier(run->model->pool);
    return prepare_normed(run, thread, layer, NULL, wanted);
}

void multiply(const struct run *run, int thread, const struct matrix *matrices, int count, const uint8_t *x, float *y,
              size_t y_stride, enum epilogue epilogue) {
    const struct model *m = run->model;
    int unit = epilogue == SWIGLU || epilogue == GEGLU ? 2 : 1, total = 0, first, end;
    for (int i = 0; i < count; i++) total += matrices[i].rows / BLOCK_ROWS;
    share_of(total / unit, pool_threads(m->pool), thread, &first, &end);
    first *= unit;
    end *= unit;
    for (int i = 0; i < count; i++) {
        int blocks = matrices[i].rows / BLOCK_ROWS;
        struct matmul task = {
            .w = &matrices[i],
            .x = x,
            .x_stride = run->arena.demand.activation,
            .y = y,
            .y_stride = y_stride,
            .num_x = run->step->num_tokens,
            .into_l2 = m->into_l2,
            .epilogue = epilogue,
        };
        int from = first > 0 ? first : 0, to = end < blocks ? end : blocks;
        if (from < to) m->kernels->matmul(&task, from, to);
        first -= blocks;
        end -= blocks;
        y += matrices[i].rows;
    }
}

void join(const struct run *run, int thread, const struct layer *layer, const struct matrix *matrix, const uint8_t *x) {
    const struct arena *a = &run->arena;
    int is_normed = layer->out_norm != NULL;
    multiply(run, thread, matrix, 1, x, is_normed ? a->out : a->x, a->hidden_stride, is_normed ? STORE : ADD);
    pool_barrier(run->model->pool);
}

/* Where each thread has its own residual: copy the shared one. */
static void copy_residual(const struct run *run, int thread) {
    const struct arena *a = &run->arena;
    if (!run->has_own_x) return;
    for (int row = 0; row < run->step->num_tokens; row++)
        memcpy(residual_of(run, thread, row), a->x + (size_t)row * a->hidden_stride, a->hidden_stride * 4);
}

/* Where outputs of layers are normalised: add the last one to the shared residual. */
static void settle(const struct run *run, int thread) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    const struct layer *last = &m->layers[m->num_layers - 1];
    int first, end;
    if (last->out_norm == NULL) return;
    share_of(run->step->num_tokens, pool_threads(m->pool), thread, &first, &end);
    for (int row = first; row < end; row++) {
        add_out(run, thread, row, last);
        float *x = a->x + (size_t)row * a->hidden_stride;
        if (run->has_own_x) memcpy(x, residual_of(run, thread, row), a->hidden_stride * 4);
    }
    pool_barrier(m->pool);
}

/* The finaliser of splitmix64 (Steele et al., OOPSLA 2014). */
static uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    bits = (bits ^ (bits >> 27)) * UINT64_C(0x94D049BB133111EB);
    return bits ^ (bits >> 31);
}

double uniform(uint64_t seed, uint64_t counter) {
    const uint64_t gamma = UINT64_C(0x9E3779B97F4A7C15);
    return (double)(mix(mix(seed + gamma) + (counter + 1) * gamma) >> 21) * 0x1p-43;
}

static void draw_row(const struct run *run, int thread, int row) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    const struct draws *draws = s->draws;
    if (draws->temperature[row] < 0) return;
    struct draw draw = {
        .cap = m->logit_cap,
        .temperature = (float)draws->temperature[row],
        .top_p = draws->top_p[row],
        .min_p = (float)draws->min_p[row],
        .top_k = draws->top_k[row],
        .uniform = uniform(draws->seeds[row], (uint64_t)(draws->counters[row] + s->index)),
    };
    size_t width = (size_t)m->head.rows;
    float *logits = s->logits + (size_t)row * width, *scratch = draws->scratch + (size_t)thread * width;
    s->ids[row] = m->kernels->draw(logits, m->vocab, &draw, scratch);
}

/* Normalise the requested rows: sampled rows for the head, hidden rows, and the last row of every sequence to check that
 * it is finite. Then multiply the sampled rows with the head. */
static void finish(const struct run *run, int thread) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    const struct arena *a = &run->arena;
    int threads = pool_threads(m->pool), first, end;
    float *row = temporary_row(run, thread);
    share_of(s->num_sequences, threads, thread, &first, &end);
    for (int b = first; b < end; b++) {
        const float *x = a->x + (size_t)(s->cu_seqlens[b + 1] - 1) * a->hidden_stride;
        float sum = 0;
        m->kernels->rms_norm(x, m->norm, m->eps, m->hidden, (int)a->hidden_stride, row);
        for (int i = 0; i < m->hidden; i++) sum += row[i] * 0.0f;
        s->finite[b] = sum == 0;
    }
    share_of(s->num_hidden, threads, thread, &first, &end);
    for (int i = first; i < end; i++) {
        const float *x = a->x + (size_t)s->hidden_rows[i] * a->hidden_stride;
        m->kernels->rms_norm(x, m->norm, m->eps, m->hidden, (int)a->hidden_stride, row);
        memcpy(s->hidden + (size_t)i * (size_t)m->hidden, row, (size_t)m->hidden * sizeof *row);
    }
    share_of(s->num_sampled, threads, thread, &first, &end);
    for (int i = first; i < end; i++) {
        const float *x = a->x + (size_t)s->sampled[i] * a->hidden_stride;
        m->kernels->rms_norm(x, m->norm, m->eps, m->hidden, (int)a->hidden_stride, row);
        m->kernels->quantize(m->head.format, row, m->hidden, a->shared + (size_t)i * a->demand.activation);
    }
    if (s->num_sampled == 0) return;
    pool_barrier(m->pool);
    struct best *best = a->best + (size_t)thread * (size_t)m->max_sampled;
    for (int i = 0; i < s->num_sampled; i++) best[i] = (struct best){.index = -1};
    struct matmul task = {
        .w = &m->head,
        .x = a->shared,
        .x_stride = a->demand.activation,
        .y = s->logits,
        .y_stride = (size_t)m->head.rows,
        .best = best,
        .num_x = s->num_sampled,
        .valid_rows = m->vocab,
        .into_l2 = m->into_l2,
        .epilogue = s->logits != NULL ? STORE : ARGMAX,
    };
    share_of(m->head.rows / BLOCK_ROWS, threads, thread, &first, &end);
    m->kernels->matmul(&task, first, end);
    if (s->logits != NULL && s->draws == NULL) return;
    pool_barrier(m->pool);
    if (s->logits != NULL) {
        for (int i = thread; i < s->num_sampled; i += threads) draw_row(run, thread, i);
        return;
    }
    if (thread != 0) return;
    for (int i = 0; i < s->num_sampled; i++) {
        struct best found = a->best[i];
        for (int t = 1; t < threads; t++) {
            struct best other = a->best[(size_t)t * (size_t)m->max_sampled + (size_t)i];
            found.not_finite += other.not_finite;
            /* Rows rise with the threads, so the first of equals is kept. */
            if (found.index < 0 || (other.index >= 0 && other.value > found.value)) {
                found.index = other.index;
                found.value = other.value;
            }
        }
        s->ids[i] = found.not_finite == 0 ? found.index : NON_FINITE;
    }
}

static void work(void *argument, int thread) {
    const struct run *run = argument;
    const struct model *m = run->model;
    embed(run, thread);
    pool_barrier(m->pool);
    copy_residual(run, thread);
    for (int i = 0; i < m->num_layers; i++) {
        const struct layer *layer = &m->layers[i];
        OPERATIONS[layer->kind]->run(run, layer, i > 0 ? layer - 1 : NULL, thread);
    }
    settle(run, thread);
    finish(run, thread);
}

static void work_on_head(void *argument, int thread) { finish(argument, thread); }

/* One row through the head, each way in turn. Weights past the caches leave these to what is used again, so the other way
 * must be clearly quicker: 6 % slower at eight streams on AMD's Zen, 3 times as fast on Intel's Sapphire Rapids. */
void probe_prefetch(struct model *m) {
    enum { ROUNDS = 3 };
    int32_t row = 0, id;
    struct step step = {.num_tokens = 1, .num_sampled = 1, .sampled = &row, .ids = &id};
    struct run run = {.model = m, .step = &step, .arena = lay_out(m, m->arena)};
    int64_t least[2] = {INT64_MAX, INT64_MAX};
    for (int i = 0; i < 2 * ROUNDS; i++) {
        m->into_l2 = i % 2;
        int64_t start = now_ns();
        pool_run(m->pool, work_on_head, &run);
        int64_t took = now_ns() - start;
        if (took < least[i % 2]) least[i % 2] = took;
    }
    m->into_l2 = least[1] < least[0] - least[0] / 8;
}

void run_step(const struct model *model, const struct step *step) {
    struct run run = {.model = model, .step = step, .arena = lay_out(model, model->arena)};
    run.has_own_x = has_out_norms(model) && step->num_tokens <= PRIVATE_ROWS;
    plan_attention(&run);
    pool_run(model->pool, work, &run);
}
