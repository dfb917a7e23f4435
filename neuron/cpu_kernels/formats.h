/* Layout of matrices and activations: the contract between packing, kernels and executor.
 *
 * A matrix [rows, columns] is cut into blocks of 16 rows, so that lane r of a 512-bit register (or of two of 256 bits)
 * is row r of the block and a dot product needs no horizontal sum. Within a block the columns run in groups, and the data of
 * a group (codes, scales) is contiguous, so that a pass over a matrix is one sequential read. Rows are padded to 16
 * with zeros. The bytes of one group of 16 rows:
 *
 *   W4   32 columns, 320 bytes: dword [j][r], j < 4, whose byte i holds column 4j + i in its low nibble and column
 *        16 + 4j + i in its high one (the order of GGUF's own blocks, so packing moves dwords); then 16 scales d and 16
 *        offsets m, float16: w = d q + m
 *   IQ4, FP4  32 columns, 288 bytes: codes as W4's, then 16 scales d, in IQ4 float16, in FP4 bfloat16, so that a power of
 *        two of float8 e8m0 is one: w = d t[q], with a table of 16 numbers
 *   W8   32 columns, 544 bytes: dword [j][r], j < 8, whose byte i holds column 4j + i plus 128; then 16 scales d,
 *        float16: w = d (q - 128)
 *   W16  2 columns, 64 bytes: bfloat16 pairs [r]
 *   W32  1 column, 64 bytes: float32 [r]
 */
#ifndef NEURON_FORMATS_H
#define NEURON_FORMATS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK_ROWS = 16, GROUP = 32, PAGE_TOKENS = 16 };

/* Up to W8 activations are int8. */
enum format { W4 = 0, IQ4 = 1, FP4 = 2, W8 = 3, W16 = 4, W32 = 5 };

static inline int group_bytes(int format) {
    switch (format) {
    case W4: return 320;
    case IQ4:
    case FP4: return 288;
    case W8: return 544;
    default: return 64;
    }
}

/* The numbers of 4-bit codes, plus 128 as in W8: ggml's kvalues_iq4nl, and float4 e2m1 in halves. */
static inline const uint8_t *code_table(int format) {
    static const uint8_t iq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
    static const uint8_t fp4[16] = {128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116};
    return format == IQ4 ? iq4 : fp4;
}

struct matrix {
    const uint8_t *data;
    const float *bias; /* [rows padded to 16], or NULL */
    int32_t rows;      /* padded to 16 */
    int32_t columns;
    int32_t format;
};

/* 32 activations as int8 with one scale, and their sum as the formats' offsets need it. A row's groups are followed by
 * the remainders of its coarse groups, see to_int8. */
struct group8 {
    int8_t q[GROUP];
    float scale;
    float scaled_sum;    /* scale * sum(q): times m of W4 */
    int32_t minus128sum; /* -128 * sum(q): undoes the offset of W8 and of tables */
    int32_t remainder;   /* of a row's first group: number of remainders; of a remainder: index of its group */
};

/* Most groups of a row that have a remainder. */
static inline int max_remainders(int groups) { return groups / 4 + 1; }

static inline int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

static inline int num_groups(int format, int columns) {
    switch (format) {
    case W16: return (columns + 1) / 2;
    case W32: return columns;
    default: return (columns + GROUP - 1) / GROUP;
    }
}

static inline size_t block_bytes(int format, int columns) {
    return (size_t)num_groups(format, columns) * (size_t)group_bytes(format);
}

/* Bytes of one row of activations in the form that a matrix of `format` multiplies, a multiple of 64. */
static inline size_t activation_bytes(int format, int columns) {
    int groups = num_groups(format, columns);
    size_t bytes = format <= W8    ? (size_t)(groups + max_remainders(groups)) * sizeof(struct group8)
                   : format == W16 ? (size_t)groups * 4
                                   : (size_t)columns * 4;
    return (bytes + 63) & ~(size_t)63;
}

static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t load_u32(const void *from) {
    uint32_t value;
    memcpy(&value, from, 4);
    return value;
}

static inline int32_t load_i32(const void *from) {
    int32_t value;
    memcpy(&value, from, 4);
    return value;
}

static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    /* Multiplying by 2^112 moves the exponent's bias, also of subnormals. */
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

/* Round to nearest, ties to even; beyond 65504 infinity. */
static inline uint16_t float_to_half(float value) {
    uint32_t bits = float_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) /* subnormal: adding 2^-1 leaves the rounded count of 2^-24 in the low bits */
        return (uint16_t)(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000));
    magnitude += 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (magnitude - 0x38000000) >> 13);
}

static inline float bf16_to_float(uint16_t half) { return bits_float((uint32_t)half << 16); }

static inline uint16_t float_to_bf16(float value) {
    uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40); /* stays a NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
