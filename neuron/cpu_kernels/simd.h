/* Sixteen float lanes under one set of names, at the level that this file is compiled for (NEURON_LEVEL).
 *
 * Every operation is written once in these and compiled once a level, in a static library with that level's flags;
 * LEVEL(name) is the symbol's name there. vf_max(a, b) and vf_min(a, b) give b if either is not a number, at all levels.
 */
#ifndef NEURON_SIMD_H
#define NEURON_SIMD_H

#include "formats.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define PASTE(name, level) name##_##level
#define EXPAND(name, level) PASTE(name, level)
#define LEVEL(name) EXPAND(name, NEURON_LEVEL)

#if defined(__AVX512VNNI__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

/* exp(x) to 2 ulp for |x| < 87, clamped beyond: 2^n times a polynomial on [-1/2, 1/2] (Cephes' expf). */
INLINE vf vf_exp(vf x) {
    x = vf_max(vf_set1(-87.0f), vf_min(vf_set1(88.0f), x));
    vf n = vf_round(vf_mul(x, vf_set1(1.44269504f)));
    x = vf_fma(n, vf_set1(-0.693359375f), x);
    x = vf_fma(n, vf_set1(2.12194440e-4f), x);
    vf p = vf_set1(1.9875691500e-4f);
    p = vf_fma(p, x, vf_set1(1.3981999507e-3f));
    p = vf_fma(p, x, vf_set1(8.3334519073e-3f));
    p = vf_fma(p, x, vf_set1(4.1665795894e-2f));
    p = vf_fma(p, x, vf_set1(1.6666665459e-1f));
    p = vf_fma(p, x, vf_set1(5.0000001201e-1f));
    p = vf_fma(p, vf_mul(x, x), vf_add(x, vf_set1(1.0f)));
    return vf_power2(p, n);
}

#endif
