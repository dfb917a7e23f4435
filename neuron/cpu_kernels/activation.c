/* Inputs of a matrix product: RMS norm, and activations in the form that a weight format multiplies.
 *
 *     rms_norm: out = x / sqrt(mean(x^2) + eps) * weight                         (arXiv:1910.07467)
 *     int8:     per 32 elements, s = max|x| / 127, q = round(x / s)
 *
 * A few activations are hundreds of times larger than the rest, those of a text's first token above all
 * (arXiv:2402.17762), and leave the rest of their group with a bit or two. The rounding remainder of such a group
 * goes into a group of its own behind the row and is multiplied too: 4 % more groups, and the error of SmolLM2's logits
 * after a chat template is 0.12 (root mean square) instead of 0.69.
 *
 * An infinity or a NaN must not become a finite int8: the bits of its magnitude are the largest integers, so the maximum,
 * taken over bits, finds it, the scale is infinite or NaN, and so is every product with the group.
 */
#include "kernels.h"
#include "simd.h"

#include <math.h>

void LEVEL(rms_norm)(const float *x, const float *weight, float eps, int n, int n_padded, float *out) {
    vf first = vf_zero(), second = vf_zero();
    int i = 0;
    for (; i + 32 <= n_padded; i += 32) {
        vf a = vf_load(x + i), b = vf_load(x + i + 16);
        first = vf_fma(a, a, first);
        second = vf_fma(b, b, second);
    }
    if (i < n_padded) first = vf_fma(vf_load(x + i), vf_load(x + i), first);
    vf factor = vf_set1(1.0f / sqrtf(vf_sum(vf_add(first, second)) / (float)n + eps));
    for (i = 0; i < n_padded; i += 16) vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), factor), vf_load(weight + i)));
}

/* Least ratio of a group's largest element to the row's root mean square for which its remainder is kept. */
static const float COARSE = 8.0f;

static float group_to_int8(const float *x, struct group8 *out) {
    vf a = vf_load(x), b = vf_load(x + 16);
    float largest = bits_float((uint32_t)vi_reduce_max(vi_max(vi_magnitude(a), vi_magnitude(b))));
    /* Below this 127 / largest would overflow; such a group is as good as zero. */
    vf inverse = vf_set1(largest < 1e-36f ? 0.0f : 127.0f / largest);
    vi qa = vi_from_float(vf_mul(a, inverse)), qb = vi_from_float(vf_mul(b, inverse));
    vi_store_s8(out->q, qa);
    vi_store_s8(out->q + 16, qb);
    int32_t sum = 0;
    /* Of the stored values: conversions of a NaN saturate. */
    if (largest < INFINITY) sum = vi_sum(vi_add(qa, qb));
    out->scale = largest / 127.0f;
    out->scaled_sum = out->scale * (float)sum;
    out->minus128sum = -128 * sum;
    out->remainder = 0;
    return largest;
}

static void to_int8(const float *x, int groups, struct group8 *out) {
    vf squares = vf_zero();
    for (int i = 0; i < groups * GROUP; i += 16) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    float coarse = COARSE * sqrtf(vf_sum(squares) / (float)(groups * GROUP));
    int count = 0;
    for (int g = 0; g < groups; g++, x += GROUP) {
        float largest = group_to_int8(x, &out[g]);
        /* Not where not finite: no comparison with a NaN is true. */
        if (!(largest > coarse && largest < INFINITY) || count == max_remainders(groups)) continue;
        float left[GROUP];
        for (int i = 0; i < GROUP; i++) left[i] = x[i] - (float)out[g].q[i] * out[g].scale;
        group_to_int8(left, &out[groups + count]);
        out[groups + count++].remainder = g;
    }
    out[0].remainder = count;
}

void LEVEL(quantize)(int format, const float *x, int n, uint8_t *out) {
    if (format <= W8) {
        to_int8(x, n / GROUP, (struct group8 *)out);
    } else if (format == W16) {
        int pairs = (n + 1) / 2;
        for (int i = 0; i < pairs; i++) {
            uint16_t pair[2] = {float_to_bf16(x[2 * i]), 2 * i + 1 < n ? float_to_bf16(x[2 * i + 1]) : 0};
            memcpy(out + 4 * i, pair, 4);
        }
    } else {
        memcpy(out, x, (size_t)n * 4);
    }
}
