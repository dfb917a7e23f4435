/* Sixteen lanes in one 512-bit register (AVX-512 F, BW, DQ, VL and VNNI; BF16 where __AVX512BF16__). */
#include <immintrin.h>

typedef __m512 vf;
typedef __m512i vi;

#define NEURON_TILE_8 1
enum { TILE_ROWS = 8, SCORE_ROWS = 6, IS_SPLIT = 1, VALUE_ROWS = 6, VALUE_VECTORS = 4 };

INLINE vf vf_load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void vf_store(float *to, vf x) { _mm512_storeu_ps(to, x); }
INLINE vf vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vf vf_set1(float x) { return _mm512_set1_ps(x); }
INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE float vf_sum(vf a) { return _mm512_reduce_add_ps(a); }
INLINE float vf_reduce_max(vf a) { return _mm512_reduce_max_ps(a); }
INLINE vf vf_round(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE vf vf_power2(vf a, vf exponent) { return _mm512_scalef_ps(a, exponent); }
INLINE vf vf_load_half(const void *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE vf vf_load_bf16(const uint16_t *from) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}
INLINE vf vf_load_s8(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
/* The first and the second of 16 pairs of bfloat16. */
INLINE void vf_load_pairs(const uint16_t *from, vf *even, vf *odd) {
    __m512i pairs = _mm512_loadu_si512(from);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}
INLINE vi vi_max(vi a, vi b) { return _mm512_max_epi32(a, b); }
INLINE int32_t vi_reduce_max(vi a) { return _mm512_reduce_max_epi32(a); }
INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
INLINE vi vi_magnitude(vf a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
INLINE vi vi_from_float(vf a) { return _mm512_cvtps_epi32(a); }
INLINE void vi_store_s8(int8_t *to, vi a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(a)); }

/* One group of W4 for num_rows activations: acc[b] += d (q . x) + m sum(x). The weights are unpacked once for all. */
INLINE void w4_group(const int num_rows, const uint8_t *w, const uint8_t *const *x, int group, vf *acc) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i low[4], high[4];
    UNROLL for (int j = 0; j < 4; j++) {
        __m512i packed = _mm512_loadu_si512(w + 64 * j);
        low[j] = _mm512_and_si512(packed, mask);
        high[j] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
    }
    vf d = vf_load_half(w + 256), m = vf_load_half(w + 288);
    UNROLL for (int b = 0; b < num_rows; b++) {
        const struct group8 *xg = (const struct group8 *)x[b] + group;
        __m512i first = _mm512_setzero_si512(), second = first;
        UNROLL for (int j = 0; j < 4; j++) {
            first = _mm512_dpbusd_epi32(first, low[j], _mm512_set1_epi32(load_i32(xg->q + 4 * j)));
            second = _mm512_dpbusd_epi32(second, high[j], _mm512_set1_epi32(load_i32(xg->q + 16 + 4 * j)));
        }
        vf dot = _mm512_cvtepi32_ps(_mm512_add_epi32(first, second));
        acc[b] = vf_fma(dot, vf_mul(d, vf_set1(xg->scale)), acc[b]);
        acc[b] = vf_fma(m, vf_set1(xg->scaled_sum), acc[b]);
    }
}

/* Of W8, and of formats with a table. */
INLINE void w8_group(const int format, const int num_rows, const uint8_t *w, const uint8_t *const *x, int group,
                     vf *acc) {
    __m512i codes[8];
    if (format == W8) {
        UNROLL for (int j = 0; j < 8; j++) codes[j] = _mm512_loadu_si512(w + 64 * j);
    } else {
        const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)code_table(format)));
        const __m512i mask = _mm512_set1_epi8(15);
        UNROLL for (int j = 0; j < 4; j++) {
            __m512i packed = _mm512_loadu_si512(w + 64 * j);
            codes[j] = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, mask));
            codes[j + 4] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
        }
    }
    vf d = format == FP4 ? vf_load_bf16((const uint16_t *)(const void *)(w + 256))
                         : vf_load_half(w + (format == W8 ? 512 : 256));
    UNROLL for (int b = 0; b < num_rows; b++) {
        const struct group8 *xg = (const struct group8 *)x[b] + group;
        __m512i first = _mm512_set1_epi32(xg->minus128sum), second = _mm512_setzero_si512();
        UNROLL for (int j = 0; j < 8; j += 2) {
            first = _mm512_dpbusd_epi32(first, codes[j], _mm512_set1_epi32(load_i32(xg->q + 4 * j)));
            second = _mm512_dpbusd_epi32(second, codes[j + 1], _mm512_set1_epi32(load_i32(xg->q + 4 * j + 4)));
        }
        vf dot = _mm512_cvtepi32_ps(_mm512_add_epi32(first, second));
        acc[b] = vf_fma(dot, vf_mul(d, vf_set1(xg->scale)), acc[b]);
    }
}

#ifdef __AVX512BF16__
INLINE vf w16_dot(vf acc, const uint8_t *w, uint32_t pair) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_set1_epi32((int)pair));
}
#endif
