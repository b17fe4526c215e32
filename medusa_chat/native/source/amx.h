/* Tiles of AMX: C, 16 rows of 16 sums, += A, 64 bytes of each row, times B, weights as they are
 * packed. A processor has eight. */
#ifndef MEDUSA_AMX_H
#define MEDUSA_AMX_H

#include <immintrin.h>

#include "tiles.h"

enum { MC_AMX_ROWS = 16, MC_AMX_WIDTH = 64, MC_AMX_BYTES = MC_AMX_ROWS * MC_AMX_WIDTH };

/* Tiles 0 to 3 are C, 4 and 5 are A, 6 and 7 are B. */
enum { MC_AMX_TILES = 8, MC_AMX_FIRST_B = 6 };

typedef struct {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_shapes;

/* C and A get as many rows as a call has, up to 16. */
static void amx_begin(int rows) {
    amx_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < MC_AMX_TILES; tile++) {
        int all = tile >= MC_AMX_FIRST_B || rows > MC_AMX_ROWS;
        shapes.row_bytes[tile] = MC_AMX_WIDTH;
        shapes.rows[tile] = all ? MC_AMX_ROWS : (uint8_t)rows;
    }
    _tile_loadconfig(&shapes);
}

/* The rows of a tile, from `row` on. Of more than 16 rows, the last tile reads 16 as well:
 * mc_rows_bytes has room for those that are not there. */
MC_INLINE mc_work amx_part(const mc_work *work, int row) {
    mc_work part = *work;
    int left = work->count - row;
    part.count = left < MC_AMX_ROWS ? left : MC_AMX_ROWS;
    part.rows += (size_t)row * work->row_bytes;
    part.y += (size_t)row * work->y_stride;
    part.carried += row * MC_TILE;
    return part;
}

/* 64 bytes of 16 rows, or of two times 16, and the weights of two groups that they meet. */
typedef struct {
    const uint8_t *rows[2];
    size_t row_bytes;
    const uint8_t *weights[2];
} amx_step;

MC_INLINE void amx_advance(amx_step *step) {
    for (int i = 0; i < 2; i++) {
        step->rows[i] += MC_AMX_WIDTH;
        step->weights[i] += MC_AMX_BYTES;
    }
}

MC_INLINE void amx_load(const amx_step *step, const int parts) {
    _tile_loadd(6, step->weights[0], MC_AMX_WIDTH);
    _tile_loadd(7, step->weights[1], MC_AMX_WIDTH);
    _tile_loadd(4, step->rows[0], step->row_bytes);
    if (parts > 1) _tile_loadd(5, step->rows[1], step->row_bytes);
}

/* `lines` lines of `bytes` bytes, with zeros behind them up to a whole tile. */
static void amx_pad(uint8_t *to, const uint8_t *from, int lines, size_t stride, size_t bytes) {
    memset(to, 0, MC_AMX_BYTES);
    for (int line = 0; line < lines; line++) {
        memcpy(to + line * MC_AMX_WIDTH, from + (size_t)line * stride, bytes);
    }
}

/* gcc does not know that tiles read and write memory: what was stored before is there. */
MC_INLINE void amx_settle(void) { __asm__ volatile("" ::: "memory"); }

/* Loads the last inputs, fewer than 64 bytes: they fill only some lines of the weights. */
static void amx_load_rest(const amx_step *step, int rows, int lines, const int parts) {
    uint8_t padded[4][MC_AMX_BYTES];
    amx_step rest = {{padded[0], padded[1]}, MC_AMX_WIDTH, {padded[2], padded[3]}};
    for (int i = 0; i < 2; i++) {
        if (i < parts) amx_pad(padded[i], step->rows[i], rows, step->row_bytes, (size_t)lines * 4);
        amx_pad(padded[2 + i], step->weights[i], lines, MC_AMX_WIDTH, MC_AMX_WIDTH);
    }
    amx_settle();
    amx_load(&rest, parts);
}

/* Once all inputs are summed: y = total * scale + bias, of a group's outputs. */
MC_INLINE void amx_put(const mc_work *work, int group, floats scale) {
    if (work->end < work->inputs) return;
    floats bias = tile_bias(work, group);
    for (int row = 0; row < work->count; row++) {
        floats value = floats_multiply(floats_load(tile_total(work, row, group)), scale);
        tile_store(work, row, group, floats_add(value, bias));
    }
}

/* Defines `amx_matmul` of a tile function for up to 64 rows. */
#define MC_DEFINE_AMX_MATMUL(tile_of, whole)                                                    \
    static void amx_matmul(const mc_matrix *matrix, const uint8_t *prepared, int rows,          \
                           int first, int last, int following, float *y, size_t y_stride) {     \
        mc_call call = {matrix, prepared, row_bytes(matrix->inputs), rows, first, last,         \
                        following, y, y_stride, tile_of, MC_CARRIED_ROWS, whole};               \
        amx_begin(rows);                                                                        \
        run_tiles(&call);                                                                       \
        _tile_release();                                                                        \
    }

#endif
