/* Gated MLP of a step: { norm, gate-up, SwiGLU | down + residual }. */
#include "layers.h"

static size_t gated_stride(const struct layer *l) { return (size_t)(l->mlp.gate_up.rows / 2); }

static void demand_mlp(const struct model *m, const struct layer *l, struct demand *demand) {
    (void)m;
    demand->projected = larger(demand->projected, gated_stride(l));
    demand_matrix(demand, &l->mlp.gate_up);
    demand_matrix(demand, &l->mlp.down);
}

static const float *gated_row(const struct run *run, const void *layer, int thread, int row) {
    (void)thread;
    return run->arena.projected + (size_t)row * gated_stride(layer);
}

static void run_mlp(const struct run *run, const struct layer *l, const struct layer *before, int thread) {
    const struct mlp_layer *mlp = &l->mlp;
    const uint8_t *x = prepare_normed(run, thread, l, before, mlp->gate_up.format);
    multiply(run, thread, &mlp->gate_up, 1, x, run->arena.projected, gated_stride(l), mlp->is_gelu ? GEGLU : SWIGLU);
    pool_barrier(run->model->pool);
    x = prepare(run, thread, gated_row, l, mlp->down.columns, mlp->down.format);
    join(run, thread, l, &mlp->down, x);
}

const struct layer_operations mlp_operations = {.demand = demand_mlp, .run = run_mlp};
