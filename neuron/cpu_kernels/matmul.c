/* y[T, rows] = x[T, columns] w^T, from packed weights, with a fused epilogue.
 *
 *     w4, w8:  y = sum over groups g of d[g] s[g] (q[g] . x[g]) + m[g] s[g] sum(x[g])     int32 within a group
 *     iq4, fp4: as w8, of the numbers that codes stand for
 *     w16:     bfloat16 products, float32 sums        w32: float32
 *
 * A block of 16 rows is multiplied with a tile of up to TILE_ROWS activations while its weights are in registers, then
 * with the next tile while they are in the first-level cache; activations run in panels that stay in the second level.
 * With one activation this is a stream of weights at the memory's speed, with many a matrix product at the dot
 * products' speed. Reference: torch.nn.functional.linear on the dequantised weights.
 */
#include "kernels.h"
#include "simd.h"

enum {
    /* Prefetch distances in bytes, past the caches and into the second level: they hide memory latency at few activations. */
    FAR_BYTES = 5120,
    NEAR_BYTES = 3072,
    /* Activations of a panel, in bytes: half of a second-level cache of 512 KiB. */
    PANEL_BYTES = 256 << 10,
};

/* A step reads a weight once, so none need stay in a cache (locality 0). Where that is slow, by way of the second level. */
INLINE void prefetch(const uint8_t *w, int bytes, int into_l2) {
    if (into_l2)
        UNROLL for (int i = 0; i < bytes; i += 64) __builtin_prefetch(w + NEAR_BYTES + i, 0, 2);
    else
        UNROLL for (int i = 0; i < bytes; i += 64) __builtin_prefetch(w + FAR_BYTES + i, 0, 0);
}

#ifdef __AMX_BF16__
#include "matmul_amx.h"
#endif

INLINE float load_float(const uint8_t *from) { return bits_float(load_u32(from)); }

#ifndef __AVX512BF16__
INLINE vf w16_dot(vf acc, const uint8_t *w, uint32_t pair) {
    vf even, odd;
    uint16_t pairs[32];
    memcpy(pairs, w, sizeof pairs);
    vf_load_pairs(pairs, &even, &odd);
    acc = vf_fma(even, vf_set1(bits_float(pair << 16)), acc);
    return vf_fma(odd, vf_set1(bits_float(pair & 0xffff0000)), acc);
}
#endif

/* Remainders of a row's coarse groups: seldom more than a few. */
INLINE void remainders(const int format, const uint8_t *w, int groups, const uint8_t *const *x, vf *acc) {
    const struct group8 *row = (const struct group8 *)x[0];
    for (int i = 0; i < row->remainder; i++) {
        int of = row[groups + i].remainder;
        const uint8_t *group = w + (size_t)of * (size_t)group_bytes(format);
        if (format == W4)
            w4_group(1, group, x, groups + i, acc);
        else
            w8_group(format, 1, group, x, groups + i, acc);
    }
}

/* The products of one block with a tile of num_rows (a constant where this is inlined). */
INLINE void block_dot(const int format, const int num_rows, const uint8_t *w, int groups, int into_l2,
                      const uint8_t *const *x, vf *acc) {
    const uint8_t *block = w;
    UNROLL for (int b = 0; b < num_rows; b++) acc[b] = vf_zero();
    if (format <= W8) {
        for (int g = 0; g < groups; g++, w += group_bytes(format)) {
            prefetch(w, group_bytes(format), into_l2);
            if (format == W4)
                w4_group(num_rows, w, x, g, acc);
            else
                w8_group(format, num_rows, w, x, g, acc);
        }
    } else if (format == W16) {
        /* Two chains: one alone is bound by the latency of its sums at one activation. */
        vf more[TILE_ROWS];
        int g = 0;
        UNROLL for (int b = 0; b < num_rows; b++) more[b] = vf_zero();
        for (; g + 1 < groups; g += 2, w += 2 * group_bytes(W16)) {
            prefetch(w, 2 * group_bytes(W16), into_l2);
            UNROLL for (int b = 0; b < num_rows; b++) {
                acc[b] = w16_dot(acc[b], w, load_u32(x[b] + 4 * g));
                more[b] = w16_dot(more[b], w + group_bytes(W16), load_u32(x[b] + 4 * g + 4));
            }
        }
        if (g < groups)
            UNROLL for (int b = 0; b < num_rows; b++) acc[b] = w16_dot(acc[b], w, load_u32(x[b] + 4 * g));
        UNROLL for (int b = 0; b < num_rows; b++) acc[b] = vf_add(acc[b], more[b]);
    } else {
        for (int g = 0; g < groups; g++, w += group_bytes(W32)) {
            float lanes[16];
            memcpy(lanes, w, sizeof lanes);
            vf weights = vf_load(lanes);
            UNROLL for (int b = 0; b < num_rows; b++)
                acc[b] = vf_fma(weights, vf_set1(load_float(x[b] + 4 * g)), acc[b]);
        }
    }
    if (format <= W8)
        for (int b = 0; b < num_rows; b++) remainders(format, block, groups, x + b, acc + b);
}

static void keep_best(struct best *best, vf acc, int first_row, int num_rows) {
    float lanes[BLOCK_ROWS];
    vf_store(lanes, acc);
    if (num_rows == BLOCK_ROWS) {
        /* Zero times a finite number is zero, times any other NaN. */
        best->not_finite += vf_sum(vf_mul(acc, vf_zero()));
        if (best->index >= 0 && !(vf_reduce_max(acc) > best->value)) return;
    }
    for (int i = 0; i < num_rows; i++) {
        if (num_rows < BLOCK_ROWS) best->not_finite += lanes[i] * 0.0f;
        if (best->index < 0 || lanes[i] > best->value) {
            best->value = lanes[i];
            best->index = first_row + i;
        }
    }
}

/* gelu(x) = x / (1 + exp(-this)): its tanh form, for tanh(z) is 2 / (1 + exp(-2 z)) - 1 (arXiv:1606.08415). */
INLINE vf gelu_exponent(vf x) {
    vf cubic = vf_fma(vf_mul(x, x), vf_set1(0.044715f), vf_set1(1.0f));
    return vf_mul(vf_mul(x, cubic), vf_set1(1.5957691216f)); /* 2 sqrt(2 / pi) */
}

/* Activations of a panel, in whole tiles. */
INLINE int panel_rows(const struct matmul *t, int tile_rows) {
    int tiles = (int)(PANEL_BYTES / t->x_stride) / tile_rows;
    return (tiles > 0 ? tiles : 1) * tile_rows;
}

/* Write what becomes of the products of a block; of two in turn, gates and up, where they are gated. */
INLINE void write_block(const struct matmul *t, int block, int first, int num_rows, const vf *acc, const vf *up) {
    if (t->epilogue == SWIGLU || t->epilogue == GEGLU) {
        for (int b = 0; b < num_rows; b++) {
            vf exponent = t->epilogue == SWIGLU ? acc[b] : gelu_exponent(acc[b]);
            vf denominator = vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), exponent)));
            vf gated = vf_mul(vf_div(acc[b], denominator), up[b]);
            vf_store(t->y + (size_t)(first + b) * t->y_stride + (size_t)block / 2 * BLOCK_ROWS, gated);
        }
        return;
    }
    if (t->epilogue == ARGMAX) {
        int row = block * BLOCK_ROWS;
        int valid = t->valid_rows - row < BLOCK_ROWS ? t->valid_rows - row : BLOCK_ROWS;
        for (int b = 0; b < num_rows; b++) keep_best(&t->best[first + b], acc[b], row, valid);
        return;
    }
    vf bias = t->w->bias != NULL ? vf_load(t->w->bias + block * BLOCK_ROWS) : vf_zero();
    for (int b = 0; b < num_rows; b++) {
        float *y = t->y + (size_t)(first + b) * t->y_stride + (size_t)block * BLOCK_ROWS;
        vf sum = vf_add(acc[b], bias);
        vf_store(y, t->epilogue == ADD ? vf_add(vf_load(y), sum) : sum);
    }
}

INLINE int blocks_together(const struct matmul *t) { return t->epilogue == SWIGLU || t->epilogue == GEGLU ? 2 : 1; }

INLINE void tile(const int format, const int num_rows, const struct matmul *t, int block, size_t bytes, int groups,
                 int first) {
    const uint8_t *x[TILE_ROWS];
    const uint8_t *w = t->w->data + (size_t)block * bytes;
    vf acc[TILE_ROWS], up[TILE_ROWS];
    for (int b = 0; b < num_rows; b++) x[b] = t->x + (size_t)(first + b) * t->x_stride;
    block_dot(format, num_rows, w, groups, t->into_l2, x, acc);
    if (blocks_together(t) == 2) block_dot(format, num_rows, w + bytes, groups, t->into_l2, x, up);
    write_block(t, block, first, num_rows, acc, up);
}

#ifdef __AMX_BF16__
/* Blocks of bfloat16 on the matrix units, also for one activation. */
static void matrix_bf16(const struct matmul *t, int first_block, int end_block) {
    size_t bytes = block_bytes(W16, t->w->columns);
    int groups = num_groups(W16, t->w->columns), step = blocks_together(t), panel = panel_rows(t, MATRIX_ROWS);
    for (int from = 0; from < t->num_x; from += panel) {
        int end = from + panel < t->num_x ? from + panel : t->num_x;
        for (int block = first_block, count; block < end_block; block += count) {
            count = end_block - block < MATRIX_BLOCKS ? end_block - block : MATRIX_BLOCKS;
            for (int row = from; row < end; row += MATRIX_ROWS) {
                vf sums[MATRIX_BLOCKS][MATRIX_ROWS];
                int rows = end - row < MATRIX_ROWS ? end - row : MATRIX_ROWS;
                matrix_pairs(t->w->data + (size_t)block * bytes, bytes, count, groups, t->into_l2,
                             t->x + (size_t)row * t->x_stride, t->x_stride, rows, sums);
                for (int i = 0; i < count; i += step) write_block(t, block + i, row, rows, sums[i], sums[i + step - 1]);
            }
        }
    }
}
#endif

INLINE void blocks(const int format, const struct matmul *t, int first_block, int end_block) {
    size_t bytes = block_bytes(format, t->w->columns);
    int groups = num_groups(format, t->w->columns), step = blocks_together(t), panel = panel_rows(t, TILE_ROWS);
    for (int from = 0; from < t->num_x; from += panel) {
        int end = from + panel < t->num_x ? from + panel : t->num_x;
        for (int block = first_block; block < end_block; block += step) {
            int row = from;
            for (; row + TILE_ROWS <= end; row += TILE_ROWS) tile(format, TILE_ROWS, t, block, bytes, groups, row);
            switch (end - row) {
#if NEURON_TILE_8
            case 7: tile(format, 7, t, block, bytes, groups, row); break;
            case 6: tile(format, 6, t, block, bytes, groups, row); break;
            case 5: tile(format, 5, t, block, bytes, groups, row); break;
            case 4: tile(format, 4, t, block, bytes, groups, row); break;
#endif
#if NEURON_TILE_8 || NEURON_TILE_4
            case 3: tile(format, 3, t, block, bytes, groups, row); break;
            case 2: tile(format, 2, t, block, bytes, groups, row); break;
#endif
            case 1: tile(format, 1, t, block, bytes, groups, row); break;
            default: break;
            }
        }
    }
}

void LEVEL(matmul)(const struct matmul *task, int first_block, int end_block) {
    switch (task->w->format) {
    case W4: blocks(W4, task, first_block, end_block); break;
    case IQ4: blocks(IQ4, task, first_block, end_block); break;
    case FP4: blocks(FP4, task, first_block, end_block); break;
    case W8: blocks(W8, task, first_block, end_block); break;
#ifdef __AMX_BF16__
    case W16: matrix_bf16(task, first_block, end_block); break;
#else
    case W16: blocks(W16, task, first_block, end_block); break;
#endif
    case W32: blocks(W32, task, first_block, end_block); break;
    default: break;
    }
}
