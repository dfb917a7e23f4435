/* Packing of a checkpoint's rows into the blocks of formats.h. */
#ifndef NEURON_PACK_H
#define NEURON_PACK_H

#include "formats.h"

/* Storage of a matrix in a checkpoint: the ggml type numbers (GGUF) that are read here. */
enum kind {
    KIND_F32 = 0,
    KIND_F16 = 1,
    KIND_Q4_0 = 2,
    KIND_Q4_1 = 3,
    KIND_Q5_0 = 6,
    KIND_Q5_1 = 7,
    KIND_Q8_0 = 8,
    KIND_Q2_K = 10,
    KIND_Q3_K = 11,
    KIND_Q4_K = 12,
    KIND_Q5_K = 13,
    KIND_Q6_K = 14,
    KIND_IQ4_NL = 20,
    KIND_IQ4_XS = 23,
    KIND_BF16 = 30,
    KIND_MXFP4 = 39,
};

struct packing {
    const uint8_t *from; /* [rows] of row_bytes each */
    size_t row_bytes;
    int kind, rows, columns;
    uint8_t *to;          /* the first block */
    size_t to_stride;     /* bytes from block to block: two blocks' where gate and up alternate */
    int format;
};

/* Whether `kind` can be packed as `format`: those of 4 bits take only kinds whose codes they keep. */
int can_pack(int kind, int format);

/* Bytes of `columns` elements of `kind`; 0 for an unsupported kind, or columns that are not whole blocks of it. */
size_t row_bytes(int kind, int columns);

/* Pack blocks [first, end). Rows that are padding are zeros. */
void pack_blocks(const struct packing *packing, int first_block, int end_block);

/* Row `row` of a packed matrix as float32: out[columns]. */
void unpack_row(const struct matrix *matrix, int row, float *out);

#endif
