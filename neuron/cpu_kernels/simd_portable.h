/* Sixteen lanes as an array, for any processor, vectorised by the compiler. */
#include <math.h>

typedef struct { float v[16]; } vf;
typedef struct { int32_t v[16]; } vi;

enum { TILE_ROWS = 2, SCORE_ROWS = 2, IS_SPLIT = 0, VALUE_ROWS = 2, VALUE_VECTORS = 2 };

#define LANES(expression) vf z; for (int i = 0; i < 16; i++) z.v[i] = (expression); return z
INLINE vf vf_load(const float *from) { LANES(from[i]); }
INLINE void vf_store(float *to, vf x) { for (int i = 0; i < 16; i++) to[i] = x.v[i]; }
INLINE vf vf_set1(float x) { LANES(x); }
INLINE vf vf_zero(void) { return vf_set1(0); }
INLINE vf vf_add(vf x, vf y) { LANES(x.v[i] + y.v[i]); }
INLINE vf vf_sub(vf x, vf y) { LANES(x.v[i] - y.v[i]); }
INLINE vf vf_mul(vf x, vf y) { LANES(x.v[i] * y.v[i]); }
INLINE vf vf_div(vf x, vf y) { LANES(x.v[i] / y.v[i]); }
INLINE vf vf_fma(vf x, vf y, vf w) { LANES(x.v[i] * y.v[i] + w.v[i]); }
INLINE vf vf_max(vf x, vf y) { LANES(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
INLINE vf vf_min(vf x, vf y) { LANES(x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
INLINE vf vf_round(vf x) { LANES(rintf(x.v[i])); }
/* NaN: the conversion would be undefined, and x is NaN too. */
INLINE vf vf_power2(vf x, vf e) {
    LANES(x.v[i] * bits_float((uint32_t)((e.v[i] == e.v[i] ? (int32_t)e.v[i] : 0) + 127) << 23));
}
INLINE vf vf_load_bf16(const uint16_t *from) { LANES(bf16_to_float(from[i])); }
INLINE vf vf_load_s8(const int8_t *from) { LANES((float)from[i]); }
INLINE vf vf_load_half(const void *from) {
    uint16_t halves[16];
    memcpy(halves, from, sizeof halves);
    LANES(half_to_float(halves[i]));
}
#undef LANES
INLINE void vf_load_pairs(const uint16_t *from, vf *even, vf *odd) {
    for (int i = 0; i < 16; i++) {
        even->v[i] = bf16_to_float(from[2 * i]);
        odd->v[i] = bf16_to_float(from[2 * i + 1]);
    }
}
INLINE float vf_sum(vf x) {
    float total = 0;
    for (int i = 0; i < 16; i++) total += x.v[i];
    return total;
}
INLINE float vf_reduce_max(vf x) {
    float found = x.v[0];
    for (int i = 1; i < 16; i++) found = x.v[i] > found ? x.v[i] : found;
    return found;
}
#define LANES(expression) vi z; for (int i = 0; i < 16; i++) z.v[i] = (expression); return z
INLINE vi vi_max(vi x, vi y) { LANES(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
INLINE vi vi_add(vi x, vi y) { LANES(x.v[i] + y.v[i]); }
INLINE vi vi_magnitude(vf x) { LANES((int32_t)(float_bits(x.v[i]) & 0x7fffffff)); }
/* A NaN becomes 0: its conversion would be undefined, and the scale is NaN. */
INLINE vi vi_from_float(vf x) { LANES(fabsf(x.v[i]) < 1e9f ? (int32_t)rintf(x.v[i]) : 0); }
#undef LANES
INLINE int32_t vi_reduce_max(vi x) {
    int32_t found = x.v[0];
    for (int i = 1; i < 16; i++) found = x.v[i] > found ? x.v[i] : found;
    return found;
}
INLINE int32_t vi_sum(vi x) {
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += x.v[i];
    return total;
}
INLINE void vi_store_s8(int8_t *to, vi x) { for (int i = 0; i < 16; i++) to[i] = (int8_t)x.v[i]; }

INLINE void w4_group(const int num_rows, const uint8_t *w, const uint8_t *const *x, int group, vf *acc) {
    vf d = vf_load_half(w + 256), m = vf_load_half(w + 288);
    for (int b = 0; b < num_rows; b++) {
        const struct group8 *xg = (const struct group8 *)x[b] + group;
        for (int r = 0; r < 16; r++) {
            int32_t dot = 0;
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < 4; i++) {
                    int code = w[64 * j + 4 * r + i];
                    dot += (code & 15) * xg->q[4 * j + i] + (code >> 4) * xg->q[16 + 4 * j + i];
                }
            acc[b].v[r] += (float)dot * (d.v[r] * xg->scale);
            acc[b].v[r] += m.v[r] * xg->scaled_sum;
        }
    }
}

/* Byte i of dword [j][r] of W8, or of a format with a table. */
INLINE int byte_code(const int format, const uint8_t *w, int j, int r, int i) {
    if (format == W8) return w[64 * j + 4 * r + i];
    return code_table(format)[w[64 * (j % 4) + 4 * r + i] >> (j < 4 ? 0 : 4) & 15];
}

INLINE void w8_group(const int format, const int num_rows, const uint8_t *w, const uint8_t *const *x, int group,
                     vf *acc) {
    vf d = format == FP4 ? vf_load_bf16((const uint16_t *)(const void *)(w + 256))
                         : vf_load_half(w + (format == W8 ? 512 : 256));
    for (int b = 0; b < num_rows; b++) {
        const struct group8 *xg = (const struct group8 *)x[b] + group;
        for (int r = 0; r < 16; r++) {
            int32_t dot = xg->minus128sum;
            for (int j = 0; j < 8; j++)
                for (int i = 0; i < 4; i++) dot += byte_code(format, w, j, r, i) * xg->q[4 * j + i];
            acc[b].v[r] += (float)dot * (d.v[r] * xg->scale);
        }
    }
}
