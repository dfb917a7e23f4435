/* What the layers of a step have in common: the arena, and the operations that they are made of.
 *
 * Between barriers each thread has its own rows of weights, for all activations; or its own activations; or its own
 * tasks. With few rows each thread prepares all activations for itself, which saves a barrier.
 */
#ifndef NEURON_LAYERS_H
#define NEURON_LAYERS_H

#include "step.h"

#include <math.h>

enum { PRIVATE_ROWS = 2 };

/* Work space of a layer. Layers share it, each with its own strides: nothing in it outlives a layer. */
struct demand {
    size_t projected;  /* floats of a row's products with the layer's first matrices */
    size_t replayed;   /* floats of the rows of replayed draft tokens */
    size_t mixed;      /* floats of a row behind attention or recurrence */
    size_t row;        /* floats of a row in preparation */
    size_t scratch;    /* floats of a thread's tasks */
    size_t parts;      /* floats of partial results of attention */
    size_t activation; /* bytes of a row in the form that a matrix multiplies */
};

/* Rotary tables and tasks of the layers with one kind of attention. */
struct attention_plan {
    const struct attention_kind *kind;
    float *cosine, *sine;        /* [T, head_dim / 2] */
    float *query_scales;         /* [T] */
    struct attention_task *tasks;
    size_t num_tasks;
    int32_t *row_parts;          /* [T]: partial results of each row, 0 if it is whole */
    int writes_apart;            /* keys and values are written in a pass of their own */
};

struct arena {
    float *x;         /* [T, hidden_stride]: the residual */
    float *out;       /* [T, hidden_stride]: a layer's output, where it is normalised */
    float *own_x;     /* [threads, PRIVATE_ROWS, hidden_stride]: each thread's copy of the residual */
    float *projected; /* [T, demand.projected] */
    float *replayed;  /* [demand.replayed] */
    float *mixed;     /* [T, demand.mixed] */
    float *parts;
    uint8_t *shared;  /* [T, demand.activation] */
    uint8_t *private; /* [threads, PRIVATE_ROWS, demand.activation] */
    float *row;       /* [threads, demand.row] */
    float *scratch;   /* [threads, demand.scratch] */
    struct best *best; /* [threads, max_sampled] */
    struct attention_plan plans[MAX_KINDS];
    size_t hidden_stride;
    struct demand demand;
    size_t bytes;
};

struct run {
    const struct model *model;
    const struct step *step;
    struct arena arena;
    int has_own_x; /* the threads' copies of the residual are in use */
};

/* What a step needs to know of a kind of layers. */
struct layer_operations {
    /* Raise `demand` to what the layer takes. */
    void (*demand)(const struct model *model, const struct layer *layer, struct demand *demand);
    /* Give the layer its place in what it keeps; NULL: it keeps nothing. */
    void (*place)(struct model *model, struct layer *layer);
    /* Run the layer behind `before`, NULL at first, on one thread; all threads have finished it where it returns. */
    void (*run)(const struct run *run, const struct layer *layer, const struct layer *before, int thread);
};

extern const struct layer_operations attention_operations, mlp_operations, delta_operations;

static inline size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static inline void share_of(int count, int threads, int thread, int *first, int *end) {
    *first = (int)((int64_t)count * thread / threads);
    *end = (int)((int64_t)count * (thread + 1) / threads);
}

/* Raise `demand` to the activations of a matrix. */
void demand_matrix(struct demand *demand, const struct matrix *matrix);

/* Carve an array from the arena; NULL where it has no base and is only measured. */
void *carve(struct arena *arena, uint8_t *base, size_t count, size_t size);

/* Plans of attention: their arrays, and before the layers of a step their tasks and each row's rotation. */
void lay_out_attention(const struct model *model, struct arena *arena, uint8_t *base);
void plan_attention(struct run *run);
void rotate_row(const struct run *run, int row);

/* A row of the step's activations, maybe in the thread's temporary one. */
typedef const float *row_source(const struct run *run, const void *context, int thread, int row);

/* Every row of the step in the form that `format` multiplies: this thread's own copy, or the shared one. */
const uint8_t *prepare(const struct run *run, int thread, row_source *source, const void *context, int columns, int format);

/* Rows of the residual, to which the output of the layer `before` is added where it is normalised, normalised for `layer`. */
const uint8_t *prepare_normed(const struct run *run, int thread, const struct layer *layer, const struct layer *before, int format);

/* The same rows again, which are `x` in the form of `format`, in the form of `wanted`. */
const uint8_t *prepare_again(const struct run *run, int thread, const struct layer *layer, const uint8_t *x, int format, int wanted);

/* The thread's share of x times matrices side by side, whose rows are padded to 16. */
void multiply(const struct run *run, int thread, const struct matrix *matrices, int count, const uint8_t *x, float *y,
              size_t y_stride, enum epilogue epilogue);

/* Add x times a layer's last matrix to the residual, or keep it to be normalised. */
void join(const struct run *run, int thread, const struct layer *layer, const struct matrix *matrix, const uint8_t *x);

static inline float *temporary_row(const struct run *run, int thread) {
    return run->arena.row + (size_t)thread * run->arena.demand.row;
}

#endif
