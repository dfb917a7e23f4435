/* Sixteen lanes in two 256-bit registers (AVX2, FMA, F16C). */
#include <immintrin.h>

typedef struct { __m256 a, b; } vf;
typedef struct { __m256i a, b; } vi;

/* Half the registers, each half as wide: smaller tiles, or the accumulators spill. */
#define NEURON_TILE_4 1
enum { TILE_ROWS = 4, SCORE_ROWS = 4, IS_SPLIT = 0, VALUE_ROWS = 3, VALUE_VECTORS = 2 };

#define EACH(name, op) INLINE vf name(vf x, vf y) { return (vf){op(x.a, y.a), op(x.b, y.b)}; }
EACH(vf_add, _mm256_add_ps)
EACH(vf_sub, _mm256_sub_ps)
EACH(vf_mul, _mm256_mul_ps)
EACH(vf_div, _mm256_div_ps)
EACH(vf_max, _mm256_max_ps)
EACH(vf_min, _mm256_min_ps)
#undef EACH
INLINE vf vf_load(const float *from) { return (vf){_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINE void vf_store(float *to, vf x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
INLINE vf vf_zero(void) { return (vf){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE vf vf_set1(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vf vf_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE float vf_sum(vf x) {
    __m256 all = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float vf_reduce_max(vf x) {
    __m256 all = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE vf vf_round(vf x) {
    return (vf){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE __m256 power2_half(__m256 x, __m256 exponent) {
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}
INLINE vf vf_power2(vf x, vf exponent) { return (vf){power2_half(x.a, exponent.a), power2_half(x.b, exponent.b)}; }
INLINE vf vf_load_half(const void *from) {
    const __m128i *halves = from;
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
INLINE __m256 widen_bf16(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE vf vf_load_bf16(const uint16_t *from) {
    const __m128i *halves = (const __m128i *)from;
    return (vf){widen_bf16(_mm_loadu_si128(halves)), widen_bf16(_mm_loadu_si128(halves + 1))};
}
INLINE vf vf_load_s8(const int8_t *from) {
    const __m128i low = _mm_loadl_epi64((const __m128i *)from), high = _mm_loadl_epi64((const __m128i *)(from + 8));
    return (vf){_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))};
}
INLINE void vf_load_pairs(const uint16_t *from, vf *even, vf *odd) {
    const __m256i *pairs = (const __m256i *)from, mask = _mm256_set1_epi32((int)0xffff0000);
    __m256i first = _mm256_loadu_si256(pairs), second = _mm256_loadu_si256(pairs + 1);
    even->a = _mm256_castsi256_ps(_mm256_slli_epi32(first, 16));
    even->b = _mm256_castsi256_ps(_mm256_slli_epi32(second, 16));
    odd->a = _mm256_castsi256_ps(_mm256_and_si256(first, mask));
    odd->b = _mm256_castsi256_ps(_mm256_and_si256(second, mask));
}
INLINE vi vi_max(vi x, vi y) { return (vi){_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
INLINE vi vi_add(vi x, vi y) { return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE int32_t vi_reduce_max(vi x) {
    int32_t lanes[8], found;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_max_epi32(x.a, x.b));
    found = lanes[0];
    for (int i = 1; i < 8; i++) found = lanes[i] > found ? lanes[i] : found;
    return found;
}
INLINE int32_t vi_sum(vi x) {
    int32_t lanes[8], total = 0;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi32(x.a, x.b));
    for (int i = 0; i < 8; i++) total += lanes[i];
    return total;
}
INLINE vi vi_magnitude(vf x) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return (vi){_mm256_and_si256(_mm256_castps_si256(x.a), mask), _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
INLINE vi vi_from_float(vf x) { return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE void vi_store_s8(int8_t *to, vi x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)to, bytes);
}

/* Eight rows at a time. Products of codes up to 15 and activations up to 127 leave room for a whole group of 32 in the
 * signed words that vpmaddubsw makes: 8 * 2 * 15 * 127 = 30480. */
INLINE void w4_group(const int num_rows, const uint8_t *w, const uint8_t *const *x, int group, vf *acc) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    vf d = vf_load_half(w + 256), m = vf_load_half(w + 288);
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i words[TILE_ROWS];
        UNROLL for (int b = 0; b < num_rows; b++) words[b] = _mm256_setzero_si256();
        UNROLL for (int j = 0; j < 4; j++) {
            __m256i packed = _mm256_loadu_si256((const __m256i *)(w + 64 * j + 32 * half));
            __m256i low = _mm256_and_si256(packed, mask);
            __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            UNROLL for (int b = 0; b < num_rows; b++) {
                const struct group8 *xg = (const struct group8 *)x[b] + group;
                __m256i first = _mm256_set1_epi32(load_i32(xg->q + 4 * j));
                __m256i second = _mm256_set1_epi32(load_i32(xg->q + 16 + 4 * j));
                words[b] = _mm256_add_epi16(words[b], _mm256_maddubs_epi16(low, first));
                words[b] = _mm256_add_epi16(words[b], _mm256_maddubs_epi16(high, second));
            }
        }
        UNROLL for (int b = 0; b < num_rows; b++) {
            const struct group8 *xg = (const struct group8 *)x[b] + group;
            __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(words[b], ones));
            __m256 scale = _mm256_set1_ps(xg->scale), sum = _mm256_set1_ps(xg->scaled_sum);
            __m256 *to = half ? &acc[b].b : &acc[b].a;
            *to = _mm256_fmadd_ps(dot, _mm256_mul_ps(half ? d.b : d.a, scale), *to);
            *to = _mm256_fmadd_ps(half ? m.b : m.a, sum, *to);
        }
    }
}

/* Columns 4j to 4j + 3 of eight rows of W8, or of a format with a table. */
INLINE __m256i signed_codes(const int format, const uint8_t *w, int j, int half) {
    const __m256i offset = _mm256_set1_epi8((char)0x80);
    if (format == W8) return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + 64 * j + 32 * half)), offset);
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)code_table(format)));
    __m256i packed = _mm256_loadu_si256((const __m256i *)(w + 64 * (j % 4) + 32 * half));
    __m256i nibbles = _mm256_and_si256(j < 4 ? packed : _mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
    return _mm256_shuffle_epi8(_mm256_xor_si256(table, offset), nibbles);
}

/* vpmaddubsw saturates with codes up to 255, so the weights' signs move to the activations: 2 * 128 * 127 fits. */
INLINE void w8_group(const int format, const int num_rows, const uint8_t *w, const uint8_t *const *x, int group,
                     vf *acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    vf d = format == FP4 ? vf_load_bf16((const uint16_t *)(const void *)(w + 256))
                         : vf_load_half(w + (format == W8 ? 512 : 256));
    UNROLL for (int half = 0; half < 2; half++) {
        __m256i total[TILE_ROWS];
        UNROLL for (int b = 0; b < num_rows; b++) total[b] = _mm256_setzero_si256();
        UNROLL for (int j = 0; j < 8; j++) {
            __m256i code = signed_codes(format, w, j, half);
            __m256i magnitude = _mm256_abs_epi8(code);
            UNROLL for (int b = 0; b < num_rows; b++) {
                const struct group8 *xg = (const struct group8 *)x[b] + group;
                __m256i q = _mm256_sign_epi8(_mm256_set1_epi32(load_i32(xg->q + 4 * j)), code);
                __m256i words = _mm256_maddubs_epi16(magnitude, q);
                total[b] = _mm256_add_epi32(total[b], _mm256_madd_epi16(words, ones));
            }
        }
        UNROLL for (int b = 0; b < num_rows; b++) {
            const struct group8 *xg = (const struct group8 *)x[b] + group;
            __m256 *to = half ? &acc[b].b : &acc[b].a;
            __m256 scale = _mm256_mul_ps(half ? d.b : d.a, _mm256_set1_ps(xg->scale));
            *to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total[b]), scale, *to);
        }
    }
}
