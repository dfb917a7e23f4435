/* Gated delta net of a step: { norm, qkv, convolution, z, gates | rule, gated norm | output + residual }.
 *
 * A thread convolves the channels that it has multiplied itself. A sequence's state is of the slot that the step names.
 */
#include "layers.h"

/* Columns of a row's projections, each part padded to 16: those of q come first. */
struct columns {
    int key, value, z, strength, decay, width;
};

static struct columns columns_of(const struct delta_layer *d) {
    int key = d->qkv[0].rows, value = key + d->qkv[1].rows, z = value + d->qkv[2].rows;
    int strength = z + d->z.rows, decay = strength + d->gates[0].rows;
    return (struct columns){key, value, z, strength, decay, decay + d->gates[1].rows};
}

static size_t mixed_stride(const struct delta_layer *d) { return (size_t)round_up(d->output.columns, 16); }

/* Bytes of the inputs that a part's convolution keeps. */
static size_t input_bytes(const struct delta_layer *d, const struct matrix *convolution) {
    return (size_t)convolution->rows * (size_t)(convolution->columns - 1 + d->max_drafts) * sizeof(float);
}

static size_t state_bytes(const struct delta_layer *d) { return delta_state_floats(&d->heads) * sizeof(float); }

static void demand_delta(const struct model *m, const struct layer *l, struct demand *demand) {
    const struct delta_layer *d = &l->delta;
    demand->projected = larger(demand->projected, (size_t)columns_of(d).width);
    demand->replayed = larger(demand->replayed, (size_t)(m->max_sequences * d->max_drafts * columns_of(d).width));
    demand->mixed = larger(demand->mixed, mixed_stride(d));
    demand->scratch = larger(demand->scratch, delta_scratch_floats(&d->heads));
    for (int i = 0; i < 3; i++) demand_matrix(demand, &d->qkv[i]);
    for (int i = 0; i < 2; i++) demand_matrix(demand, &d->gates[i]);
    demand_matrix(demand, &d->z);
    demand_matrix(demand, &d->output);
}

static void place_delta(struct model *m, struct layer *l) {
    struct delta_layer *d = &l->delta;
    d->state_offset = m->slot_bytes;
    m->slot_bytes += state_bytes(d);
    for (int i = 0; i < 3; i++) m->slot_bytes += input_bytes(d, &d->convolution[i]);
    d->gates_offset = m->slot_bytes;
    m->slot_bytes += (size_t)(2 * d->max_drafts * d->heads.num_values) * sizeof(float);
    m->slot_bytes = (m->slot_bytes + 63) & ~(size_t)63;
}

static struct sequences sequences_of(const struct step *s, const struct delta_layer *d) {
    return (struct sequences){
        .count = s->num_sequences,
        .cu_seqlens = s->cu_seqlens,
        .slots = s->state_slots,
        .replays = s->replays,
        .first_drafting = s->first_drafting,
        .end_drafting = s->end_drafting,
        .max_drafts = d->max_drafts,
    };
}

/* Convolve the channels of q, k and v that multiply has given to this thread. */
static void convolve(const struct run *run, const struct delta_layer *d, const struct columns *columns, int thread) {
    const struct model *m = run->model;
    struct convolution task = {
        .sequences = sequences_of(run->step, d),
        .x = run->arena.projected,
        .replayed = run->arena.replayed,
        .x_stride = (size_t)columns->width,
        .inputs = m->states + d->state_offset + state_bytes(d),
        .slot_bytes = m->slot_bytes,
    };
    int first, end;
    share_of(columns->z / BLOCK_ROWS, pool_threads(m->pool), thread, &first, &end);
    for (int i = 0; i < 3; i++) {
        int blocks = d->qkv[i].rows / BLOCK_ROWS, from = first > 0 ? first : 0, to = end < blocks ? end : blocks;
        task.weight = &d->convolution[i];
        if (from < to) m->kernels->convolve(&task, from, to);
        task.x += d->qkv[i].rows;
        task.replayed += d->qkv[i].rows;
        task.inputs += input_bytes(d, task.weight);
        first -= blocks;
        end -= blocks;
    }
}

static void apply_rule(const struct run *run, const struct layer *l, const struct columns *columns, int thread) {
    const struct model *m = run->model;
    const struct arena *a = &run->arena;
    const struct delta_layer *d = &l->delta;
    struct delta task = {
        .sequences = sequences_of(run->step, d),
        .heads = d->heads,
        .x = a->projected,
        .replayed = a->replayed,
        .x_stride = (size_t)columns->width,
        .key_column = columns->key,
        .value_column = columns->value,
        .z_column = columns->z,
        .strength_column = columns->strength,
        .decay_column = columns->decay,
        .decay = d->decay,
        .bias = d->bias,
        .head_norm = d->head_norm,
        .eps = l->eps,
        .states = m->states + d->state_offset,
        .gates = m->states + d->gates_offset,
        .slot_bytes = m->slot_bytes,
        .out = a->mixed,
        .out_stride = mixed_stride(d),
    };
    float *scratch = a->scratch + (size_t)thread * a->demand.scratch;
    int num_heads = d->heads.num_keys, num_tasks = run->step->num_sequences * num_heads;
    for (int i = thread; i < num_tasks; i += pool_threads(m->pool))
        m->kernels->delta(&task, i / num_heads, i % num_heads, scratch);
}

static const float *mixed_row(const struct run *run, const void *layer, int thread, int row) {
    (void)thread;
    return run->arena.mixed + (size_t)row * mixed_stride(layer);
}

static void run_delta(const struct run *run, const struct layer *l, const struct layer *before, int thread) {
    const struct delta_layer *d = &l->delta;
    const struct columns columns = columns_of(d);
    struct pool *pool = run->model->pool;
    float *y = run->arena.projected;
    size_t stride = (size_t)columns.width;
    const uint8_t *x = prepare_normed(run, thread, l, before, d->qkv[0].format);
    multiply(run, thread, d->qkv, 3, x, y, stride, STORE);
    convolve(run, d, &columns, thread);
    x = prepare_again(run, thread, l, x, d->qkv[0].format, d->z.format);
    multiply(run, thread, &d->z, 1, x, y + columns.z, stride, STORE);
    x = prepare_again(run, thread, l, x, d->z.format, d->gates[0].format);
    multiply(run, thread, d->gates, 2, x, y + columns.strength, stride, STORE);
    pool_barrier(pool);
    apply_rule(run, l, &columns, thread);
    pool_barrier(pool);
    x = prepare(run, thread, mixed_row, d, d->output.columns, d->output.format);
    join(run, thread, l, &d->output, x);
}

const struct layer_operations delta_operations = {.demand = demand_delta, .place = place_delta, .run = run_delta};
