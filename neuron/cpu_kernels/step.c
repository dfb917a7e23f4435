/* Step of a model, from token ids to next tokens: the layer loop that every thread of the pool runs.
 *
 *     embed | { norm, qkv | [write kv |] attend | output + residual | norm, gate-up, SwiGLU | down + residual } | norm, head
 *
 * A bar is a barrier: other threads read after it the data written before it. Between bars each thread has its own rows
 * of weights, for all activations; or its own activations; or its own attention tasks. With few rows each thread prepares
 * all activations for itself, which saves a barrier.
 *
 * Over 450 lines: planning and execution of a step share the arena's layout, which is private to this file.
 */
#include "step.h"

#include "pack.h"

#include <math.h>

enum {
    PRIVATE_ROWS = 2,
    MAX_PARTS = MAX_SEGMENTS,
    /* Shorter runs of context are not worth a partial result. */
    MIN_PART_TOKENS = 64,
};

/* An attention window, or the full context: its rotary tables and the attention tasks of a step. */
struct window {
    int window_tokens; /* 0: all */
    int table;         /* page table of its layers */
    const float *rope; /* [head_dim] */
    float *cosine, *sine; /* [T, head_dim / 2] */
    struct attention_task *tasks;
    size_t num_tasks;
    int32_t *row_parts; /* [T]: partial results of each row, 0 if it is whole */
};

/* Arrays of the arena. */
struct arena {
    float *x;      /* [T, hidden_stride]: the residual */
    float *out;    /* [T, hidden_stride]: a block's output, where it is normalised */
    float *own_x;  /* [threads, PRIVATE_ROWS, hidden_stride]: each thread's copy of the residual */
    float *qkv;    /* [T, qkv_stride] */
    float *mixed;  /* [T, mixed_stride]: attention's output */
    float *gated;  /* [T, gated_stride] */
    float *parts;
    uint8_t *shared; /* [T, activation_stride] */
    uint8_t *private; /* [threads, PRIVATE_ROWS, activation_stride] */
    float *row;       /* [threads, row_stride] */
    float *scratch;   /* [threads, scratch_stride] */
    struct best *best; /* [threads, max_sampled] */
    float *query_scales; /* [T] */
    struct window windows[MAX_KINDS]; /* of each kind of layers */
    size_t hidden_stride, qkv_stride, mixed_stride, gated_stride, activation_stride, row_stride, scratch_stride;
    size_t max_tasks;
    int key_column, value_column;
    size_t bytes;
};

struct run {
    const struct model *model;
    const struct step *step;
    struct arena arena;
    int writes_apart; /* keys and values are written in a pass of their own */
    int has_own_x;    /* the threads' copies of the residual are in use */
};

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void *carve(struct arena *arena, uint8_t *base, size_t count, size_t size) {
    size_t at = arena->bytes;
    arena->bytes += (count * size + 63) & ~(size_t)63;
    return base == NULL ? NULL : base + at;
}

static int heads_per_task(const struct model *m) {
    int group = m->num_heads / m->num_kv_heads;
    return group < MAX_TASK_QUERIES ? group : MAX_TASK_QUERIES;
}

static int has_out_norms(const struct model *m) { return m->layers[0].mlp_out_norm != NULL; }

/* Rows whose context may be cut into partial results: decodes, draft tokens, and the first few of a prompt. */
static size_t parted_rows(const struct model *m) { return (size_t)m->max_sampled + MAX_TASK_QUERIES; }

static struct arena lay_out(const struct model *m, uint8_t *base) {
    struct arena a = {0};
    size_t threads = (size_t)m->threads, rows = (size_t)m->max_rows, dim = (size_t)m->head_dim;
    size_t sequences = (size_t)m->max_sequences, half = dim / 2;
    int queries = m->num_heads * m->head_dim, keys = m->num_kv_heads * m->head_dim;
    a.hidden_stride = (size_t)round_up(m->hidden, 16);
    a.key_column = round_up(queries, 16);
    a.value_column = a.key_column + round_up(keys, 16);
    a.qkv_stride = (size_t)(a.value_column + round_up(keys, 16));
    a.mixed_stride = (size_t)round_up(queries, 16);
    a.gated_stride = (size_t)round_up(m->intermediate, 16);
    a.activation_stride = activation_bytes(m->head.format, m->hidden);
    for (int i = 0; i < m->num_layers; i++) {
        const struct layer *l = &m->layers[i];
        const struct matrix *each[] = {&l->qkv[0], &l->output, &l->gate_up, &l->down};
        for (int j = 0; j < 4; j++)
            a.activation_stride = larger(a.activation_stride, activation_bytes(each[j]->format, each[j]->columns));
    }
    a.row_stride = larger(a.hidden_stride, a.mixed_stride);
    a.scratch_stride = attention_scratch_floats(m->head_dim);
    size_t groups = (size_t)(m->num_heads / m->num_kv_heads + heads_per_task(m) - 1) / (size_t)heads_per_task(m);
    a.max_tasks = (rows + sequences * MAX_PARTS) * (size_t)m->num_kv_heads * groups;
    a.x = carve(&a, base, rows * a.hidden_stride, 4);
    a.qkv = carve(&a, base, rows * a.qkv_stride, 4);
    a.mixed = carve(&a, base, rows * a.mixed_stride, 4);
    a.gated = carve(&a, base, rows * a.gated_stride, 4);
    if (has_out_norms(m)) {
        a.out = carve(&a, base, rows * a.hidden_stride, 4);
        a.own_x = carve(&a, base, threads * PRIVATE_ROWS * a.hidden_stride, 4);
    }
    a.parts = carve(&a, base, parted_rows(m) * (size_t)m->num_heads * MAX_PARTS * (size_t)(round_up(m->head_dim, 16) + 2), 4);
    a.shared = carve(&a, base, larger(rows, (size_t)m->max_sampled) * a.activation_stride, 1);
    a.private = carve(&a, base, threads * PRIVATE_ROWS * a.activation_stride, 1);
    a.row = carve(&a, base, threads * a.row_stride, 4);
    a.scratch = carve(&a, base, threads * a.scratch_stride, 4);
    a.best = carve(&a, base, threads * (size_t)m->max_sampled, sizeof *a.best);
    a.query_scales = carve(&a, base, rows, 4);
    for (int i = 0; i < m->num_kinds; i++) {
        struct window *window = &a.windows[i];
        window->window_tokens = m->window_tokens[i];
        window->table = table_of(m, i);
        window->rope = m->ropes[i];
        window->cosine = carve(&a, base, rows * half, 4);
        window->sine = carve(&a, base, rows * half, 4);
        window->tasks = carve(&a, base, a.max_tasks, sizeof *window->tasks);
        window->row_parts = carve(&a, base, rows, 4);
    }
    return a;
}

size_t arena_bytes(const struct model *m) { return lay_out(m, NULL).bytes; }

void place_layers(struct model *m) {
    memset(m->table_layers, 0, sizeof m->table_layers);
    for (int i = 0; i < m->num_layers; i++)
        m->layers[i].place = m->table_layers[table_of(m, m->layers[i].kind)]++;
}

size_t page_bytes(const struct model *m, int table) {
    size_t heads = 2 * (size_t)m->table_layers[table] * (size_t)m->num_kv_heads;
    return heads * kv_page_bytes(m->kv_form, m->head_dim);
}

/* ---------------------------------------------------------------- before the layers, on the caller's thread */

/* Number of partial results of a context of so many tokens, where `share` is even work for every thread. */
static int num_parts(int tokens, int64_t share) {
    int64_t parts = tokens / (share < MIN_PART_TOKENS ? MIN_PART_TOKENS : share);
    return parts < 1 ? 1 : parts > MAX_PARTS ? MAX_PARTS : (int)parts;
}

/* First page that a token at `position` attends to. */
static int first_page(const struct window *window, int position) {
    int outside = position + 1 - window->window_tokens;
    return window->window_tokens > 0 && outside > 0 ? outside / PAGE_TOKENS : 0;
}

/* Tokens of a segment of the context of a token at `position`. */
static int32_t segments_at(const struct window *window, int position) {
    int visible = position + 1;
    return segment_tokens(window->window_tokens > 0 && window->window_tokens < visible ? window->window_tokens : visible);
}

static void plan_attention(struct run *run, struct window *window) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    int group = m->num_heads / m->num_kv_heads, width = heads_per_task(m), threads = pool_threads(m->pool);
    int rows_per_task = MAX_TASK_QUERIES / width;
    const int32_t *tables = s->page_tables + (size_t)(window->table * s->num_sequences) * (size_t)s->page_columns;
    int64_t narrow_tokens = 0; /* of the sequences whose rows are one task a key-value head */
    run->writes_apart = width < group;
    for (int b = 0; b < s->num_sequences; b++) {
        int num_rows = s->cu_seqlens[b + 1] - s->cu_seqlens[b];
        if (num_rows > 1) run->writes_apart = 1;
        if (num_rows <= rows_per_task)
            narrow_tokens += s->context_lens[b] - first_page(window, s->positions[s->cu_seqlens[b]]) * PAGE_TOKENS;
    }
    int64_t share = narrow_tokens * m->num_kv_heads / (4 * threads);
    memset(window->row_parts, 0, (size_t)s->num_tokens * 4);
    window->num_tasks = 0;
    for (int b = 0; b < s->num_sequences; b++) {
        int first = s->cu_seqlens[b], num_rows = s->cu_seqlens[b + 1] - first;
        for (int row = 0, rows; row < num_rows; row += rows) {
            int position = s->positions[first + row], from = first_page(window, position) * PAGE_TOKENS;
            int32_t tokens = segments_at(window, position);
            rows = num_rows - row < rows_per_task ? num_rows - row : rows_per_task;
            /* Rows of a task have segments in common. */
            while (segments_at(window, position + rows - 1) != tokens) rows--;
            int before = from / tokens, segments = (position + rows - 1) / tokens + 1 - before, parts = 1;
            if (rows == num_rows && (size_t)(first + num_rows) <= parted_rows(m) && segments <= MAX_PARTS)
                parts = num_parts(s->context_lens[b] - from, share);
            if (parts > segments) parts = segments;
            for (int i = 0; parts > 1 && i < rows; i++) window->row_parts[first + row + i] = segments;
            for (int kv = 0; kv < m->num_kv_heads; kv++)
                for (int head = 0; head < group; head += width)
                    for (int part = 0; part < parts; part++) {
                        int start = segments * part / parts, end = segments * (part + 1) / parts;
                        window->tasks[window->num_tasks++] = (struct attention_task){
                            .pages = tables + (size_t)b * (size_t)s->page_columns,
                            .first_row = first + row,
                            .num_rows = rows,
                            .position = position,
                            .first_head = kv * group + head,
                            .num_heads = group - head < width ? group - head : width,
                            .kv_head = kv,
                            .first_token = part == 0 ? from : (before + start) * tokens,
                            .end_token = part + 1 == parts ? position + rows : (before + end) * tokens,
                            .segment_tokens = tokens,
                            .part = parts > 1 ? start : -1,
                            .writes = !run->writes_apart && part + 1 == parts,
                        };
                    }
        }
    }
}

/* ---------------------------------------------------------------- within the layers, on every thread */

static void share_of(int count, int threads, int thread, int *first, int *end) {
    *first = (int)((int64_t)count * thread / threads);
    *end = (int)((int64_t)count * (thread + 1) / threads);
}

static void embed(const struct run *run, int thread) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    const struct arena *a = &run->arena;
    int first, end, half = m->head_dim / 2;
    share_of(s->num_tokens, pool_threads(m->pool), thread, &first, &end);
    for (int row = first; row < end; row++) {
        float *x = a->x + (size_t)row * a->hidden_stride;
        unpack_row(&m->embedding, s->token_ids[row], x);
        if (m->embedding_scale != 1.0f)
            for (int i = 0; i < m->hidden; i++) x[i] *= m->embedding_scale;
        for (size_t i = (size_t)m->hidden; i < a->hidden_stride; i++) x[i] = 0;
        int originals = s->positions[row] / m->query_tokens;
        a->query_scales[row] = m->attention_scale * (1 + m->query_growth * logf((float)(1 + originals)));
        for (int k = 0; k < m->num_kinds; k++) {
            const struct window *window = &a->windows[k];
            const float *factors = window->rope + half;
            for (int i = 0; i < half; i++) {
                float angle = (float)s->positions[row] * window->rope[i];
                window->cosine[(size_t)row * (size_t)half + (size_t)i] = cosf(angle) * factors[i];
                window->sine[(size_t)row * (size_t)half + (size_t)i] = sinf(angle) * factors[i];
            }
        }
    }
}

static float *residual_of(const struct run *run, int thread, int row) {
    const struct arena *a = &run->arena;
    if (!run->has_own_x) return a->x + (size_t)row * a->hidden_stride;
    return a->own_x + (size_t)(thread * PRIVATE_ROWS + row) * a->hidden_stride;
}

/* Add a block's output to a row's residual, normalised. */
static void add_out(const struct run *run, int thread, int row, const float *out_norm) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    float *x = residual_of(run, thread, row), *normed = a->row + (size_t)thread * a->row_stride;
    const float *out = a->out + (size_t)row * a->hidden_stride;
    m->kernels->rms_norm(out, out_norm, m->eps, m->hidden, (int)a->hidden_stride, normed);
    for (size_t i = 0; i < a->hidden_stride; i++) x[i] += normed[i];
}

/* Source of the rows that a matrix multiplies. */
enum source { NORMED, MIXED, GATED };

/* `norm` is for NORMED, and `out_norm`, unless NULL, for the previous block's output. */
static void prepare_row(const struct run *run, const struct attention *attention, int thread, enum source source,
                        const float *norm, const float *out_norm, int row, int format, uint8_t *out) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    float *temporary = a->row + (size_t)thread * a->row_stride;
    if (source == GATED) {
        m->kernels->quantize(format, a->gated + (size_t)row * a->gated_stride, m->intermediate, out);
    } else if (source == MIXED) {
        const float *mixed = a->mixed + (size_t)row * a->mixed_stride;
        if (attention->row_parts[row] > 0) {
            m->kernels->merge_parts(attention, row, attention->row_parts[row], temporary);
            mixed = temporary;
        }
        m->kernels->quantize(format, mixed, m->num_heads * m->head_dim, out);
    } else {
        if (out_norm != NULL) add_out(run, thread, row, out_norm);
        const float *x = residual_of(run, thread, row);
        m->kernels->rms_norm(x, norm, m->eps, m->hidden, (int)a->hidden_stride, temporary);
        m->kernels->quantize(format, temporary, m->hidden, out);
    }
}

/* Every row of the step in the form that `format` multiplies: this thread's own copy, or the shared one. */
static const uint8_t *prepare(const struct run *run, const struct attention *attention, int thread, enum source source,
                              const float *norm, const float *out_norm, int format) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    int first = 0, end = run->step->num_tokens;
    uint8_t *to = a->shared;
    int is_private = end <= PRIVATE_ROWS;
    if (is_private)
        to = a->private + (size_t)thread * PRIVATE_ROWS * a->activation_stride;
    else
        share_of(end, pool_threads(m->pool), thread, &first, &end);
    for (int row = first; row < end; row++)
        prepare_row(run, attention, thread, source, norm, out_norm, row, format,
                    to + (size_t)row * a->activation_stride);
    if (!is_private) pool_barrier(m->pool);
    return to;
}

static void multiply(const struct run *run, int thread, const struct matrix *matrices, int count, const uint8_t *x,
                     float *y, size_t y_stride, enum epilogue epilogue) {
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
            .x_stride = run->arena.activation_stride,
            .y = y,
            .y_stride = y_stride,
            .num_x = run->step->num_tokens,
            .epilogue = epilogue,
        };
        int from = first > 0 ? first : 0, to = end < blocks ? end : blocks;
        if (from < to) m->kernels->matmul(&task, from, to);
        first -= blocks;
        end -= blocks;
        y += matrices[i].rows;
    }
}

static void attend(const struct run *run, const struct attention *attention, const struct window *window, int thread) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    const struct arena *a = &run->arena;
    int threads = pool_threads(m->pool);
    if (run->writes_apart) {
        int first, end;
        const int32_t *slots = s->slot_mappings + (size_t)window->table * (size_t)s->num_tokens;
        share_of(s->num_tokens, threads, thread, &first, &end);
        for (int row = first; row < end; row++)
            for (int kv = 0; kv < m->num_kv_heads; kv++)
                m->kernels->write_kv(attention, row, kv, slots[row] / PAGE_TOKENS, slots[row] % PAGE_TOKENS);
        pool_barrier(m->pool);
    }
    float *scratch = a->scratch + (size_t)thread * a->scratch_stride;
    /* Interleaved, not in runs: a prompt's later rows attend to more. */
    for (size_t i = (size_t)thread; i < window->num_tasks; i += (size_t)threads)
        m->kernels->attend(attention, &window->tasks[i], scratch);
}

static void run_layer(const struct run *run, int thread, int number) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    const struct layer *l = &m->layers[number];
    const struct window *window = &a->windows[l->kind];
    size_t head_bytes = kv_page_bytes(m->kv_form, m->head_dim), side = (size_t)m->num_kv_heads * head_bytes;
    uint8_t *cache = m->caches[window->table] + 2 * (size_t)l->place * side;
    struct attention attention = {
        .qkv = a->qkv,
        .qkv_stride = a->qkv_stride,
        .key_column = a->key_column,
        .value_column = a->value_column,
        .qk_norm = l->qk_norm,
        .cosine = window->cosine,
        .sine = window->sine,
        .keys = cache,
        .values = cache + side,
        .page_stride = page_bytes(m, window->table),
        .head_stride = head_bytes,
        .out = a->mixed,
        .out_stride = a->mixed_stride,
        .parts = a->parts,
        .row_parts = window->row_parts,
        .max_parts = MAX_PARTS,
        .num_heads = m->num_heads,
        .num_kv_heads = m->num_kv_heads,
        .head_dim = m->head_dim,
        .kv_form = m->kv_form,
        .eps = m->eps,
        .window_tokens = window->window_tokens,
        .scales = a->query_scales,
    };
    /* A block's output is added to the residual at once, or normalised first where the next activations are prepared. */
    int is_normed = has_out_norms(m);
    float *joined = is_normed ? a->out : a->x;
    enum epilogue join = is_normed ? STORE : ADD;
    const float *out_norm = number > 0 ? l[-1].mlp_out_norm : NULL;
    const uint8_t *x = prepare(run, &attention, thread, NORMED, l->input_norm, out_norm, l->qkv[0].format);
    multiply(run, thread, l->qkv, 3, x, a->qkv, a->qkv_stride, STORE);
    pool_barrier(m->pool);
    attend(run, &attention, window, thread);
    pool_barrier(m->pool);
    x = prepare(run, &attention, thread, MIXED, NULL, NULL, l->output.format);
    multiply(run, thread, &l->output, 1, x, joined, a->hidden_stride, join);
    pool_barrier(m->pool);
    x = prepare(run, &attention, thread, NORMED, l->post_norm, l->attention_out_norm, l->gate_up.format);
    multiply(run, thread, &l->gate_up, 1, x, a->gated, a->gated_stride, m->gelu ? GEGLU : SWIGLU);
    pool_barrier(m->pool);
    x = prepare(run, &attention, thread, GATED, NULL, NULL, l->down.format);
    multiply(run, thread, &l->down, 1, x, joined, a->hidden_stride, join);
    pool_barrier(m->pool);
}

/* Where each thread has its own residual: copy the shared one. */
static void copy_residual(const struct run *run, int thread) {
    const struct arena *a = &run->arena;
    if (!run->has_own_x) return;
    for (int row = 0; row < run->step->num_tokens; row++)
        memcpy(residual_of(run, thread, row), a->x + (size_t)row * a->hidden_stride, a->hidden_stride * 4);
}

/* Where block outputs are normalised: add the last one to the shared residual. */
static void settle(const struct run *run, int thread) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    const float *out_norm = m->layers[m->num_layers - 1].mlp_out_norm;
    int first, end;
    if (out_norm == NULL) return;
    share_of(run->step->num_tokens, pool_threads(m->pool), thread, &first, &end);
    for (int row = first; row < end; row++) {
        add_out(run, thread, row, out_norm);
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
    float *row = a->row + (size_t)thread * a->row_stride;
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
        m->kernels->quantize(m->head.format, row, m->hidden, a->shared + (size_t)i * a->activation_stride);
    }
    if (s->num_sampled == 0) return;
    pool_barrier(m->pool);
    struct best *best = a->best + (size_t)thread * (size_t)m->max_sampled;
    for (int i = 0; i < s->num_sampled; i++) best[i] = (struct best){.index = -1};
    struct matmul task = {
        .w = &m->head,
        .x = a->shared,
        .x_stride = a->activation_stride,
        .y = s->logits,
        .y_stride = (size_t)m->head.rows,
        .best = best,
        .num_x = s->num_sampled,
        .valid_rows = m->vocab,
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
    for (int layer = 0; layer < m->num_layers; layer++) run_layer(run, thread, layer);
    settle(run, thread);
    finish(run, thread);
}

void run_step(const struct model *model, const struct step *step) {
    struct run run = {.model = model, .step = step, .arena = lay_out(model, model->arena)};
    run.has_own_x = has_out_norms(model) && step->num_tokens <= PRIVATE_ROWS;
    for (int i = 0; i < model->num_kinds; i++) plan_attention(&run, &run.arena.windows[i]);
    pool_run(model->pool, work, &run);
}
