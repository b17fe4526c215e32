/* Products of byte_rows.h's rows in tiles of AMX, up to 32 rows by 32 outputs at a time. The sums of
 * a block are the integers that vectors sum, and are scaled and added in the same order: so the
 * results are the same, bit for bit. */
#ifndef MEDUSA_AMX_BYTES_H
#define MEDUSA_AMX_BYTES_H

#include "amx.h"
#include "byte_rows.h"

/* A group's weights from `start` to `end`, as int8 has them. */
typedef struct {
    const uint8_t *bytes;
    const float *scales; /* 16 for each block, or NULL for ones */
} amx_weights;

typedef int32_t amx_sums[2][2][MC_AMX_ROWS * MC_GROUP]; /* of two parts of the rows, two groups */

/* The sums of a block of inputs, of which `lines` times four exist. */
MC_INLINE void sum_block(const amx_step *step, int rows, int lines, amx_sums sums,
                         const int parts) {
    if (lines < MC_AMX_ROWS) amx_load_rest(step, rows, lines, parts);
    else amx_load(step, parts);
    _tile_zero(0);
    _tile_zero(1);
    if (parts > 1) _tile_zero(2);
    if (parts > 1) _tile_zero(3);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (parts > 1) _tile_dpbsud(2, 5, 6);
    if (parts > 1) _tile_dpbsud(3, 5, 7);
    _tile_stored(0, sums[0][0], MC_AMX_WIDTH);
    _tile_stored(1, sums[0][1], MC_AMX_WIDTH);
    if (parts > 1) _tile_stored(2, sums[1][0], MC_AMX_WIDTH);
    if (parts > 1) _tile_stored(3, sums[1][1], MC_AMX_WIDTH);
    amx_settle();
}

/* Adds a block's sums to the totals of a group, of up to 16 rows. */
MC_INLINE void add_sums(const mc_work *work, int group, size_t block, const int32_t *sums,
                        floats weight, const int scaled, const int rows) {
    const block_of_row *own = row_block(work, 0, block);
    for (int row = 0; row < rows; row++) {
        ints sum = ints_add(ints_load(sums + row * MC_GROUP), ints_splat(own->start));
        floats scale = floats_splat(own->scale);
        if (scaled) scale = floats_multiply(weight, scale);
        tile_add(work, row, group, floats_of_ints(sum), scale);
        own = (const block_of_row *)((const uint8_t *)own + work->row_bytes);
    }
}

/* The same of both groups; most often all 16 rows are there. */
MC_INLINE void add_part(const mc_work *work, size_t block, int32_t sums[2][MC_AMX_ROWS * MC_GROUP],
                        const floats weight[2], const int scaled) {
    if (work->count == MC_AMX_ROWS) {
        add_sums(work, 0, block, sums[0], weight[0], scaled, MC_AMX_ROWS);
        add_sums(work, 1, block, sums[1], weight[1], scaled, MC_AMX_ROWS);
    } else {
        add_sums(work, 0, block, sums[0], weight[0], scaled, work->count);
        add_sums(work, 1, block, sums[1], weight[1], scaled, work->count);
    }
}

/* Adds the inputs from `start` to `end` to the totals of up to 32 rows. Meanwhile `lines` lines of
 * each group are fetched for each block. */
MC_INLINE void add_inputs(const mc_work *work, const amx_weights weights[2], int lines,
                          const int scaled, const int parts) {
    mc_work low = amx_part(work, 0), high = amx_part(work, parts > 1 ? MC_AMX_ROWS : 0);
    size_t first = (size_t)(work->start / MC_BLOCK), last = (size_t)mc_steps(work->end, MC_BLOCK);
    amx_step step = {{low.rows + first * MC_BLOCK, high.rows + first * MC_BLOCK},
                     work->row_bytes,
                     {weights[0].bytes, weights[1].bytes}};
    amx_sums sums __attribute__((aligned(64)));
    const uint8_t *ahead = work->ahead;
    for (size_t block = first; block < last; block++, amx_advance(&step)) {
        size_t place = (block - first) * MC_GROUP;
        int left = mc_steps(work->inputs - (int)block * MC_BLOCK, 4);
        floats weight[2] = {floats_splat(1), floats_splat(1)};
        if (scaled) weight[0] = floats_load(weights[0].scales + place);
        if (scaled) weight[1] = floats_load(weights[1].scales + place);
        sum_block(&step, low.count, left < MC_AMX_ROWS ? left : MC_AMX_ROWS, sums, parts);
        MC_NOT_UNROLLED
        for (int line = 0; line < lines; line++, ahead += work->ahead_step) {
            __builtin_prefetch(ahead, 0, 2);
            __builtin_prefetch(ahead + work->group_bytes, 0, 2);
        }
        add_part(&low, block, sums[0], weight, scaled);
        if (parts > 1) add_part(&high, block, sums[1], weight, scaled);
    }
}

/* The same of all rows, which share the fetching of weights wanted next. */
MC_INLINE void add_rows(const mc_work *work, const amx_weights weights[2], const int scaled) {
    int most = 2 * MC_AMX_ROWS, passes = mc_steps(work->count, most);
    int lines = mc_steps(MC_AMX_ROWS, passes);
    size_t fetched = (size_t)(mc_steps(work->end - work->start, MC_BLOCK) * lines);
    if (!work->start) memset(work->carried, 0, (size_t)(work->count * MC_TILE) * sizeof(float));
    for (int pass = 0; pass < passes; pass++) {
        mc_work some = amx_part(work, pass * most);
        some.count = work->count - pass * most;
        some.ahead += (size_t)pass * fetched * work->ahead_step;
        if (some.count > MC_AMX_ROWS) add_inputs(&some, weights, lines, scaled, 2);
        else add_inputs(&some, weights, lines, scaled, 1);
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
