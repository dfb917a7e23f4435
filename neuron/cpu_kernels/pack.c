/* Packing of matrices at load, on all threads: for most formats a move of dwords, at the speed of memory.
 *
 *     Q4_0  d (q - 8)          -> W4, m = -8 d        exact
 *     Q4_1  d q + m            -> W4                  exact
 *     Q5_0  d (q - 16)         -> W8                  exact
 *     Q8_0  d q                -> W8                  exact
 *     Q4_K  d sc q - dmin sm   -> W4 a sub-block      d sc and dmin sm rounded to float16: 2^-11 of the scale
 *     IQ4_NL  d t[q]           -> IQ4                 exact
 *     IQ4_XS  d sc t[q]        -> IQ4 a sub-block     d sc rounded to float16
 *     MXFP4  2^e t[q]          -> FP4                 exact
 *     Q5_1, K, anything else   -> W8                  rounded to 255 levels of each 32 columns' largest
 *     float                    -> W16, W32 (or W8)
 *
 * Block layouts of the K kinds: ggml's k-quants, as documented with GGUF. Reference: gguf.quants.dequantize.
 */
#include "pack.h"

#include <math.h>

enum { SUPER = 256 };

static size_t block_size(int kind, int *elements) {
    switch (kind) {
    case KIND_F32: *elements = 1; return 4;
    case KIND_F16: *elements = 1; return 2;
    case KIND_BF16: *elements = 1; return 2;
    case KIND_Q4_0: *elements = GROUP; return 18;
    case KIND_Q4_1: *elements = GROUP; return 20;
    case KIND_Q5_0: *elements = GROUP; return 22;
    case KIND_Q5_1: *elements = GROUP; return 24;
    case KIND_Q8_0: *elements = GROUP; return 34;
    case KIND_Q2_K: *elements = SUPER; return 84;
    case KIND_Q3_K: *elements = SUPER; return 110;
    case KIND_Q4_K: *elements = SUPER; return 144;
    case KIND_Q5_K: *elements = SUPER; return 176;
    case KIND_Q6_K: *elements = SUPER; return 210;
    case KIND_IQ4_NL: *elements = GROUP; return 18;
    case KIND_IQ4_XS: *elements = SUPER; return 136;
    case KIND_MXFP4: *elements = GROUP; return 17;
    default: *elements = 1; return 0;
    }
}

size_t row_bytes(int kind, int columns) {
    int elements;
    size_t bytes = block_size(kind, &elements);
    return columns % elements == 0 ? (size_t)(columns / elements) * bytes : 0;
}

int can_pack(int kind, int format) {
    int elements;
    if (block_size(kind, &elements) == 0) return 0;
    switch (format) {
    case W4: return kind == KIND_Q4_0 || kind == KIND_Q4_1 || kind == KIND_Q4_K;
    case IQ4: return kind == KIND_IQ4_NL || kind == KIND_IQ4_XS;
    case FP4: return kind == KIND_MXFP4;
    default: return 1;
    }
}

static uint16_t load_u16(const uint8_t *from) { return (uint16_t)(from[0] | from[1] << 8); }

/* Six-bit scale and offset of sub-block j of a Q4_K block, packed into twelve bytes. */
static void sub_scales(const uint8_t *packed, int j, int *scale, int *offset) {
    if (j < 4) {
        *scale = packed[j] & 63;
        *offset = packed[j + 4] & 63;
    } else {
        *scale = (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4;
        *offset = packed[j + 4] >> 4 | (packed[j] >> 6) << 4;
    }
}

/* The codes (in the order of W4), scale and offset of group g of a row of a 4-bit kind. */
static void read_w4(int kind, const uint8_t *row, int g, uint8_t codes[16], float *d, float *m) {
    if (kind == KIND_Q4_0) {
        const uint8_t *block = row + 18 * (size_t)g;
        *d = half_to_float(load_u16(block));
        *m = -8.0f * *d;
        memcpy(codes, block + 2, 16);
    } else if (kind == KIND_Q4_1) {
        const uint8_t *block = row + 20 * (size_t)g;
        *d = half_to_float(load_u16(block));
        *m = half_to_float(load_u16(block + 2));
        memcpy(codes, block + 4, 16);
    } else {
        const uint8_t *block = row + 144 * (size_t)(g / 8);
        const uint8_t *bytes = block + 16 + 32 * (g % 8 / 2);
        int scale, offset, shift = g % 2 * 4;
        sub_scales(block + 4, g % 8, &scale, &offset);
        *d = half_to_float(load_u16(block)) * (float)scale;
        *m = -half_to_float(load_u16(block + 2)) * (float)offset;
        for (int i = 0; i < 16; i++)
            codes[i] = (uint8_t)((bytes[i] >> shift & 15) | (bytes[i + 16] >> shift & 15) << 4);
    }
}

/* The codes (in the order of W4) of group g of a row of a kind with a table, and their scale. */
static const uint8_t *read_coded(int kind, const uint8_t *row, int g, float *d) {
    if (kind == KIND_IQ4_NL) {
        const uint8_t *block = row + 18 * (size_t)g;
        *d = half_to_float(load_u16(block));
        return block + 2;
    }
    if (kind == KIND_IQ4_XS) {
        const uint8_t *block = row + 136 * (size_t)(g / 8);
        int j = g % 8;
        int scale = (block[4 + j / 2] >> j % 2 * 4 & 15) | (load_u16(block + 2) >> 2 * j & 3) << 4;
        *d = half_to_float(load_u16(block)) * (float)(scale - 32);
        return block + 8 + 16 * j;
    }
    /* A power of two, halved for the table; those below 2^-126 are subnormal. */
    const uint8_t *block = row + 17 * (size_t)g;
    *d = bits_float(block[0] < 2 ? 0x200000u << block[0] : (uint32_t)(block[0] - 1) << 23);
    return block + 1;
}

/* The scale and the codes of group g of a row of a kind that is d times a whole number. */
static uint16_t read_codes(int kind, const uint8_t *row, int g, int8_t codes[GROUP]) {
    if (kind == KIND_Q8_0) {
        const uint8_t *block = row + 34 * (size_t)g;
        memcpy(codes, block + 2, GROUP);
        return load_u16(block);
    }
    const uint8_t *block = row + 22 * (size_t)g;
    uint32_t fifth = load_u32(block + 2);
    for (int i = 0; i < 16; i++) {
        codes[i] = (int8_t)(((block[6 + i] & 15) | (fifth >> i & 1) << 4) - 16);
        codes[i + 16] = (int8_t)((block[6 + i] >> 4 | (fifth >> (i + 16) & 1) << 4) - 16);
    }
    return load_u16(block);
}

/* Group g of a row of a K kind without a form of its own, as float32. */
static void read_k(int kind, const uint8_t *row, int g, float out[GROUP]) {
    int j = g % 8, shift = 2 * (j % 4); /* of the low twos, which lie in planes over half a block */
    if (kind == KIND_Q2_K) {
        const uint8_t *block = row + 84 * (size_t)(g / 8), *twos = block + 16 + 32 * (j / 4);
        float d = half_to_float(load_u16(block + 80)), dmin = half_to_float(load_u16(block + 82));
        for (int i = 0; i < GROUP; i++) {
            int scale = block[2 * j + i / 16];
            out[i] = d * (float)(scale & 15) * (float)(twos[i] >> shift & 3) - dmin * (float)(scale >> 4);
        }
    } else if (kind == KIND_Q3_K) {
        const uint8_t *block = row + 110 * (size_t)(g / 8), *twos = block + 32 + 32 * (j / 4), *scales = block + 96;
        float d = half_to_float(load_u16(block + 108));
        for (int i = 0; i < GROUP; i++) {
            int s = 2 * j + i / 16;
            int scale = (scales[s % 8] >> s / 8 * 4 & 15) | (scales[8 + s % 4] >> 2 * (s / 4) & 3) << 4;
            int code = (twos[i] >> shift & 3) | (block[i] >> j & 1) << 2;
            out[i] = d * (float)(scale - 32) * (float)(code - 4);
        }
    } else if (kind == KIND_Q5_K) {
        const uint8_t *block = row + 176 * (size_t)(g / 8), *fours = block + 48 + 32 * (j / 2);
        int scale, offset;
        sub_scales(block + 4, j, &scale, &offset);
        float d = half_to_float(load_u16(block)) * (float)scale;
        float m = half_to_float(load_u16(block + 2)) * (float)offset;
        for (int i = 0; i < GROUP; i++)
            out[i] = d * (float)((fours[i] >> j % 2 * 4 & 15) | (block[16 + i] >> j & 1) << 4) - m;
    } else {
        const uint8_t *block = row + 210 * (size_t)(g / 8);
        int half = j / 4, quarter = j % 4;
        const uint8_t *low = block + 64 * half + 32 * (quarter % 2), *high = block + 128 + 32 * half;
        const uint8_t *scales = block + 192 + 8 * half + 2 * quarter;
        float d = half_to_float(load_u16(block + 208));
        for (int i = 0; i < GROUP; i++) {
            int code = (low[i] >> (quarter / 2 * 4) & 15) | (high[i] >> shift & 3) << 4;
            out[i] = d * (float)(int8_t)scales[i / 16] * (float)(code - 32);
        }
    }
}

/* Group g of a row as float32; beyond the row's end zeros. */
static void read_floats(int kind, const uint8_t *row, int g, int columns, float out[GROUP]) {
    int count = columns - g * GROUP < GROUP ? columns - g * GROUP : GROUP;
    for (int i = count; i < GROUP; i++) out[i] = 0;
    if (kind == KIND_F32) {
        memcpy(out, row + 4 * (size_t)g * GROUP, 4 * (size_t)count);
    } else if (kind == KIND_F16) {
        for (int i = 0; i < count; i++) out[i] = half_to_float(load_u16(row + 2 * ((size_t)g * GROUP + (size_t)i)));
    } else if (kind == KIND_BF16) {
        for (int i = 0; i < count; i++) out[i] = bf16_to_float(load_u16(row + 2 * ((size_t)g * GROUP + (size_t)i)));
    } else if (kind == KIND_Q8_0 || kind == KIND_Q5_0) {
        int8_t codes[GROUP];
        float d = half_to_float(read_codes(kind, row, g, codes));
        for (int i = 0; i < GROUP; i++) out[i] = d * (float)codes[i];
    } else if (kind == KIND_Q2_K || kind == KIND_Q3_K || kind == KIND_Q5_K || kind == KIND_Q6_K) {
        read_k(kind, row, g, out);
    } else if (kind == KIND_Q5_1) {
        const uint8_t *block = row + 24 * (size_t)g;
        float d = half_to_float(load_u16(block)), m = half_to_float(load_u16(block + 2));
        uint32_t fifth = load_u32(block + 4);
        for (int i = 0; i < GROUP; i++) {
            uint32_t four = i < 16 ? block[8 + i] & 15 : block[8 + i - 16] >> 4;
            out[i] = d * (float)(four | (fifth >> i & 1) << 4) + m;
        }
    } else if (kind == KIND_IQ4_NL || kind == KIND_IQ4_XS || kind == KIND_MXFP4) {
        const uint8_t *table = code_table(kind == KIND_MXFP4 ? FP4 : IQ4);
        float d;
        const uint8_t *codes = read_coded(kind, row, g, &d);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(table[codes[i] & 15] - 128);
            out[i + 16] = d * (float)(table[codes[i] >> 4] - 128);
        }
    } else {
        uint8_t codes[16];
        float d, m;
        read_w4(kind, row, g, codes, &d, &m);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(codes[i] & 15) + m;
            out[i + 16] = d * (float)(codes[i] >> 4) + m;
        }
    }
}

static void write_w4(int kind, const uint8_t *row, int g, int lane, uint8_t *group) {
    uint8_t codes[16];
    float scale, offset;
    read_w4(kind, row, g, codes, &scale, &offset);
    /* Exact for Q4_0 and Q4_1; a product of scales in Q4_K loses up to 2^-11 of itself. */
    uint16_t d = float_to_half(scale), m = float_to_half(offset);
    for (int j = 0; j < 4; j++) memcpy(group + 64 * j + 4 * lane, codes + 4 * j, 4);
    memcpy(group + 256 + 2 * lane, &d, 2);
    memcpy(group + 288 + 2 * lane, &m, 2);
}

static void write_coded(int kind, int format, const uint8_t *row, int g, int lane, uint8_t *group) {
    float scale;
    const uint8_t *codes = read_coded(kind, row, g, &scale);
    uint16_t d = format == FP4 ? float_to_bf16(scale) : float_to_half(scale);
    for (int j = 0; j < 4; j++) memcpy(group + 64 * j + 4 * lane, codes + 4 * j, 4);
    memcpy(group + 256 + 2 * lane, &d, 2);
}

static void write_w8(int kind, const uint8_t *row, int g, int columns, int lane, uint8_t *group) {
    uint8_t codes[GROUP];
    uint16_t d;
    if (kind == KIND_Q8_0 || kind == KIND_Q5_0) {
        int8_t own[GROUP];
        d = read_codes(kind, row, g, own);
        for (int i = 0; i < GROUP; i++) codes[i] = (uint8_t)own[i] ^ 0x80;
    } else {
        float values[GROUP], largest = 0;
        read_floats(kind, row, g, columns, values);
        for (int i = 0; i < GROUP; i++) largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
        d = float_to_half(largest / 127.0f);
        float inverse = half_to_float(d) > 0 ? 1.0f / half_to_float(d) : 0.0f;
        for (int i = 0; i < GROUP; i++) {
            float code = values[i] * inverse;
            code = code > -127.0f ? code : -127.0f;
            code = code < 127.0f ? code : 127.0f;
            /* Adding 1.5 2^23 leaves the rounded number in the low bits; rintf and fminf would be calls. */
            codes[i] = (uint8_t)(float_bits(code + 0x1.8p23f) + 128);
        }
    }
    for (int j = 0; j < 8; j++) memcpy(group + 64 * j + 4 * lane, codes + 4 * j, 4);
    memcpy(group + 512 + 2 * lane, &d, 2);
}

void pack_blocks(const struct packing *p, int first_block, int end_block) {
    int groups = (p->columns + GROUP - 1) / GROUP;
    size_t bytes = block_bytes(p->format, p->columns);
    for (int block = first_block; block < end_block; block++) {
        uint8_t *to = p->to + (size_t)block * p->to_stride;
        int lanes = p->rows - block * BLOCK_ROWS < BLOCK_ROWS ? p->rows - block * BLOCK_ROWS : BLOCK_ROWS;
        if (lanes < BLOCK_ROWS || p->format >= W16) memset(to, 0, bytes);
        for (int lane = 0; lane < lanes; lane++) {
            const uint8_t *row = p->from + (size_t)(block * BLOCK_ROWS + lane) * p->row_bytes;
            if (p->kind == KIND_BF16 && p->format == W16) { /* unchanged: pairs of columns, a lane apart */
                for (int i = 0; i < p->columns / 2; i++) memcpy(to + 64 * (size_t)i + 4 * lane, row + 4 * (size_t)i, 4);
                if (p->columns % 2) memcpy(to + 64 * (size_t)(p->columns / 2) + 4 * lane, row + 2 * (p->columns - 1), 2);
                continue;
            }
            for (int g = 0; g < groups; g++) {
                uint8_t *group = to + (size_t)g * (size_t)group_bytes(p->format);
                if (p->format == W4) {
                    write_w4(p->kind, row, g, lane, group);
                } else if (p->format < W8) {
                    write_coded(p->kind, p->format, row, g, lane, group);
                } else if (p->format == W8) {
                    write_w8(p->kind, row, g, p->columns, lane, group);
                } else {
                    float values[GROUP];
                    int count = p->columns - g * GROUP < GROUP ? p->columns - g * GROUP : GROUP;
                    read_floats(p->kind, row, g, p->columns, values);
                    for (int i = 0; i < count; i++) {
                        size_t column = (size_t)g * GROUP + (size_t)i;
                        uint16_t rounded = float_to_bf16(values[i]);
                        if (p->format == W16)
                            memcpy(to + 64 * (column / 2) + 4 * lane + 2 * (column % 2), &rounded, 2);
                        else
                            memcpy(to + 64 * column + 4 * lane, &values[i], 4);
                    }
                }
            }
        }
    }
}

void unpack_row(const struct matrix *matrix, int row, float *out) {
    const uint8_t *block = matrix->data + (size_t)(row / BLOCK_ROWS) * block_bytes(matrix->format, matrix->columns);
    int lane = row % BLOCK_ROWS;
    if (matrix->format >= W16) {
        for (int i = 0; i < matrix->columns; i++)
            out[i] = matrix->format == W16 ? bf16_to_float(load_u16(block + 64 * (i / 2) + 4 * lane + 2 * (i % 2)))
                                           : bits_float(load_u32(block + 64 * (size_t)i + 4 * lane));
        return;
    }
    for (int g = 0; g < matrix->columns / GROUP; g++, out += GROUP) {
        const uint8_t *group = block + (size_t)g * (size_t)group_bytes(matrix->format);
        if (matrix->format == W4) {
            float d = half_to_float(load_u16(group + 256 + 2 * lane)), m = half_to_float(load_u16(group + 288 + 2 * lane));
            for (int i = 0; i < 16; i++) {
                int code = group[64 * (i / 4) + 4 * lane + i % 4];
                out[i] = d * (float)(code & 15) + m;
                out[i + 16] = d * (float)(code >> 4) + m;
            }
        } else if (matrix->format < W8) {
            const uint8_t *table = code_table(matrix->format);
            uint16_t scale = load_u16(group + 256 + 2 * lane);
            float d = matrix->format == FP4 ? bf16_to_float(scale) : half_to_float(scale);
            for (int i = 0; i < 16; i++) {
                int code = group[64 * (i / 4) + 4 * lane + i % 4];
                out[i] = d * (float)(table[code & 15] - 128);
                out[i + 16] = d * (float)(table[code >> 4] - 128);
            }
        } else {
            float d = half_to_float(load_u16(group + 512 + 2 * lane));
            for (int i = 0; i < GROUP; i++) out[i] = d * (float)(group[64 * (i / 4) + 4 * lane + i % 4] - 128);
        }
    }
}
