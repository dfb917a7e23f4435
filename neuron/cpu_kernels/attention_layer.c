/* Attention of a step: { norm, qkv | [write kv |] attend | output + residual }. */
#include "layers.h"

enum {
    MAX_PARTS = MAX_SEGMENTS,
    /* Shorter runs of context are not worth a partial result. */
    MIN_PART_TOKENS = 64,
};

/* Columns of a row's projections: the heads of q, with their gates, then those of k and of v, each padded to 16. */
struct columns {
    int key, value, width;
};

static struct columns columns_of(const struct attention_kind *kind) {
    int queries = kind->num_heads * kind->head_dim * (kind->is_gated ? 2 : 1), keys = kind->num_kv_heads * kind->head_dim;
    int key = round_up(queries, 16), value = key + round_up(keys, 16);
    return (struct columns){key, value, value + round_up(keys, 16)};
}

static size_t mixed_stride(const struct attention_kind *kind) {
    return (size_t)round_up(kind->num_heads * kind->head_dim, 16);
}

static int heads_per_task(const struct attention_kind *kind) {
    int group = kind->num_heads / kind->num_kv_heads;
    return group < MAX_TASK_QUERIES ? group : MAX_TASK_QUERIES;
}

/* Rows whose context may be cut into partial results: decodes, draft tokens, and the first few of a prompt. */
static size_t parted_rows(const struct model *m) { return (size_t)m->max_sampled + MAX_TASK_QUERIES; }

static void demand_attention(const struct model *m, const struct layer *l, struct demand *demand) {
    const struct attention_kind *kind = &m->kinds[l->attention.kind];
    size_t part = (size_t)kind->num_heads * MAX_PARTS * (size_t)(round_up(kind->head_dim, 16) + 2);
    demand->projected = larger(demand->projected, (size_t)columns_of(kind).width);
    demand->mixed = larger(demand->mixed, mixed_stride(kind));
    demand->row = larger(demand->row, mixed_stride(kind));
    demand->scratch = larger(demand->scratch, attention_scratch_floats(kind->head_dim));
    demand->parts = larger(demand->parts, parted_rows(m) * part);
    for (int i = 0; i < 3; i++) demand_matrix(demand, &l->attention.qkv[i]);
    demand_matrix(demand, &l->attention.output);
}

/* Bytes of a layer's keys, or of its values, in a page. */
static size_t side_bytes(const struct model *m, const struct attention_kind *kind) {
    return (size_t)kind->num_kv_heads * kv_page_bytes(m->kv_form, kind->head_dim);
}

static void place_attention(struct model *m, struct layer *l) {
    const struct attention_kind *kind = &m->kinds[l->attention.kind];
    l->attention.page_offset = m->page_bytes[kind->table];
    m->page_bytes[kind->table] += 2 * side_bytes(m, kind);
}

void lay_out_attention(const struct model *m, struct arena *arena, uint8_t *base) {
    size_t rows = (size_t)m->max_rows, sequences = (size_t)m->max_sequences;
    for (int i = 0; i < m->num_kinds; i++) {
        const struct attention_kind *kind = &m->kinds[i];
        struct attention_plan *plan = &arena->plans[i];
        size_t half = (size_t)kind->head_dim / 2, kv_heads = (size_t)kind->num_kv_heads;
        int width = heads_per_task(kind), group = kind->num_heads / kind->num_kv_heads;
        size_t tasks = (rows + sequences * MAX_PARTS) * kv_heads * (size_t)((group + width - 1) / width);
        plan->kind = kind;
        plan->cosine = carve(arena, base, rows * half, 4);
        plan->sine = carve(arena, base, rows * half, 4);
        plan->query_scales = carve(arena, base, rows, 4);
        plan->tasks = carve(arena, base, tasks, sizeof *plan->tasks);
        plan->row_parts = carve(arena, base, rows, 4);
    }
}

/* ---------------------------------------------------------------- before the layers */

/* Number of partial results of a context of so many tokens, where `share` is even work for every thread. */
static int num_parts(int tokens, int64_t share) {
    int64_t parts = tokens / (share < MIN_PART_TOKENS ? MIN_PART_TOKENS : share);
    return parts < 1 ? 1 : parts > MAX_PARTS ? MAX_PARTS : (int)parts;
}

/* First page that a token at `position` attends to. */
static int first_page(const struct attention_kind *kind, int position) {
    int outside = position + 1 - kind->window_tokens;
    return kind->window_tokens > 0 && outside > 0 ? outside / PAGE_TOKENS : 0;
}

/* Tokens of a segment of the context of a token at `position`. */
static int32_t segments_at(const struct attention_kind *kind, int position) {
    int visible = position + 1;
    return segment_tokens(kind->window_tokens > 0 && kind->window_tokens < visible ? kind->window_tokens : visible);
}

static void plan_kind(const struct run *run, struct attention_plan *plan) {
    const struct model *m = run->model;
    const struct attention_kind *kind = plan->kind;
    const struct step *s = run->step;
    int group = kind->num_heads / kind->num_kv_heads, width = heads_per_task(kind), threads = pool_threads(m->pool);
    int rows_per_task = MAX_TASK_QUERIES / width;
    const int32_t *tables = s->page_tables + (size_t)(kind->table * s->num_sequences) * (size_t)s->page_columns;
    int64_t narrow_tokens = 0; /* of the sequences whose rows are one task a key-value head */
    plan->writes_apart = width < group;
    for (int b = 0; b < s->num_sequences; b++) {
        int num_rows = s->cu_seqlens[b + 1] - s->cu_seqlens[b];
        if (num_rows > 1) plan->writes_apart = 1;
        if (num_rows <= rows_per_task)
            narrow_tokens += s->context_lens[b] - first_page(kind, s->positions[s->cu_seqlens[b]]) * PAGE_TOKENS;
    }
    int64_t share = narrow_tokens * kind->num_kv_heads / (4 * threads);
    memset(plan->row_parts, 0, (size_t)s->num_tokens * 4);
    plan->num_tasks = 0;
    for (int b = 0; b < s->num_sequences; b++) {
        int first = s->cu_seqlens[b], num_rows = s->cu_seqlens[b + 1] - first;
        for (int row = 0, rows; row < num_rows; row += rows) {
            int position = s->positions[first + row], from = first_page(kind, position) * PAGE_TOKENS;
            int32_t tokens = segments_at(kind, position);
            rows = num_rows - row < rows_per_task ? num_rows - row : rows_per_task;
            /* Rows of a task have segments in common. */
            while (segments_at(kind, position + rows - 1) != tokens) rows--;
            int before = from / tokens, segments = (position + rows - 1) / tokens + 1 - before, parts = 1;
            if (rows == num_rows && (size_t)(first + num_rows) <= parted_rows(m) && segments <= MAX_PARTS)
                parts = num_parts(s->context_lens[b] - from, share);
            if (parts > segments) parts = segments;
            for (int i = 0; parts > 1 && i < rows; i++) plan->row_parts[first + row + i] = segments;
            for (int kv = 0; kv < kind->num_kv_heads; kv++)
                for (int head = 0; head < group; head += width)
                    for (int part = 0; part < parts; part++) {
                        int start = segments * part / parts, end = segments * (part + 1) / parts;
                        plan->tasks[plan->num_tasks++] = (struct attention_task){
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
                            .writes = !plan->writes_apart && part + 1 == parts,
                        };
                    }
        }
    }
}

void plan_attention(struct run *run) {
    for (int i = 0; i < run->model->num_kinds; i++) plan_kind(run, &run->arena.plans[i]);
}

void rotate_row(const struct run *run, int row) {
    int position = run->step->positions[row];
    for (int k = 0; k < run->model->num_kinds; k++) {
        const struct attention_plan *plan = &run->arena.plans[k];
        const struct attention_kind *kind = plan->kind;
        int half = kind->head_dim / 2, originals = position / kind->query_tokens;
        const float *factors = kind->rope + half;
        size_t at = (size_t)row * (size_t)half;
        plan->query_scales[row] = kind->scale * (1 + kind->query_growth * logf((float)(1 + originals)));
        for (int i = 0; i < half; i++) {
            float angle = (float)position * kind->rope[i];
            plan->cosine[at + (size_t)i] = cosf(angle) * factors[i];
            plan->sine[at + (size_t)i] = sinf(angle) * factors[i];
        }
    }
}

/* ---------------------------------------------------------------- within a layer */

static const float *mixed_row(const struct run *run, const void *context, int thread, int row) {
    const struct attention *attention = context;
    if (attention->row_parts[row] == 0) return attention->out + (size_t)row * attention->out_stride;
    float *merged = temporary_row(run, thread);
    run->model->kernels->merge_parts(attention, row, attention->row_parts[row], merged);
    return merged;
}

static void attend(const struct run *run, const struct attention *attention, const struct attention_plan *plan, int thread) {
    const struct model *m = run->model;
    const struct step *s = run->step;
    const struct arena *a = &run->arena;
    int threads = pool_threads(m->pool);
    if (plan->writes_apart) {
        int first, end;
        const int32_t *slots = s->slot_mappings + (size_t)plan->kind->table * (size_t)s->num_tokens;
        share_of(s->num_tokens, threads, thread, &first, &end);
        for (int row = first; row < end; row++)
            for (int kv = 0; kv < attention->num_kv_heads; kv++)
                m->kernels->write_kv(attention, row, kv, slots[row] / PAGE_TOKENS, slots[row] % PAGE_TOKENS);
        pool_barrier(m->pool);
    }
    float *scratch = a->scratch + (size_t)thread * a->demand.scratch;
    /* Interleaved, not in runs: a prompt's later rows attend to more. */
    for (size_t i = (size_t)thread; i < plan->num_tasks; i += (size_t)threads)
        m->kernels->attend(attention, &plan->tasks[i], scratch);
}

static void run_attention(const struct run *run, const struct layer *l, const struct layer *before, int thread) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    const struct attention_layer *own = &l->attention;
    const struct attention_plan *plan = &a->plans[own->kind];
    const struct attention_kind *kind = plan->kind;
    const struct columns columns = columns_of(kind);
    uint8_t *cache = m->caches[kind->table] + own->page_offset;
    struct attention attention = {
        .qkv = a->projected,
        .qkv_stride = (size_t)columns.width,
        .key_column = columns.key,
        .value_column = columns.value,
        .qk_norm = own->qk_norm,
        .cosine = plan->cosine,
        .sine = plan->sine,
        .keys = cache,
        .values = cache + side_bytes(m, kind),
        .page_stride = m->page_bytes[kind->table],
        .head_stride = kv_page_bytes(m->kv_form, kind->head_dim),
        .out = a->mixed,
        .out_stride = mixed_stride(kind),
        .parts = a->parts,
        .row_parts = plan->row_parts,
        .max_parts = MAX_PARTS,
        .num_heads = kind->num_heads,
        .num_kv_heads = kind->num_kv_heads,
        .head_dim = kind->head_dim,
        .is_gated = kind->is_gated,
        .kv_form = m->kv_form,
        .eps = l->eps,
        .window_tokens = kind->window_tokens,
        .scales = plan->query_scales,
    };
    const uint8_t *x = prepare_normed(run, thread, l, before, own->qkv[0].format);
    multiply(run, thread, own->qkv, 3, x, a->projected, attention.qkv_stride, STORE);
    pool_barrier(m->pool);
    attend(run, &attention, plan, thread);
    pool_barrier(m->pool);
    x = prepare(run, thread, mixed_row, &attention, own->output.columns, own->output.format);
    join(run, thread, l, &own->output, x);
}

const struct layer_operations attention_operations = {
    .demand = demand_attention, .place = place_attention, .run = run_attention,
};
