/* The operations of a step as a table of functions: one table a dispatch level, the same signatures in each. */
#ifndef NEURON_KERNELS_H
#define NEURON_KERNELS_H

#include "formats.h"

/* Epilogue of the products of one block of rows. */
enum epilogue {
    STORE,  /* y = w x + bias */
    ADD,    /* y += w x + bias */
    SWIGLU, /* blocks alternate gate, up: y = silu(gate) up, at half the row number */
    GEGLU,  /* with gelu(gate), in its tanh form */
    ARGMAX, /* keep the largest product of each x, and whether all were finite */
};

/* The likeliest token of one row so far. */
struct best {
    float value;
    int32_t index;    /* -1: none yet */
    float not_finite; /* 0, or NaN once a product was not finite */
};

/* y[T, rows] = x[T, columns] w[rows, columns]^T. x is in the form that w's format multiplies (activation_bytes). */
struct matmul {
    const struct matrix *w;
    const uint8_t *x;
    size_t x_stride; /* bytes */
    float *y;
    size_t y_stride; /* floats */
    struct best *best; /* [T], ARGMAX only */
    int num_x;       /* T */
    int valid_rows;  /* ARGMAX only: rows that are no padding */
    int into_l2;     /* weights are prefetched into the second-level cache, not past it */
    enum epilogue epilogue;
};

/* Format of keys and values in the cache. */
enum kv_form { KV_BFLOAT16, KV_FLOAT32, KV_INT8 };

/* Bytes of a page of one head's keys, or of its values. In int8, with a scale for each token behind them. */
static inline size_t kv_page_bytes(enum kv_form form, int head_dim) {
    static const size_t bytes[] = {[KV_BFLOAT16] = 2, [KV_FLOAT32] = 4, [KV_INT8] = 1};
    size_t elements = (size_t)PAGE_TOKENS * (size_t)round_up(head_dim, 16);
    return elements * bytes[form] + (form == KV_INT8 ? PAGE_TOKENS * sizeof(float) : 0);
}

/* Attention task: a run of query rows of one sequence over a run of its pages, for some heads of one key-value head. */
struct attention_task {
    const int32_t *pages; /* the sequence's page table */
    int32_t first_row;    /* in the step */
    int32_t num_rows;
    int32_t position;   /* of the first row; the rows follow one another */
    int32_t first_head;
    int32_t num_heads;  /* which share kv_head */
    int32_t kv_head;
    int32_t first_token; /* of the context, a multiple of the page; of a part, where a segment begins for the rows */
    int32_t end_token;
    int32_t segment_tokens; /* of each row of it */
    int32_t part;   /* -1: whole, into out; else which of the rows' segments is the first: each has a result of its own */
    int32_t writes; /* first store this row's key and value (num_rows is 1) */
};

enum { MAX_TASK_QUERIES = 16, SCORE_TOKENS = 128, MAX_SEGMENTS = 16 };

/* Tokens of a segment of the context of a row that attends to so many: a multiple of SCORE_TOKENS, such that at most
 * MAX_SEGMENTS segments overlap the attended tokens, wherever they begin. */
static inline int32_t segment_tokens(int visible_tokens) {
    int32_t tokens = SCORE_TOKENS;
    while (visible_tokens > (MAX_SEGMENTS - 1) * tokens) tokens *= 2;
    return tokens;
}

/* One layer's attention over a step. Head vectors are padded to whole registers: padded = round_up(head_dim, 16). */
struct attention {
    const float *qkv; /* [T, qkv_stride]: q heads, k heads at key_column, v heads at value_column */
    size_t qkv_stride;
    int key_column, value_column;
    const float *qk_norm; /* [H + K, head_dim], or NULL */
    const float *cosine, *sine; /* [T, head_dim / 2] */
    uint8_t *keys, *values;     /* this layer's, of page 0 */
    size_t page_stride;         /* bytes from page to page */
    size_t head_stride;         /* bytes from one kv head's page to the next's */
    float *out;                 /* [T, out_stride]: heads of head_dim */
    size_t out_stride;
    float *parts; /* [T, H, max_parts, padded + 2], of each segment: weighted values, their largest score, their sum of weights */
    const int32_t *row_parts; /* [T]: partial results of each row, 0 if it is whole */
    int max_parts;
    int num_heads, num_kv_heads, head_dim;
    enum kv_form kv_form;
    int window_tokens; /* attended tokens up to the row's own; 0: all */
    float eps;
    const float *scales; /* [T]: factor of each row's queries */
    int is_gated;        /* each q head is followed by gates of its size, whose sigmoid multiplies its output */
};

enum { MAX_CONVOLUTION = 4, CHUNK_TOKENS = 64 };

/* Sequences of a step, and the slots of their states. Those with draft tokens are in a run; their states advance by their
 * first token alone, and keep the inputs of the drafts. */
struct sequences {
    int count;
    const int32_t *cu_seqlens, *slots; /* [B + 1], [B] */
    const int32_t *replays; /* [B]: draft tokens accepted since, by which states advance first; NULL: there are none */
    int first_drafting, end_drafting;
    int max_drafts; /* of a sequence */
};

/* Causal convolution of channels of the rows of a step, in place, and SiLU. */
struct convolution {
    struct sequences sequences;
    const struct matrix *weight; /* [channels, width], W32 */
    float *x;                    /* [T, x_stride], from the first of the channels */
    float *replayed;             /* [B, max_drafts, x_stride], likewise: results of the replayed tokens */
    size_t x_stride;
    uint8_t *inputs; /* of slot 0: last inputs, then drafts', [blocks of 16 channels, width - 1 + max_drafts, 16] */
    size_t slot_bytes;
};

/* Heads of a gated delta net: value head h has key head h / (H / K), or if tiled h % K. */
struct delta_heads {
    int num_keys, num_values, key_dim, value_dim, is_tiled;
};

/* Gated delta rule over a step, and the gated norm behind it. */
struct delta {
    struct sequences sequences;
    struct delta_heads heads;
    float *x;        /* [T, x_stride]: heads of q, then of k, v and z, strengths and decays from their columns */
    float *replayed; /* [B, max_drafts, x_stride]: rows of the replayed tokens, without gates */
    size_t x_stride;
    int key_column, value_column, z_column, strength_column, decay_column;
    const float *decay, *bias; /* [H] */
    const float *head_norm;    /* [value_dim padded to 16] */
    float eps;
    uint8_t *states; /* of slot 0: delta_state_floats */
    uint8_t *gates;  /* of slot 0: strengths and decays of drafts, [max_drafts, 2, H] */
    size_t slot_bytes;
    float *out; /* [T, out_stride]: heads of value_dim */
    size_t out_stride;
};

/* Floats of a state of all heads: [H, value_dim / 16, key_dim, 16], dims padded to 16. */
static inline size_t delta_state_floats(const struct delta_heads *heads) {
    return (size_t)heads->num_values * (size_t)round_up(heads->key_dim, 16) * (size_t)round_up(heads->value_dim, 16);
}

static inline size_t delta_scratch_floats(const struct delta_heads *heads) {
    size_t keys = (size_t)round_up(heads->key_dim, 16), values = (size_t)round_up(heads->value_dim, 16);
    return CHUNK_TOKENS * (3 * keys + values + 4 * CHUNK_TOKENS + 16 + 4) + keys * values;
}

/* Sampling parameters of a row of logits. */
struct draw {
    float cap;         /* of logits; 0: none */
    float temperature; /* 0: the likeliest */
    float min_p;       /* 0: off */
    double top_p;      /* 1: off */
    int32_t top_k;     /* 0: off */
    double uniform;    /* in [0, 1) */
};

struct kernels {
    const char *name;
    /* Rows of blocks [first, end) of w for all of x. */
    void (*matmul)(const struct matmul *task, int first_block, int end_block);
    /* x[n] / rms(x) * weight, into out; n_padded is n rounded up to 16, the padding is zero and stays so. */
    void (*rms_norm)(const float *x, const float *weight, float eps, int n, int n_padded, float *out);
    /* x[n] in the form that a matrix of `format` multiplies; out holds activation_bytes(format, n). */
    void (*quantize)(int format, const float *x, int n, uint8_t *out);
    void (*write_kv)(const struct attention *a, int row, int kv_head, int page, int offset);
    /* scratch holds attention_scratch_floats(head_dim). */
    void (*attend)(const struct attention *a, const struct attention_task *task, float *scratch);
    /* Merge a row's partial results: out[H head_dim]. */
    void (*merge_parts)(const struct attention *a, int row, int num_parts, float *out);
    /* Blocks [first, end) of 16 channels of a convolution. */
    void (*convolve)(const struct convolution *task, int first_block, int end_block);
    /* Rows of a sequence, of all value heads of a key head. scratch holds delta_scratch_floats. */
    void (*delta)(const struct delta *task, int sequence, int key_head, float *scratch);
    /* Sample a token from logits[n], in a row of whole registers, which is overwritten; -1 if not finite. scratch[n]. */
    int32_t (*draw)(float *logits, int n, const struct draw *draw, float *scratch);
};

static inline size_t attention_scratch_floats(int head_dim) {
    return (size_t)MAX_TASK_QUERIES * (size_t)(3 * round_up(head_dim, 16) + SCORE_TOKENS);
}

/* The table in use: the best that this processor can run, or the one that the setting cpu_level names. */
const struct kernels *find_kernels(const char *name); /* NULL: unknown, or this processor cannot run it */
const struct kernels *best_kernels(void);
const struct kernels *kernels_at(int index); /* tables for this processor, best first; NULL beyond */

#endif
