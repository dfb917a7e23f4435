/* Causal attention of query rows over a paged cache, with the rotary embedding and the write to the cache.
 *
 *     out[t, h] = softmax(scale q[t, h] . k[0..p(t)]) v[0..p(t)]          k, v of kv head h / (H / K)
 *
 * A gated head's output is multiplied by the sigmoid of its gates.
 *
 * A page of one kv head holds 16 tokens: keys as [D / 2][16 tokens][2] bfloat16 (or [D][16] float32), so that a register
 * of scores is 16 tokens and needs no horizontal sum; values as [16 tokens][D padded to 16]. In int8 keys are [D][16 tokens],
 * and each token's key and value has a scale, its largest element over 127, behind its page: a score is multiplied
 * with the key's, a weight with the value's.
 *
 * A task reads its pages once for all its queries (the heads that share a kv head, times a few rows of a prompt), in blocks
 * of SCORE_TOKENS: scores, online softmax (arXiv:1805.02867), weighted values with the sums in registers, in float32.
 *
 * A row's result depends on the row alone, to the bit: not on the other rows of the step, on how a prompt was cut, or on
 * the cached part. Its context is cut into segments whose positions and length follow from its own position
 * (segment_tokens), each is summed in blocks at fixed positions, and the sums are merged in the order of the segments,
 * whichever tasks computed them.
 * Reference: paged_attention and rope_and_cache of neuron.triton_kernels.reference.
 */
#include "kernels.h"
#include "simd.h"

#include <math.h>

/* Prefetch distance of keys ahead of their scores. */
enum { FETCH_TOKENS = 4 * PAGE_TOKENS };

/* Normalise one head where the model does, and rotate its halves (i, i + D / 2), as arXiv:2104.09864 in pairs. */
static void rotate(const struct attention *a, const float *x, int head, int row, float scale, float *out) {
    int dim = a->head_dim, half = dim / 2;
    const float *cosine = a->cosine + (size_t)row * (size_t)half, *sine = a->sine + (size_t)row * (size_t)half;
    float normed[dim];
    if (a->qk_norm != NULL) {
        const float *weight = a->qk_norm + (size_t)head * (size_t)dim;
        float sum = 0;
        for (int i = 0; i < dim; i++) sum += x[i] * x[i];
        float factor = 1.0f / sqrtf(sum / (float)dim + a->eps);
        for (int i = 0; i < dim; i++) normed[i] = x[i] * factor * weight[i];
        x = normed;
    }
    for (int i = 0; i < half; i++) {
        out[i] = (x[i] * cosine[i] - x[i + half] * sine[i]) * scale;
        out[i + half] = (x[i + half] * cosine[i] + x[i] * sine[i]) * scale;
    }
}

/* Round x[n] to int8, `stride` apart; returns the scale, NaN if an element is not finite. */
static float round_to_int8(const float *x, int n, int stride, uint8_t *to) {
    float largest = 0, odd = 0;
    for (int i = 0; i < n; i++) {
        largest = fmaxf(largest, fabsf(x[i]));
        odd += x[i] * 0.0f;
    }
    /* Below this the inverse would be infinite: taken as zero. */
    float inverse = largest > 1e-30f && odd == 0 ? 127.0f / largest : 0.0f;
    for (int i = 0; i < n; i++) to[i * stride] = (uint8_t)(int8_t)(odd == 0 ? lrintf(x[i] * inverse) : 0);
    return largest / 127.0f + odd;
}

void LEVEL(write_kv)(const struct attention *a, int row, int kv_head, int page, int offset) {
    int dim = a->head_dim;
    const float *from = a->qkv + (size_t)row * a->qkv_stride;
    const float *value = from + a->value_column + kv_head * dim;
    uint8_t *keys = a->keys + (size_t)page * a->page_stride + (size_t)kv_head * a->head_stride;
    uint8_t *values = a->values + (size_t)page * a->page_stride + (size_t)kv_head * a->head_stride;
    float key[dim];
    rotate(a, from + a->key_column + kv_head * dim, a->num_heads + kv_head, row, 1.0f, key);
    if (a->kv_form == KV_INT8) {
        size_t scales = (size_t)PAGE_TOKENS * (size_t)round_up(dim, 16) + 4 * (size_t)offset;
        float key_scale = round_to_int8(key, dim, PAGE_TOKENS, keys + offset);
        float value_scale = round_to_int8(value, dim, 1, values + offset * round_up(dim, 16));
        memcpy(keys + scales, &key_scale, 4);
        memcpy(values + scales, &value_scale, 4);
        return;
    }
    if (a->kv_form == KV_FLOAT32) {
        for (int i = 0; i < dim; i++) memcpy(keys + 4 * (16 * i + offset), &key[i], 4);
        memcpy(values + 4 * offset * round_up(dim, 16), value, (size_t)dim * 4);
        return;
    }
    uint8_t *to = values + 2 * offset * round_up(dim, 16);
    for (int i = 0; i < dim; i += 2) {
        uint16_t pair[2] = {float_to_bf16(key[i]), float_to_bf16(key[i + 1])};
        uint16_t two[2] = {float_to_bf16(value[i]), float_to_bf16(value[i + 1])};
        memcpy(keys + 4 * (16 * (i / 2) + offset), pair, 4);
        memcpy(to + 2 * i, two, 4);
    }
}

/* Prefetch one kv head's keys or values of a page: the next page lies elsewhere, beyond hardware prefetching. */
INLINE void prefetch_page(const struct attention *a, const uint8_t *base, int page) {
    const uint8_t *from = base + (size_t)page * a->page_stride;
    for (size_t i = 0; i < a->head_stride; i += 64) __builtin_prefetch(from + i);
}

/* Scores of num_queries (a constant where this is inlined) with the 16 tokens of a page. */
INLINE void page_scores(const int num_queries, const enum kv_form form, const float *q, int stride, int dim,
                        const uint8_t *keys, float *scores) {
    vf acc[SCORE_ROWS], second[SCORE_ROWS];
    /* Two sums, where there are registers for them: one alone is bound by the latency of its additions if the queries
     * are few. Also for many, or a query's score would depend on their number. */
    const int is_split = IS_SPLIT;
    UNROLL for (int r = 0; r < num_queries; r++) acc[r] = second[r] = vf_zero();
    if (form == KV_INT8) {
        for (int i = 0; i + 1 < dim; i += 2) {
            vf even = vf_load_s8((const int8_t *)keys + 16 * i), odd = vf_load_s8((const int8_t *)keys + 16 * (i + 1));
            UNROLL for (int r = 0; r < num_queries; r++) {
                acc[r] = vf_fma(even, vf_set1(q[r * stride + i]), acc[r]);
                vf *other = is_split ? &second[r] : &acc[r];
                *other = vf_fma(odd, vf_set1(q[r * stride + i + 1]), *other);
            }
        }
        float scales[16];
        memcpy(scales, keys + 16 * round_up(dim, 16), sizeof scales);
        vf scale = vf_load(scales);
        UNROLL for (int r = 0; r < num_queries; r++) {
            acc[r] = vf_mul(acc[r], scale);
            second[r] = vf_mul(second[r], scale);
        }
    } else if (form == KV_FLOAT32) {
        for (int i = 0; i < dim; i++) {
            float lanes[16];
            memcpy(lanes, keys + 64 * i, sizeof lanes);
            vf k = vf_load(lanes);
            UNROLL for (int r = 0; r < num_queries; r++) acc[r] = vf_fma(k, vf_set1(q[r * stride + i]), acc[r]);
        }
    } else {
        for (int i = 0; i < dim; i += 2) {
            vf even, odd;
            uint16_t pairs[32];
            memcpy(pairs, keys + 32 * i, sizeof pairs);
            vf_load_pairs(pairs, &even, &odd);
            UNROLL for (int r = 0; r < num_queries; r++) {
                acc[r] = vf_fma(even, vf_set1(q[r * stride + i]), acc[r]);
                vf *other = is_split ? &second[r] : &acc[r];
                *other = vf_fma(odd, vf_set1(q[r * stride + i + 1]), *other);
            }
        }
    }
    UNROLL for (int r = 0; r < num_queries; r++)
        vf_store(scores + r * SCORE_TOKENS, is_split ? vf_add(acc[r], second[r]) : acc[r]);
}

/* out[r] += weights[r] values for num_queries and num_vectors registers of the head (constants where inlined). */
INLINE void weigh(const int num_queries, const int num_vectors, const enum kv_form form, const struct attention *a,
                  const int32_t *pages, const uint8_t *base, int column, int tokens, const float *weights, float *out) {
    int padded = round_up(a->head_dim, 16);
    size_t size = form == KV_INT8 ? 1 : form == KV_FLOAT32 ? 4 : 2;
    vf acc[VALUE_ROWS][VALUE_VECTORS];
    UNROLL for (int r = 0; r < num_queries; r++)
        UNROLL for (int i = 0; i < num_vectors; i++) acc[r][i] = vf_load(out + r * padded + 16 * i);
    for (int token = 0; token < tokens; token++) {
        const uint8_t *page = base + (size_t)pages[token / PAGE_TOKENS] * a->page_stride;
        const uint8_t *from = page + size * (size_t)(token % PAGE_TOKENS * padded + column);
        float scale = 1.0f;
        if (form == KV_INT8) memcpy(&scale, page + PAGE_TOKENS * padded + 4 * (token % PAGE_TOKENS), 4);
        vf value[VALUE_VECTORS];
        UNROLL for (int i = 0; i < num_vectors; i++) {
            if (form == KV_INT8) {
                value[i] = vf_load_s8((const int8_t *)from + 16 * i);
            } else if (form == KV_FLOAT32) {
                float lanes[16];
                memcpy(lanes, from + 64 * i, sizeof lanes);
                value[i] = vf_load(lanes);
            } else {
                uint16_t lanes[16];
                memcpy(lanes, from + 32 * i, sizeof lanes);
                value[i] = vf_load_bf16(lanes);
            }
        }
        UNROLL for (int r = 0; r < num_queries; r++) {
            float own = weights[r * SCORE_TOKENS + token];
            vf weight = vf_set1(form == KV_INT8 ? own * scale : own);
            UNROLL for (int i = 0; i < num_vectors; i++) acc[r][i] = vf_fma(weight, value[i], acc[r][i]);
        }
    }
    UNROLL for (int r = 0; r < num_queries; r++)
        UNROLL for (int i = 0; i < num_vectors; i++) vf_store(out + r * padded + 16 * i, acc[r][i]);
}

/* `tokens` of the `left` ones that follow; their values are fetched too, which are wanted next. */
INLINE void score_block(const enum kv_form form, const struct attention *a, const int32_t *pages, const uint8_t *base,
                        const uint8_t *values, int tokens, int left, const float *q, int num_queries, float *scores) {
    int padded = round_up(a->head_dim, 16);
    for (int token = 0; token < tokens; token += PAGE_TOKENS) {
        const uint8_t *keys = base + (size_t)pages[token / PAGE_TOKENS] * a->page_stride;
        prefetch_page(a, values, pages[token / PAGE_TOKENS]);
        if (token + FETCH_TOKENS < left) prefetch_page(a, base, pages[(token + FETCH_TOKENS) / PAGE_TOKENS]);
        int r = 0;
        for (; r + SCORE_ROWS <= num_queries; r += SCORE_ROWS)
            page_scores(SCORE_ROWS, form, q + r * padded, padded, a->head_dim, keys,
                        scores + r * SCORE_TOKENS + token);
        for (; r + 3 <= num_queries && SCORE_ROWS >= 3; r += 3)
            page_scores(3, form, q + r * padded, padded, a->head_dim, keys, scores + r * SCORE_TOKENS + token);
        for (; r < num_queries; r++)
            page_scores(1, form, q + r * padded, padded, a->head_dim, keys, scores + r * SCORE_TOKENS + token);
    }
}

INLINE void weigh_block(const enum kv_form form, const struct attention *a, const int32_t *pages, const uint8_t *base,
                        int tokens, const float *weights, int num_queries, float *out) {
    int padded = round_up(a->head_dim, 16), i = 0;
    for (; i + 16 * VALUE_VECTORS <= padded; i += 16 * VALUE_VECTORS) {
        int r = 0;
        for (; r + VALUE_ROWS <= num_queries; r += VALUE_ROWS)
            weigh(VALUE_ROWS, VALUE_VECTORS, form, a, pages, base, i, tokens, weights + r * SCORE_TOKENS,
                  out + r * padded + i);
        for (; r + 3 <= num_queries && VALUE_ROWS >= 3; r += 3)
            weigh(3, VALUE_VECTORS, form, a, pages, base, i, tokens, weights + r * SCORE_TOKENS,
                  out + r * padded + i);
        for (; r < num_queries; r++)
            weigh(1, VALUE_VECTORS, form, a, pages, base, i, tokens, weights + r * SCORE_TOKENS,
                  out + r * padded + i);
    }
    for (; i < padded; i += 16)
        for (int r = 0; r < num_queries; r++)
            weigh(1, 1, form, a, pages, base, i, tokens, weights + r * SCORE_TOKENS, out + r * padded + i);
}

/* A row's result over a part of its context: weighted values, the largest score, the sum of weights. */
struct partial {
    float *values;
    float *largest, *total;
};

/* Merge the result over a segment into the one before it. A segment without attended tokens changes nothing. */
INLINE void join(const struct partial *to, const struct partial *part, int padded) {
    if (*part->total == 0 && *part->largest == -INFINITY) return;
    if (*to->total == 0 && *to->largest == -INFINITY) {
        memcpy(to->values, part->values, (size_t)padded * 4);
        *to->largest = *part->largest;
        *to->total = *part->total;
        return;
    }
    float most = fmaxf(*to->largest, *part->largest);
    /* Mostly the largest score is an earlier one: then nothing is rescaled. */
    float kept = *to->largest == most ? 1.0f : expf(*to->largest - most);
    float added = *part->largest == most ? 1.0f : expf(*part->largest - most);
    vf by_kept = vf_set1(kept), by_added = vf_set1(added);
    for (int i = 0; i < padded; i += 16) {
        vf old = vf_load(to->values + i);
        if (kept != 1.0f) old = vf_mul(old, by_kept);
        vf_store(to->values + i, vf_fma(vf_load(part->values + i), by_added, old));
    }
    *to->total = *to->total * kept + *part->total * added;
    *to->largest = most;
}

/* A head's projections of a row: its queries, and behind them its gates. */
static const float *head_of(const struct attention *a, int row, int head) {
    return a->qkv + (size_t)row * a->qkv_stride + head * (a->is_gated ? 2 * a->head_dim : a->head_dim);
}

static void write_out(const struct attention *a, int row, int head, const float *values, float total, float *out) {
    int dim = a->head_dim;
    float inverse = 1.0f / total;
    for (int i = 0; i < dim; i++) out[i] = values[i] * inverse;
    if (!a->is_gated) return;
    const float *gates = head_of(a, row, head) + dim;
    for (int i = 0; i < dim; i++) out[i] /= 1.0f + expf(-gates[i]);
}

/* The task's queries over the tokens [first, end) of one segment, whose blocks begin at multiples of SCORE_TOKENS. */
static void segment(const struct attention *a, const struct attention_task *t, int first, int end, const float *q,
                    float *scores, const struct partial *sums) {
    int padded = round_up(a->head_dim, 16), num_queries = t->num_rows * t->num_heads;
    const uint8_t *keys = a->keys + (size_t)t->kv_head * a->head_stride;
    const uint8_t *values = a->values + (size_t)t->kv_head * a->head_stride;
    for (int r = 0; r < num_queries; r++) {
        for (int i = 0; i < padded; i++) sums->values[r * padded + i] = 0;
        sums->largest[r] = -INFINITY;
        sums->total[r] = 0;
    }
    for (int start = first, next; start < end; start = next) {
        next = (start / SCORE_TOKENS + 1) * SCORE_TOKENS;
        int tokens = (next < end ? next : end) - start, left = t->end_token - start;
        const int32_t *pages = t->pages + start / PAGE_TOKENS;
        switch (a->kv_form) { /* the loops are compiled once a form */
        case KV_BFLOAT16: score_block(KV_BFLOAT16, a, pages, keys, values, tokens, left, q, num_queries, scores); break;
        case KV_FLOAT32: score_block(KV_FLOAT32, a, pages, keys, values, tokens, left, q, num_queries, scores); break;
        case KV_INT8: score_block(KV_INT8, a, pages, keys, values, tokens, left, q, num_queries, scores); break;
        }
        for (int r = 0; r < num_queries; r++) {
            float *row = scores + r * SCORE_TOKENS, *out = sums->values + r * padded;
            int seen = t->position + r / t->num_heads + 1 - start;
            int unseen = a->window_tokens > 0 && seen > a->window_tokens ? seen - a->window_tokens : 0;
            seen = seen < 0 ? 0 : seen < tokens ? seen : tokens;
            /* Masked: page padding, other rows' tokens. Whole registers, so that the rest is 0. */
            int whole = round_up(tokens, 16);
            for (int i = seen; i < whole; i++) row[i] = -INFINITY;
            if (unseen >= seen) {
                memset(row, 0, (size_t)whole * 4);
                continue;
            }
            for (int i = 0; i < unseen; i++) row[i] = -INFINITY;
            /* A fully masked register adds nothing: another task may not have it. */
            int from = unseen & ~15;
            vf most = vf_set1(sums->largest[r]);
            for (int i = from; i < seen; i += 16) most = vf_max(most, vf_load(row + i));
            float now = vf_reduce_max(most);
            vf sum = vf_zero(), by = vf_set1(now);
            for (int i = from; i < seen; i += 16) {
                vf weight = vf_exp(vf_sub(vf_load(row + i), by));
                vf_store(row + i, weight);
                if (i + 16 <= seen) sum = vf_add(sum, weight);
            }
            float tail = 0;
            if (seen % 16 != 0)
                for (int j = seen & ~15; j < seen; j++) tail += row[j];
            for (int j = 0; j < unseen; j++) row[j] = 0;
            for (int j = seen; j < whole; j++) row[j] = 0;
            float correction = sums->largest[r] == -INFINITY ? 0.0f : expf(sums->largest[r] - now);
            sums->total[r] = sums->total[r] * correction + vf_sum(sum) + tail;
            if (correction != 1.0f)
                for (int j = 0; j < padded; j += 16) vf_store(out + j, vf_mul(vf_load(out + j), vf_set1(correction)));
            sums->largest[r] = now;
        }
        switch (a->kv_form) {
        case KV_BFLOAT16: weigh_block(KV_BFLOAT16, a, pages, values, tokens, scores, num_queries, sums->values); break;
        case KV_FLOAT32: weigh_block(KV_FLOAT32, a, pages, values, tokens, scores, num_queries, sums->values); break;
        case KV_INT8: weigh_block(KV_INT8, a, pages, values, tokens, scores, num_queries, sums->values); break;
        }
    }
}

/* Address of a row's result over its segment `number`, its first segment being 0. */
static struct partial part_of(const struct attention *a, int row, int head, int number) {
    int padded = round_up(a->head_dim, 16);
    size_t place = ((size_t)row * (size_t)a->num_heads + (size_t)head) * (size_t)a->max_parts + (size_t)number;
    float *values = a->parts + place * (size_t)(padded + 2);
    return (struct partial){values, values + padded, values + padded + 1};
}

void LEVEL(attend)(const struct attention *a, const struct attention_task *t, float *scratch) {
    int dim = a->head_dim, padded = round_up(dim, 16), num_queries = t->num_rows * t->num_heads;
    float *q = scratch, *values = q + MAX_TASK_QUERIES * padded, *joined = values + MAX_TASK_QUERIES * padded;
    float *scores = joined + MAX_TASK_QUERIES * padded;
    float largest[MAX_TASK_QUERIES], total[MAX_TASK_QUERIES], all_largest[MAX_TASK_QUERIES], all_total[MAX_TASK_QUERIES];
    struct partial sums = {values, largest, total};
    if (t->writes)
        LEVEL(write_kv)(a, t->first_row, t->kv_head, t->pages[t->position / PAGE_TOKENS], t->position % PAGE_TOKENS);
    /* The first ones are prefetched while the queries are rotated. */
    for (int token = 0; token < FETCH_TOKENS && t->first_token + token < t->end_token; token += PAGE_TOKENS) {
        int page = t->pages[(t->first_token + token) / PAGE_TOKENS];
        prefetch_page(a, a->keys + (size_t)t->kv_head * a->head_stride, page);
        prefetch_page(a, a->values + (size_t)t->kv_head * a->head_stride, page);
    }
    for (int r = 0; r < num_queries; r++) {
        int row = t->first_row + r / t->num_heads, head = t->first_head + r % t->num_heads;
        rotate(a, head_of(a, row, head), head, row, a->scales[row], q + r * padded);
        all_largest[r] = -INFINITY;
        all_total[r] = 0;
    }
    for (int start = t->first_token, next, number = t->part; start < t->end_token; start = next, number++) {
        next = (start / t->segment_tokens + 1) * t->segment_tokens;
        segment(a, t, start, next < t->end_token ? next : t->end_token, q, scores, &sums);
        for (int r = 0; r < num_queries; r++) {
            struct partial own = {values + r * padded, &largest[r], &total[r]};
            if (t->part < 0) {
                struct partial all = {joined + r * padded, &all_largest[r], &all_total[r]};
                join(&all, &own, padded);
                continue;
            }
            struct partial part = part_of(a, t->first_row + r / t->num_heads, t->first_head + r % t->num_heads, number);
            memcpy(part.values, own.values, (size_t)padded * 4);
            *part.largest = largest[r];
            *part.total = total[r];
        }
    }
    if (t->part >= 0) return;
    for (int r = 0; r < num_queries; r++) {
        int row = t->first_row + r / t->num_heads, head = t->first_head + r % t->num_heads;
        write_out(a, row, head, joined + r * padded, all_total[r], a->out + (size_t)row * a->out_stride + head * dim);
    }
}

void LEVEL(merge_parts)(const struct attention *a, int row, int num_parts, float *out) {
    int dim = a->head_dim, padded = round_up(dim, 16);
    float values[padded];
    for (int head = 0; head < a->num_heads; head++, out += dim) {
        float largest = -INFINITY, total = 0;
        struct partial all = {values, &largest, &total};
        for (int p = 0; p < num_parts; p++) {
            struct partial part = part_of(a, row, head, p);
            join(&all, &part, padded);
        }
        write_out(a, row, head, values, total, out);
    }
}
