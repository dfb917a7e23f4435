/* Sixteen lanes in four 128-bit registers (Armv8.2 with the dot products of signed bytes). */
#include <arm_neon.h>

typedef struct { float32x4_t v[4]; } vf;
typedef struct { int32x4_t v[4]; } vi;

#define NEURON_TILE_4 1
enum { TILE_ROWS = 4, SCORE_ROWS = 4, IS_SPLIT = 0, VALUE_ROWS = 3, VALUE_VECTORS = 2 };

#define EACH(type, expression) type z; UNROLL for (int i = 0; i < 4; i++) z.v[i] = (expression); return z
INLINE vf vf_load(const float *from) { EACH(vf, vld1q_f32(from + 4 * i)); }
INLINE void vf_store(float *to, vf x) { UNROLL for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, x.v[i]); }
INLINE vf vf_set1(float x) { EACH(vf, vdupq_n_f32(x)); }
INLINE vf vf_zero(void) { return vf_set1(0); }
INLINE vf vf_add(vf x, vf y) { EACH(vf, vaddq_f32(x.v[i], y.v[i])); }
INLINE vf vf_sub(vf x, vf y) { EACH(vf, vsubq_f32(x.v[i], y.v[i])); }
INLINE vf vf_mul(vf x, vf y) { EACH(vf, vmulq_f32(x.v[i], y.v[i])); }
INLINE vf vf_div(vf x, vf y) { EACH(vf, vdivq_f32(x.v[i], y.v[i])); }
INLINE vf vf_fma(vf x, vf y, vf w) { EACH(vf, vfmaq_f32(w.v[i], x.v[i], y.v[i])); }
/* By comparison, since vmaxq_f32 gives NaN for either. */
INLINE vf vf_max(vf x, vf y) { EACH(vf, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
INLINE vf vf_min(vf x, vf y) { EACH(vf, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
INLINE float vf_sum(vf x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.v[0], x.v[1]), vaddq_f32(x.v[2], x.v[3]))); }
INLINE float vf_reduce_max(vf x) {
    return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.v[0], x.v[1]), vmaxnmq_f32(x.v[2], x.v[3])));
}
INLINE vf vf_round(vf x) { EACH(vf, vrndnq_f32(x.v[i])); }
INLINE vf vf_power2(vf x, vf e) {
    EACH(vf, vmulq_f32(x.v[i], vreinterpretq_f32_s32(
                                   vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(e.v[i]), vdupq_n_s32(127)), 23))));
}
INLINE vf vf_load_half(const void *from) {
    uint16_t lanes[16];
    memcpy(lanes, from, sizeof lanes);
    EACH(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(lanes + 4 * i))));
}
INLINE vf vf_load_bf16(const uint16_t *from) {
    EACH(vf, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16)));
}
INLINE vf vf_load_s8(const int8_t *from) {
    int16x8_t halves[2] = {vmovl_s8(vld1_s8(from)), vmovl_s8(vld1_s8(from + 8))};
    EACH(vf, vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(halves[i / 2]) : vget_low_s16(halves[i / 2]))));
}
INLINE void vf_load_pairs(const uint16_t *from, vf *even, vf *odd) {
    UNROLL for (int i = 0; i < 4; i++) {
        uint32x4_t pairs = vreinterpretq_u32_u16(vld1q_u16(from + 8 * i));
        even->v[i] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
        odd->v[i] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000)));
    }
}
INLINE vi vi_max(vi x, vi y) { EACH(vi, vmaxq_s32(x.v[i], y.v[i])); }
INLINE vi vi_add(vi x, vi y) { EACH(vi, vaddq_s32(x.v[i], y.v[i])); }
INLINE vi vi_magnitude(vf x) { EACH(vi, vandq_s32(vreinterpretq_s32_f32(x.v[i]), vdupq_n_s32(0x7fffffff))); }
INLINE vi vi_from_float(vf x) { EACH(vi, vcvtnq_s32_f32(x.v[i])); }
INLINE int32_t vi_reduce_max(vi x) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.v[0], x.v[1]), vmaxq_s32(x.v[2], x.v[3])));
}
INLINE int32_t vi_sum(vi x) { return vaddvq_s32(vaddq_s32(vaddq_s32(x.v[0], x.v[1]), vaddq_s32(x.v[2], x.v[3]))); }
INLINE void vi_store_s8(int8_t *to, vi x) {
    int16x8_t low = vcombine_s16(vqmovn_s32(x.v[0]), vqmovn_s32(x.v[1]));
    int16x8_t high = vcombine_s16(vqmovn_s32(x.v[2]), vqmovn_s32(x.v[3]));
    vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
}
#undef EACH

INLINE int8x16_t four_codes(const int8_t *q) { return vreinterpretq_s8_s32(vdupq_n_s32(load_i32(q))); }

/* Four rows at a time: a register of weights is 4 rows of 4 columns. */
INLINE void w4_group(const int num_rows, const uint8_t *w, const uint8_t *const *x, int group, vf *acc) {
    vf d = vf_load_half(w + 256), m = vf_load_half(w + 288);
    UNROLL for (int part = 0; part < 4; part++) {
        int8x16_t low[4], high[4];
        UNROLL for (int j = 0; j < 4; j++) {
            uint8x16_t packed = vld1q_u8(w + 64 * j + 16 * part);
            low[j] = vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(15)));
            high[j] = vreinterpretq_s8_u8(vshrq_n_u8(packed, 4));
        }
        UNROLL for (int b = 0; b < num_rows; b++) {
            const struct group8 *xg = (const struct group8 *)x[b] + group;
            int32x4_t first = vdupq_n_s32(0), second = first;
            UNROLL for (int j = 0; j < 4; j++) {
                first = vdotq_s32(first, low[j], four_codes(xg->q + 4 * j));
                second = vdotq_s32(second, high[j], four_codes(xg->q + 16 + 4 * j));
            }
            float32x4_t dot = vcvtq_f32_s32(vaddq_s32(first, second));
            acc[b].v[part] = vfmaq_f32(acc[b].v[part], dot, vmulq_n_f32(d.v[part], xg->scale));
            acc[b].v[part] = vfmaq_f32(acc[b].v[part], m.v[part], vdupq_n_f32(xg->scaled_sum));
        }
    }
}

/* Columns 4j to 4j + 3 of four rows of W8, or of a format with a table. */
INLINE int8x16_t signed_codes(const int format, const uint8_t *w, int j, int part) {
    uint8x16_t codes;
    if (format == W8) {
        codes = vld1q_u8(w + 64 * j + 16 * part);
    } else {
        uint8x16_t packed = vld1q_u8(w + 64 * (j % 4) + 16 * part);
        uint8x16_t nibbles = j < 4 ? vandq_u8(packed, vdupq_n_u8(15)) : vshrq_n_u8(packed, 4);
        codes = vqtbl1q_u8(vld1q_u8(code_table(format)), nibbles);
    }
    return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80)));
}

INLINE void w8_group(const int format, const int num_rows, const uint8_t *w, const uint8_t *const *x, int group,
                     vf *acc) {
    vf d = format == FP4 ? vf_load_bf16((const uint16_t *)(const void *)(w + 256))
                         : vf_load_half(w + (format == W8 ? 512 : 256));
    UNROLL for (int part = 0; part < 4; part++) {
        int8x16_t codes[8];
        UNROLL for (int j = 0; j < 8; j++) codes[j] = signed_codes(format, w, j, part);
        UNROLL for (int b = 0; b < num_rows; b++) {
            const struct group8 *xg = (const struct group8 *)x[b] + group;
            int32x4_t first = vdupq_n_s32(0), second = first;
            UNROLL for (int j = 0; j < 8; j += 2) {
                first = vdotq_s32(first, codes[j], four_codes(xg->q + 4 * j));
                second = vdotq_s32(second, codes[j + 1], four_codes(xg->q + 4 * j + 4));
            }
            float32x4_t dot = vcvtq_f32_s32(vaddq_s32(first, second));
            acc[b].v[part] = vfmaq_f32(acc[b].v[part], dot, vmulq_n_f32(d.v[part], xg->scale));
        }
    }
}
