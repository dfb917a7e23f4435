/* Products of bfloat16 on AMX's tiles of 16 rows of 64 bytes; a part of matmul.c.
 *
 * W16 is what a tile of weights holds: 16 pairs of columns of a block of 16 rows. A tile of activations is their rows as they
 * are. A thread sets its tiles for a call and gives them back. Each sum is one chain over its row's columns, in whatever
 * company, so all products of bfloat16 go this way.
 */
#include <immintrin.h>

enum { MATRIX_ROWS = 16, MATRIX_BLOCKS = 4, PAIRS = 16 };

/* Tiles: sums from 0, activations and weights, and these again where fewer columns are left. The intrinsics of gcc 12 want
 * literals, and do not tell the compiler which memory they read. */
#define X_TILE 4
#define W_TILE 5
#define LAST_X_TILE 6
#define LAST_W_TILE 7
INLINE void finish_stores(void) { __asm__ volatile("" ::: "memory"); }

/* Palette 1 of ldtilecfg. */
struct tiles {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

INLINE void set_tile(struct tiles *tiles, int tile, int rows, int row_bytes) {
    tiles->rows[tile] = (uint8_t)rows;
    tiles->row_bytes[tile] = (uint16_t)row_bytes;
}

/* One tile of weights of each block times the activations. */
#define ADD_PAIRS(block, x_tile, w_tile)                                          \
    if (block < num_blocks) {                                                     \
        prefetch(at + block * bytes, PAIRS * 64, into_l2);                        \
        _tile_loadd(w_tile, at + block * bytes, 64);                              \
        _tile_dpbf16ps(block, x_tile, w_tile);                                    \
    }
#define ADD_ALL_PAIRS(x_tile, w_tile)                                             \
    do {                                                                          \
        _tile_loadd(x_tile, x, x_stride);                                         \
        ADD_PAIRS(0, x_tile, w_tile)                                              \
        ADD_PAIRS(1, x_tile, w_tile)                                              \
        ADD_PAIRS(2, x_tile, w_tile)                                              \
        ADD_PAIRS(3, x_tile, w_tile)                                              \
    } while (0)

/* sums[block][row] of up to four blocks of bfloat16, whose chains of products hide each other's latency. */
static void matrix_pairs(const uint8_t *w, size_t bytes, int num_blocks, int groups, int into_l2, const uint8_t *x,
                         size_t x_stride, int num_rows, vf sums[][MATRIX_ROWS]) {
    struct tiles tiles = {.palette = 1};
    const uint8_t *at = w;
    int left = groups % PAIRS;
    for (int i = 0; i < MATRIX_BLOCKS; i++) set_tile(&tiles, i, num_rows, 64);
    set_tile(&tiles, X_TILE, num_rows, 64);
    set_tile(&tiles, W_TILE, PAIRS, 64);
    set_tile(&tiles, LAST_X_TILE, left > 0 ? num_rows : 0, 4 * left);
    set_tile(&tiles, LAST_W_TILE, left, left > 0 ? 64 : 0);
    finish_stores();
    _tile_loadconfig(&tiles); /* zeroes the sums */
    for (int i = 0; i < groups / PAIRS; i++, at += PAIRS * 64, x += 64) ADD_ALL_PAIRS(X_TILE, W_TILE);
    if (left > 0) ADD_ALL_PAIRS(LAST_X_TILE, LAST_W_TILE);
    _tile_stored(0, sums[0], 64);
    if (num_blocks > 1) _tile_stored(1, sums[1], 64);
    if (num_blocks > 2) _tile_stored(2, sums[2], 64);
    if (num_blocks > 3) _tile_stored(3, sums[3], 64);
    _tile_release();
}
