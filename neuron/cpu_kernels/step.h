/* Model and step of the executor. Both are filled by native.pyx. */
#ifndef NEURON_STEP_H
#define NEURON_STEP_H

#include "kernels.h"
#include "pool.h"

struct layer {
    const float *input_norm; /* [hidden padded to 16] */
    const float *post_norm;
    /* Norms of the outputs of attention and MLP, before the residual; both or neither in all layers. */
    const float *attention_out_norm, *mlp_out_norm;
    const float *qk_norm; /* [H + K, head_dim], or NULL */
    struct matrix qkv[3]; /* separate, because a file may store each in another kind */
    struct matrix output, gate_up, down;
    int kind;  /* of attention */
    int place; /* among the layers of its page table; set by place_layers */
};

/* Table 0 has all pages of a sequence. A second one is of the windowed layers, with a sequence's last pages. */
enum { MAX_TABLES = 2 };

/* Attention of a model's layers differs in its window and its rotary embedding. */
enum { MAX_KINDS = 2 };

struct model {
    const struct kernels *kernels;
    struct pool *pool;
    int threads; /* of the pool */
    int num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab;
    float eps;
    float embedding_scale, attention_scale;
    float logit_cap; /* of the logits; 0: none */
    int gelu; /* the gate's activation; else SiLU */
    enum kv_form kv_form;
    int max_rows, max_sequences, max_sampled;
    int num_kinds;
    int window_tokens[MAX_KINDS];  /* 0: all tokens; one kind at most has a window */
    const float *ropes[MAX_KINDS]; /* [head_dim]: angle per position of each pair, and behind these each pair's factor */
    float query_growth; /* queries are multiplied by 1 + growth log(1 + position / query_tokens), in whole numbers */
    int query_tokens;
    const float *norm; /* [hidden padded to 16] */
    struct matrix embedding, head;
    struct layer *layers;
    int num_tables;
    int table_layers[MAX_TABLES]; /* number of layers; set by place_layers */
    uint8_t *caches[MAX_TABLES];  /* [pages, layers of the table, 2 (keys, values), K, page of a head] */
    uint8_t *arena; /* arena_bytes(model), 64-byte aligned */
};

/* Sampling parameters by row: neuron.engine.sampler's tables. A row with a temperature below 0 is skipped. */
struct draws {
    const double *temperature, *top_p, *min_p;
    const int32_t *top_k, *counters;
    const uint64_t *seeds;
    float *scratch; /* [threads, vocab padded] */
};

/* Arrays of neuron.engine.plan.StepPlan, and the results. */
struct step {
    int num_tokens, num_sequences, num_sampled, num_hidden, page_columns;
    const int32_t *token_ids, *positions;         /* [T] */
    const int32_t *slot_mappings;                 /* [tables, T] */
    const int32_t *cu_seqlens;                    /* [B + 1] */
    const int32_t *page_tables;                   /* [tables, B, page_columns]; 0: no page */
    const int32_t *context_lens;                  /* [B] */
    const int32_t *sampled;                       /* [R]: rows */
    const int32_t *hidden_rows;                   /* [E] */
    float *logits;   /* [R, vocab padded]: logits of the sampled rows; NULL: their likeliest token into ids */
    const struct draws *draws; /* tokens drawn from logits, which are lost, into ids; NULL: all are left */
    int32_t index;             /* added to counters: every token of a sequence has its own number */
    int32_t *ids;    /* [R]: NON_FINITE for a row whose logits are not; untouched with logits that are left */
    int32_t *finite; /* [B]: whether the sequence's last hidden state is finite */
    float *hidden;   /* [E, hidden]: hidden_rows, normalised */
};

enum { NON_FINITE = -1 };

/* The number in [0, 1) that a row draws with: neuron.triton_kernels.sampling. */
double uniform(uint64_t seed, uint64_t counter);

/* Count the layers of each page table; windows of all layers are set. */
void place_layers(struct model *model);

/* Number of the page table of layers of a kind. */
static inline int table_of(const struct model *model, int kind) {
    return model->window_tokens[kind] > 0 ? model->num_tables - 1 : 0;
}

/* Bytes of a page over all layers of a table. */
size_t page_bytes(const struct model *model, int table);

/* Bytes of the arena; depends on sizes and threads only. */
size_t arena_bytes(const struct model *model);

/* Run a step on the model's pool. Its sizes are within the model's bounds and its ids within the vocabulary. */
void run_step(const struct model *model, const struct step *step);

#endif
