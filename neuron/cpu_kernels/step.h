/* A model as the executor knows it, and one step of it. Both are filled by native.pyx. */
#ifndef NEURON_STEP_H
#define NEURON_STEP_H

#include "kernels.h"
#include "pool.h"

struct layer {
    const float *input_norm; /* [hidden padded to 16] */
    const float *post_norm;
    /* Of what attention and MLP put out, before it joins the residual; both or neither in all layers. */
    const float *attention_out_norm, *mlp_out_norm;
    const float *qk_norm; /* [H + K, head_dim], or NULL */
    struct matrix qkv[3]; /* apart, because a file may store each in a kind of its own */
    struct matrix output, gate_up, down;
    int windowed; /* attends to the model's window only, with its rotary frequencies */
};

struct model {
    const struct kernels *kernels;
    struct pool *pool;
    int num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab;
    float eps;
    float embedding_scale, attention_scale;
    float logit_cap; /* of what is drawn from; 0: none */
    int gelu; /* the gate's activation; else SiLU */
    enum kv_form kv_form;
    int max_rows, max_sequences, max_sampled;
    int window_tokens; /* of the layers that have one; 0: none has */
    const float *inverse_frequencies, *window_inverse_frequencies; /* [head_dim / 2] */
    const float *norm; /* [hidden padded to 16] */
    struct matrix embedding, head;
    struct layer *layers;
    uint8_t *cache; /* [pages, layers, 2 (keys, values), K, page of a head] */
    uint8_t *arena; /* arena_bytes(model), 64-byte aligned */
};

/* How sampled rows are drawn: neuron.engine.sampler's tables, by row. Below a temperature of 0 one is not, and left. */
struct draws {
    const double *temperature, *top_p, *min_p;
    const int32_t *top_k, *counters;
    const uint64_t *seeds;
    float *scratch; /* [threads, vocab padded] */
};

/* The arrays of neuron.engine.plan.StepPlan, and where the results go. */
struct step {
    int num_tokens, num_sequences, num_sampled, num_hidden, page_columns;
    const int32_t *token_ids, *positions, *slot_mapping; /* [T] */
    const int32_t *cu_seqlens;                    /* [B + 1] */
    const int32_t *page_table;                    /* [B, page_columns] */
    const int32_t *context_lens;                  /* [B] */
    const int32_t *sampled;                       /* [R]: rows */
    const int32_t *hidden_rows;                   /* [E] */
    float *logits;   /* [R, vocab padded]: what the sampled rows come to; NULL: their likeliest token into ids */
    const struct draws *draws; /* tokens drawn from logits, which are lost, into ids; NULL: all are left */
    int32_t index;             /* added to counters: every token of a sequence has its own number */
    int32_t *ids;    /* [R]: NON_FINITE for a row whose logits are not; untouched with logits that are left */
    int32_t *finite; /* [B]: whether all that a sequence's last row comes from is */
    float *hidden;   /* [E, hidden]: those rows, normalised */
};

enum { NON_FINITE = -1 };

/* Bytes that one page takes over all layers. */
size_t page_bytes(const struct model *model);

/* Bytes of everything a step writes beside the cache; depends on sizes and threads only. */
size_t arena_bytes(const struct model *model);

/* Run a step on the model's pool. Its sizes are within the model's bounds and its ids within the vocabulary. */
void run_step(const struct model *model, const struct step *step);

#endif
