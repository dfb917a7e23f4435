/* Gated delta rule (arXiv:2412.06464) with the convolution before it and the norm behind it.
 *
 * Of a token with q and k of length 1, q times Dk^-0.5, strength b and log decay g <= 0, and a head's state S [Dk, Dv]:
 *
 *     S <- e^g S;  S <- S + k (b (v - S^T k))^T;  o = S^T q
 *
 * Prompts are computed in chunks of C tokens, with G the running sum of g, and for j <= i D_ij = e^(G_i - G_j):
 *
 *     (I + A) V' = b (V - e^G K S),  A_ij = b_i (k_i . k_j) D_ij for j < i
 *     O = e^G Q S + (Q K^T * D) V';  S <- e^(G_C) S + K^T (e^(G_C - G) V')
 *
 * V' is found by forward substitution, as powers of A overflow where keys are alike; e^x is taken of differences, which are
 * never positive where they are used. A chunk of one token is a token, so that states agree to the bit however a prompt is
 * cut at multiples of C. A sequence with draft tokens is computed token by token; the state that is kept is the one behind
 * its first token, and with n drafts accepted the next step advances it by these first.
 *
 * The columns of S are independent: it is stored as [Dv / 16][Dk][16], both padded to 16, and each block of 16 columns
 * goes through the whole rule while it is in the first-level cache.
 * Reference: causal_convolution, gated_delta and gated_norm of neuron.triton_kernels.
 */
#include "kernels.h"
#include "simd.h"

#include <math.h>

/* Rows of a tile of sums. */
enum { RULE_ROWS = TILE_ROWS >= 4 ? TILE_ROWS : 4, KEY_SUMS = 4 };

INLINE vf silu(vf x) { return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x)))); }

/* ---------------------------------------------------------------- convolution */

/* The result of a token, and the window behind it, for a width that is a constant where this is inlined. */
INLINE vf convolve_next(const int width, const vf *weight, vf *window, vf input) {
    vf sum = vf_mul(weight[width - 1], input);
    UNROLL for (int j = 0; j < width - 1; j++) sum = vf_fma(weight[j], window[j], sum);
    UNROLL for (int j = 1; j < width - 1; j++) window[j - 1] = window[j];
    window[width - 2] = input;
    return silu(sum);
}

INLINE void convolve_blocks(const int width, const struct convolution *c, int first_block, int end_block) {
    const struct sequences *s = &c->sequences;
    const float *weights = (const float *)(const void *)c->weight->data;
    for (int block = first_block; block < end_block; block++) {
        vf weight[MAX_CONVOLUTION], window[MAX_CONVOLUTION - 1];
        UNROLL for (int j = 0; j < width; j++) weight[j] = vf_load(weights + 16 * (block * width + j));
        for (int b = 0; b < s->count; b++) {
            size_t at = (size_t)s->slots[b] * c->slot_bytes + 64 * (size_t)(block * (width - 1 + s->max_drafts));
            float *inputs = (float *)(void *)(c->inputs + at), *drafts = inputs + 16 * (width - 1);
            int first = s->cu_seqlens[b], replays = s->replays != NULL ? s->replays[b] : 0;
            int is_drafting = b >= s->first_drafting && b < s->end_drafting;
            UNROLL for (int j = 0; j < width - 1; j++) window[j] = vf_load(inputs + 16 * j);
            for (int i = 0; i < replays; i++) {
                float *y = c->replayed + (size_t)(b * s->max_drafts + i) * c->x_stride + 16 * block;
                vf_store(y, convolve_next(width, weight, window, vf_load(drafts + 16 * i)));
            }
            for (int row = first; row < s->cu_seqlens[b + 1]; row++) {
                float *x = c->x + (size_t)row * c->x_stride + 16 * block;
                vf input = vf_load(x);
                vf_store(x, convolve_next(width, weight, window, input));
                if (is_drafting && row > first) {
                    vf_store(drafts + 16 * (row - first - 1), input);
                } else if (is_drafting || row + 1 == s->cu_seqlens[b + 1]) {
                    UNROLL for (int j = 0; j < width - 1; j++) vf_store(inputs + 16 * j, window[j]);
                }
            }
        }
    }
}

void LEVEL(convolve)(const struct convolution *c, int first_block, int end_block) {
    switch (c->weight->columns) { /* up to MAX_CONVOLUTION */
    case 2: convolve_blocks(2, c, first_block, end_block); break;
    case 3: convolve_blocks(3, c, first_block, end_block); break;
    case 4: convolve_blocks(4, c, first_block, end_block); break;
    default: break;
    }
}

/* ---------------------------------------------------------------- rule */

/* The first `count` of 16 numbers, and zeros. */
INLINE vf load_part(const float *from, int count) {
    float lanes[16] = {0};
    if (count >= 16) return vf_load(from);
    memcpy(lanes, from, (size_t)count * 4);
    return vf_load(lanes);
}

INLINE void store_part(float *to, vf x, int count) {
    float lanes[16];
    if (count >= 16) {
        vf_store(to, x);
        return;
    }
    vf_store(lanes, x);
    memcpy(to, lanes, (size_t)count * 4);
}

/* Key or query of length `length`, padded with zeros. */
static void normalise(const float *x, int dim, float length, float *out) {
    vf squares = vf_zero();
    for (int i = 0; i < dim; i += 16) {
        vf part = load_part(x + i, dim - i);
        squares = vf_fma(part, part, squares);
        vf_store(out + i, part);
    }
    vf factor = vf_set1(length / sqrtf(vf_sum(squares) + 1e-6f));
    for (int i = 0; i < dim; i += 16) vf_store(out + i, vf_mul(vf_load(out + i), factor));
}

struct gates {
    float log_decay, strength;
};

static struct gates gates_of(const struct delta *d, const float *row, int head) {
    float x = row[d->decay_column + head] + d->bias[head];
    float softplus = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
    /* fmaxf gives 0 for NaN, which must stay one. */
    return (struct gates){d->decay[head] * (x == x ? softplus : x), 1.0f / (1.0f + expf(-row[d->strength_column + head]))};
}

/* A head's output of one row, normalised and gated. */
static void finish_row(const struct delta *d, const float *row, int row_number, int head, const float *out) {
    int dim = d->heads.value_dim;
    float *to = d->out + (size_t)row_number * d->out_stride + head * dim;
    const float *z = row + d->z_column + head * dim;
    vf squares = vf_zero();
    for (int i = 0; i < dim; i += 16) squares = vf_fma(vf_load(out + i), vf_load(out + i), squares);
    vf factor = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)dim + d->eps));
    for (int i = 0; i < dim; i += 16) {
        vf normed = vf_mul(vf_mul(vf_load(out + i), factor), vf_load(d->head_norm + i));
        store_part(to + i, vf_mul(normed, silu(load_part(z + i, dim - i))), dim - i);
    }
}

/* One token of a head: state and out are updated and written block by block. */
static void run_token(const struct delta *d, const float *q, const float *k, struct gates gates, const float *v, float *state, float *out) {
    int keys = round_up(d->heads.key_dim, 16), dim = d->heads.value_dim;
    vf decay = vf_set1(expf(gates.log_decay)), strength = vf_set1(gates.strength);
    for (int column = 0; column < dim; column += 16, state += 16 * keys) {
        vf read[KEY_SUMS], sums[KEY_SUMS];
        UNROLL for (int i = 0; i < KEY_SUMS; i++) read[i] = sums[i] = vf_zero();
        for (int i = 0; i < keys; i += KEY_SUMS) {
            /* The next block: the processor's own prefetch stops at a page. */
            __builtin_prefetch(state + 16 * (keys + i), 1);
            __builtin_prefetch(state + 16 * (keys + i + 1), 1);
            __builtin_prefetch(state + 16 * (keys + i + 2), 1);
            __builtin_prefetch(state + 16 * (keys + i + 3), 1);
            UNROLL for (int j = 0; j < KEY_SUMS; j++)
                read[j] = vf_fma(vf_set1(k[i + j]), vf_load(state + 16 * (i + j)), read[j]);
        }
        vf known = vf_mul(decay, vf_add(vf_add(read[0], read[1]), vf_add(read[2], read[3])));
        vf error = vf_mul(strength, vf_sub(load_part(v + column, dim - column), known));
        for (int i = 0; i < keys; i += KEY_SUMS)
            UNROLL for (int j = 0; j < KEY_SUMS; j++) {
                vf now = vf_fma(vf_set1(k[i + j]), error, vf_mul(decay, vf_load(state + 16 * (i + j))));
                vf_store(state + 16 * (i + j), now);
                sums[j] = vf_fma(vf_set1(q[i + j]), now, sums[j]);
            }
        vf_store(out + column, vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])));
    }
}

/* sums[r] += a[r][0..count) . b[0..count)[16], with strides in floats. */
INLINE void add_products(const float *a, int a_stride, int count, const float *b, int b_stride, vf *sums) {
    for (int i = 0; i < count; i++) {
        vf x = vf_load(b + i * b_stride);
        UNROLL for (int r = 0; r < RULE_ROWS; r++) sums[r] = vf_fma(vf_set1(a[r * a_stride + i]), x, sums[r]);
    }
}

/* Products of RULE_ROWS rows of a with all columns of b up to the last row's own: those behind it are not read. */
static void lower_products(const float *a, const float *transposed, int keys, int first, float *out) {
    for (int column = 0; column < first + RULE_ROWS; column += 16) {
        vf sums[RULE_ROWS];
        UNROLL for (int r = 0; r < RULE_ROWS; r++) sums[r] = vf_zero();
        add_products(a + first * keys, keys, keys, transposed + column, CHUNK_TOKENS, sums);
        UNROLL for (int r = 0; r < RULE_ROWS; r++) vf_store(out + (first + r) * CHUNK_TOKENS + column, sums[r]);
    }
}

/* Arrays of a chunk of N tokens, N padded to whole tiles; rows of padding are zeros. */
struct chunk {
    float *q, *k;       /* [N, Dk] */
    float *transposed;  /* [Dk, C]: of k */
    float *kk, *qk;     /* [N, C]: k_i . k_j and q_i . k_j */
    float *a, *scores;  /* [N, C]: these times decays, and strengths */
    float *values;      /* [N, 16]: V' of a block of columns */
    float *out;         /* [N, Dv] */
    float *sums, *grown, *left, *strength; /* [N]: G, e^G, e^(G_C - G), b */
    float *copy;        /* [Dk, Dv]: a state that draft tokens advance */
};

static struct chunk chunk_of(const struct delta_heads *heads, float *scratch) {
    int keys = round_up(heads->key_dim, 16), square = CHUNK_TOKENS * CHUNK_TOKENS;
    struct chunk c = {.q = scratch};
    c.k = c.q + CHUNK_TOKENS * keys;
    c.transposed = c.k + CHUNK_TOKENS * keys;
    c.kk = c.transposed + CHUNK_TOKENS * keys;
    c.qk = c.kk + square;
    c.a = c.qk + square;
    c.scores = c.a + square;
    c.values = c.scores + square;
    c.sums = c.values + CHUNK_TOKENS * 16;
    c.grown = c.sums + CHUNK_TOKENS;
    c.left = c.grown + CHUNK_TOKENS;
    c.strength = c.left + CHUNK_TOKENS;
    c.out = c.strength + CHUNK_TOKENS;
    c.copy = c.out + CHUNK_TOKENS * round_up(heads->value_dim, 16);
    return c;
}

/* What depends on the key head alone. */
static void load_keys(const struct delta *d, int key_head, const float *x, int count, const struct chunk *c) {
    int dim = d->heads.key_dim, keys = round_up(dim, 16), padded = round_up(count, RULE_ROWS);
    for (int t = 0; t < padded; t++) {
        float *q = c->q + t * keys, *k = c->k + t * keys;
        const float *row = x + (size_t)t * d->x_stride + key_head * dim;
        if (t < count) {
            normalise(row, dim, 1.0f / sqrtf((float)dim), q);
            normalise(row + d->key_column, dim, 1.0f, k);
        } else {
            memset(q, 0, (size_t)keys * 4);
            memset(k, 0, (size_t)keys * 4);
        }
        for (int i = 0; i < keys; i++) c->transposed[i * CHUNK_TOKENS + t] = k[i];
    }
    for (int t = padded; t < round_up(padded, 16); t++)
        for (int i = 0; i < keys; i++) c->transposed[i * CHUNK_TOKENS + t] = 0;
    for (int t = 0; t < padded; t += RULE_ROWS) {
        lower_products(c->k, c->transposed, keys, t, c->kk);
        lower_products(c->q, c->transposed, keys, t, c->qk);
    }
}

/* Decays and strengths of a value head, and the matrices that they make of the products. */
static void load_gates(const struct delta *d, int head, const float *x, int count, const struct chunk *c) {
    int padded = round_up(count, RULE_ROWS);
    float sum = 0;
    for (int t = 0; t < padded; t++) {
        struct gates gates = {0, 0};
        if (t < count) gates = gates_of(d, x + (size_t)t * d->x_stride, head);
        sum += gates.log_decay;
        c->sums[t] = sum;
        c->grown[t] = expf(sum);
        c->strength[t] = gates.strength;
    }
    for (int t = 0; t < padded; t++) c->left[t] = expf(sum - c->sums[t]);
    for (int t = padded; t < round_up(padded, 16); t++) c->sums[t] = sum;
    for (int i = 0; i < padded; i++) {
        float *a = c->a + i * CHUNK_TOKENS, *scores = c->scores + i * CHUNK_TOKENS;
        int tile_end = (i / RULE_ROWS + 1) * RULE_ROWS;
        for (int j = 0; j < tile_end; j += 16) {
            /* Not above 0, as behind the diagonal: there it is not used. */
            vf difference = vf_sub(vf_set1(c->sums[i]), vf_load(c->sums + j));
            vf decay = vf_exp(vf_min(vf_zero(), difference));
            vf_store(a + j, vf_mul(vf_mul(vf_set1(c->strength[i]), decay), vf_load(c->kk + i * CHUNK_TOKENS + j)));
            vf_store(scores + j, vf_mul(decay, vf_load(c->qk + i * CHUNK_TOKENS + j)));
        }
        for (int j = i + 1; j < tile_end; j++) scores[j] = 0;
    }
}

/* V' of a tile of rows: what the earlier rows leave, then row by row. */
static void substitute(const struct delta *d, const float *v, int first, int count, int width, const float *state, const struct chunk *c) {
    int keys = round_up(d->heads.key_dim, 16);
    vf known[RULE_ROWS], before[RULE_ROWS];
    UNROLL for (int r = 0; r < RULE_ROWS; r++) known[r] = before[r] = vf_zero();
    add_products(c->k + first * keys, keys, keys, state, 16, known);
    add_products(c->a + first * CHUNK_TOKENS, CHUNK_TOKENS, first, c->values, 16, before);
    UNROLL for (int r = 0; r < RULE_ROWS; r++) {
        int t = first + r;
        vf value = t < count ? load_part(v + (size_t)t * d->x_stride, width) : vf_zero();
        vf error = vf_sub(value, vf_mul(vf_set1(c->grown[t]), known[r]));
        known[r] = vf_sub(vf_mul(vf_set1(c->strength[t]), error), before[r]);
        UNROLL for (int s = 0; s < r; s++)
            known[r] = vf_sub(known[r], vf_mul(vf_set1(c->a[t * CHUNK_TOKENS + first + s]), known[s]));
        vf_store(c->values + 16 * t, known[r]);
    }
}

/* A chunk of a value head, whose keys and gates are loaded. */
static void run_head(const struct delta *d, const float *v, int count, float *state, const struct chunk *c) {
    int keys = round_up(d->heads.key_dim, 16), dim = d->heads.value_dim, stride = round_up(dim, 16);
    int padded = round_up(count, RULE_ROWS);
    vf whole = vf_set1(c->grown[padded - 1]);
    for (int column = 0; column < dim; column += 16, state += 16 * keys) {
        for (int t = 0; t < padded; t += RULE_ROWS) substitute(d, v + column, t, count, dim - column, state, c);
        for (int t = 0; t < padded; t += RULE_ROWS) {
            vf sums[RULE_ROWS];
            UNROLL for (int r = 0; r < RULE_ROWS; r++) sums[r] = vf_zero();
            add_products(c->q + t * keys, keys, keys, state, 16, sums);
            UNROLL for (int r = 0; r < RULE_ROWS; r++) sums[r] = vf_mul(vf_set1(c->grown[t + r]), sums[r]);
            add_products(c->scores + t * CHUNK_TOKENS, CHUNK_TOKENS, t + RULE_ROWS, c->values, 16, sums);
            UNROLL for (int r = 0; r < RULE_ROWS; r++) vf_store(c->out + (t + r) * stride + column, sums[r]);
        }
        for (int t = 0; t < padded; t++)
            vf_store(c->values + 16 * t, vf_mul(vf_set1(c->left[t]), vf_load(c->values + 16 * t)));
        for (int i = 0; i < keys; i += RULE_ROWS) {
            vf sums[RULE_ROWS];
            UNROLL for (int r = 0; r < RULE_ROWS; r++) sums[r] = vf_mul(whole, vf_load(state + 16 * (i + r)));
            add_products(c->transposed + i * CHUNK_TOKENS, CHUNK_TOKENS, padded, c->values, 16, sums);
            UNROLL for (int r = 0; r < RULE_ROWS; r++) vf_store(state + 16 * (i + r), sums[r]);
        }
    }
}

static int value_head(const struct delta_heads *heads, int key_head, int index) {
    if (heads->is_tiled) return key_head + index * heads->num_keys;
    return key_head * (heads->num_values / heads->num_keys) + index;
}

/* Rows of a sequence token by token; those from `kept` on advance a copy of the state. first_row < 0: without outputs. */
static void run_tokens(const struct delta *d, int key_head, const float *x, int count, int kept, float *state, int first_row, const struct chunk *c) {
    const struct delta_heads *heads = &d->heads;
    int dim = heads->key_dim, keys = round_up(dim, 16);
    size_t head_floats = delta_state_floats(heads) / (size_t)heads->num_values;
    for (int t = 0; t < count; t++) {
        const float *row = x + (size_t)t * d->x_stride + key_head * dim;
        normalise(row, dim, 1.0f / sqrtf((float)dim), c->q + t * keys);
        normalise(row + d->key_column, dim, 1.0f, c->k + t * keys);
    }
    for (int i = 0; i < heads->num_values / heads->num_keys; i++) {
        int head = value_head(heads, key_head, i);
        float *own = state + (size_t)head * head_floats;
        for (int t = 0; t < count; t++) {
            const float *row = x + (size_t)t * d->x_stride, *v = row + d->value_column + head * heads->value_dim;
            if (t == kept) own = memcpy(c->copy, own, head_floats * sizeof *own);
            run_token(d, c->q + t * keys, c->k + t * keys, gates_of(d, row, head), v, own, c->out);
            if (first_row >= 0) finish_row(d, row, first_row + t, head, c->out);
        }
    }
}

/* Rows of a sequence in a chunk. */
static void run_chunk(const struct delta *d, int key_head, const float *x, int count, float *state, int first_row, const struct chunk *c) {
    const struct delta_heads *heads = &d->heads;
    int stride = round_up(heads->value_dim, 16);
    size_t head_floats = delta_state_floats(heads) / (size_t)heads->num_values;
    load_keys(d, key_head, x, count, c);
    for (int i = 0; i < heads->num_values / heads->num_keys; i++) {
        int head = value_head(heads, key_head, i);
        load_gates(d, head, x, count, c);
        run_head(d, x + d->value_column + head * heads->value_dim, count, state + (size_t)head * head_floats, c);
        for (int t = 0; t < count; t++)
            finish_row(d, x + (size_t)t * d->x_stride, first_row + t, head, c->out + t * stride);
    }
}

/* Copy the gates of draft tokens, of the value heads of a key head, from rows to the slot or back. */
static void copy_gates(const struct delta *d, int key_head, float *rows, float *kept, int count, int is_replayed) {
    const struct delta_heads *heads = &d->heads;
    for (int t = 0; t < count; t++)
        for (int i = 0; i < heads->num_values / heads->num_keys; i++) {
            int head = value_head(heads, key_head, i);
            float *row = rows + (size_t)t * d->x_stride, *own = kept + 2 * t * heads->num_values + head;
            float *strength = row + d->strength_column + head, *decay = row + d->decay_column + head;
            if (is_replayed) {
                *strength = own[0];
                *decay = own[heads->num_values];
            } else {
                own[0] = *strength;
                own[heads->num_values] = *decay;
            }
        }
}

void LEVEL(delta)(const struct delta *d, int sequence, int key_head, float *scratch) {
    const struct sequences *s = &d->sequences;
    struct chunk c = chunk_of(&d->heads, scratch);
    size_t at = (size_t)s->slots[sequence] * d->slot_bytes;
    float *state = (float *)(void *)(d->states + at), *gates = (float *)(void *)(d->gates + at);
    int first = s->cu_seqlens[sequence], end = s->cu_seqlens[sequence + 1];
    int replays = s->replays != NULL ? s->replays[sequence] : 0;
    if (replays > 0) {
        float *rows = d->replayed + (size_t)(sequence * s->max_drafts) * d->x_stride;
        copy_gates(d, key_head, rows, gates, replays, 1);
        run_tokens(d, key_head, rows, replays, replays, state, -1, &c);
    }
    if (sequence >= s->first_drafting && sequence < s->end_drafting) {
        float *rows = d->x + (size_t)first * d->x_stride;
        run_tokens(d, key_head, rows, end - first, 1, state, first, &c);
        copy_gates(d, key_head, rows + d->x_stride, gates, end - first - 1, 0);
        return;
    }
    for (int count; first < end; first += count) {
        const float *rows = d->x + (size_t)first * d->x_stride;
        count = end - first < CHUNK_TOKENS ? end - first : CHUNK_TOKENS;
        if (count == 1)
            run_tokens(d, key_head, rows, 1, 1, state, first, &c);
        else
            run_chunk(d, key_head, rows, count, state, first, &c);
    }
}
