/* Products of byte_rows.h's rows in tiles of AMX. The sums of a block are the integers that vectors
 * sum, and are scaled and added in the same order: so the results are the same, bit for bit. */
#ifndef MEDUSA_AMX_BYTES_H
#define MEDUSA_AMX_BYTES_H

#include "amx.h"
#include "byte_rows.h"

#define MC_SIXTEEN_ROWS(...)                                                            \
    MC_EACH_ROW(8, __VA_ARGS__)                                                         \
    MC_ROW(8, 16, __VA_ARGS__) MC_ROW(9, 16, __VA_ARGS__) MC_ROW(10, 16, __VA_ARGS__)   \
    MC_ROW(11, 16, __VA_ARGS__) MC_ROW(12, 16, __VA_ARGS__) MC_ROW(13, 16, __VA_ARGS__) \
    MC_ROW(14, 16, __VA_ARGS__) MC_ROW(15, 16, __VA_ARGS__)

/* A group's weights from `start` to `end`, as int8 has them. */
typedef struct {
    const uint8_t *bytes;
    const float *scales; /* 16 for each block, or NULL for ones */
} amx_weights;

/* The last inputs, fewer than a block: they fill only some lines of the weights. */
static void load_rest(const mc_work *work, const uint8_t *rows, const uint8_t *weights) {
    uint8_t padded[2][MC_AMX_BYTES];
    int lines = mc_steps(work->inputs % MC_BLOCK, 4);
    amx_pad(padded[0], rows, work->count, work->row_bytes, (size_t)lines * 4);
    amx_pad(padded[1], weights, lines, MC_AMX_WIDTH, MC_AMX_WIDTH);
    amx_settle();
    _tile_loadd(4, padded[0], MC_AMX_WIDTH);
    _tile_loadd(6, padded[1], MC_AMX_WIDTH);
}

/* The sums of a block of inputs, [16, 16]. */
MC_INLINE void sum_block(const mc_work *work, int block, const uint8_t *weights, int32_t *sums) {
    const uint8_t *rows = work->rows + (size_t)block * MC_BLOCK;
    if ((block + 1) * MC_BLOCK > work->inputs) {
        load_rest(work, rows, weights);
    } else {
        _tile_loadd(4, rows, work->row_bytes);
        _tile_loadd(6, weights, MC_AMX_WIDTH);
    }
    _tile_zero(0);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, sums, MC_AMX_WIDTH);
}

/* Adds the inputs from `start` to `end` to the totals of 16 rows of the first group. */
static void add_inputs(const mc_work *work, const amx_weights *weights) {
    int32_t sums[MC_AMX_ROWS * MC_GROUP] __attribute__((aligned(64))) = {0};
    const block_of_row *own[MC_AMX_ROWS];
    floats total[MC_AMX_ROWS];
    int first = work->start / MC_BLOCK, last = mc_steps(work->end, MC_BLOCK);
    for (int row = 0; row < MC_AMX_ROWS; row++) {
        own[row] = row_block(work, row < work->count ? row : 0, 0);
    }
    MC_SIXTEEN_ROWS({
        total[row] = first ? floats_load(tile_total(work, row, 0)) : floats_splat(0);
    })
    for (int block = first; block < last; block++) {
        size_t place = (size_t)(block - first);
        floats weight = floats_splat(1);
        if (weights->scales) weight = floats_load(weights->scales + place * MC_GROUP);
        sum_block(work, block, weights->bytes + place * MC_AMX_BYTES, sums);
        MC_SIXTEEN_ROWS({
            tile_prefetch(work, 1, place * MC_AMX_ROWS + row);
            ints sum = ints_add(ints_load(sums + row * MC_GROUP),
                                ints_splat(own[row][block].start));
            floats scale = floats_multiply(weight, floats_splat(own[row][block].scale));
            total[row] = floats_fma(floats_of_ints(sum), scale, total[row]);
        })
    }
    MC_SIXTEEN_ROWS({ floats_store(tile_total(work, row, 0), total[row]); })
}

/* The same of all rows of a group; while the first ones pass, weights wanted next are fetched. */
static void add_rows(const mc_work *work, int group, const amx_weights *weights) {
    for (int row = 0; row < work->count; row += MC_AMX_ROWS) {
        mc_work part = amx_part(work, row);
        part.carried += group * MC_GROUP;
        part.ahead += (size_t)group * work->group_bytes;
        part.ahead_step = row == 0 ? work->ahead_step : 0;
        add_inputs(&part, weights);
    }
}

/* Vectors multiply up to MC_ROWS rows; `many_rows` more, all inputs at once for `whole` rows. */
#define MC_DEFINE_AMX_KERNEL(name, whole)                                                       \
    MC_DEFINE_MATMUL                                                                            \
    MC_DEFINE_AMX_MATMUL(many_rows, whole)                                                      \
    static void either(const mc_matrix *matrix, const uint8_t *prepared, int rows, int first,   \
                       int last, int following, float *y, size_t y_stride) {                    \
        (rows > MC_ROWS ? amx_matmul : matmul)(matrix, prepared, rows, first, last, following,  \
                                               y, y_stride);                                    \
    }                                                                                           \
    MC_DEFINE_KERNEL_OF(name, either)

#endif
