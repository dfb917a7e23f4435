/* Model and step of the executor. Both are filled by native.pyx. */
#ifndef NEURON_STEP_H
#define NEURON_STEP_H

#include "kernels.h"
#include "pool.h"

/* Attention of some layers: what they have in common. */
struct attention_kind {
    int num_heads, num_kv_heads, head_dim;
    int window_tokens;  /* 0: all tokens */
    int table;          /* page table of its layers */
    float scale;        /* of scores */
    float query_growth; /* queries are multiplied by 1 + growth log(1 + position / query_tokens), in whole numbers */
    int query_tokens;
    int is_gated;      /* the output is multiplied by the sigmoid of gates, which stand behind each query head */
    const float *rope; /* [head_dim]: angle per position of each pair, and behind these each pair's factor */
};

struct attention_layer {
    int kind;
    const float *qk_norm;  /* [H + K, head_dim], or NULL */
    struct matrix qkv[3];  /* separate, because a file may store each in another kind */
    struct matrix output;
    size_t page_offset; /* bytes of a page before its own */
};

struct mlp_layer {
    struct matrix gate_up, down;
    int is_gelu; /* the gate's activation; else SiLU */
};

struct delta_layer {
    struct delta_heads heads;
    struct matrix qkv[3], z, gates[2]; /* gates: strengths, then decays */
    struct matrix convolution[3];      /* of q, k and v: W32, a column for each token of its width */
    const float *decay, *bias;         /* [H] */
    const float *head_norm;            /* [value_dim padded to 16] */
    struct matrix output;
    int max_drafts; /* draft tokens of a sequence in a step */
    size_t state_offset, gates_offset; /* bytes of a slot before its state, and before the gates of drafts */
};

enum layer_kind { ATTENTION, GATED_MLP, GATED_DELTA };

/* Layer: adds to the residual x what it makes of norm(x), normalised by out_norm where it is not NULL. */
struct layer {
    enum layer_kind kind;
    float eps;
    const float *norm;     /* [hidden padded to 16] */
    const float *out_norm; /* in all layers, or in none */
    union {
        struct attention_layer attention;
        struct mlp_layer mlp;
        struct delta_layer delta;
    };
};

/* Table 0 has all pages of a sequence. The others are of windowed layers, with a sequence's last pages. */
enum { MAX_TABLES = 4, MAX_KINDS = 8 };

struct model {
    const struct kernels *kernels;
    struct pool *pool;
    int threads; /* of the pool */
    int hidden, vocab;
    float eps; /* of the last norm */
    float embedding_scale;
    float logit_cap; /* of the logits; 0: none */
    enum kv_form kv_form;
    int max_rows, max_sequences, max_sampled;
    const float *norm; /* [hidden padded to 16] */
    struct matrix embedding, head;
    int num_kinds;
    struct attention_kind kinds[MAX_KINDS];
    int num_layers;
    struct layer *layers;
    int num_tables;
    size_t page_bytes[MAX_TABLES]; /* of a page over all layers of a table */
    uint8_t *caches[MAX_TABLES];   /* [pages, layers of the table, 2 (keys, values), K, page of a head] */
    size_t slot_bytes;             /* of the states of all layers; 0: none has one */
    uint8_t *states;               /* [slots, slot_bytes] */
    uint8_t *arena;                /* arena_bytes(model), 64-byte aligned */
    int into_l2;                   /* the way of weights: probe_prefetch */
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
    const int32_t *state_slots;                   /* [B]; NULL where no layer has a state */
    const int32_t *replays;                       /* [B]; NULL where no state is behind */
    int first_drafting, end_drafting;             /* sequences with draft tokens, by which no state advances */
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

/* Give each layer its place in the pages of its table, or in a slot of states; called once all layers are set. */
void place_layers(struct model *model);

/* Bytes of the arena; depends on sizes and threads only. */
size_t arena_bytes(const struct model *model);

/* Find the way of weights that is the quicker one on this processor; no result depends on it. The arena is attached. */
void probe_prefetch(struct model *model);

/* Run a step on the model's pool. Its sizes are within the model's bounds and its ids within the vocabulary. */
void run_step(const struct model *model, const struct step *step);

#endif
