/* bfloat16 weights and activations, summed in float32: the even input of a pair, then the odd. */
#include "bfloat16_rows.h"

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    floats sum[MC_ROWS][2];
    MC_UNROLL for (int row = 0; row < rows; row++) {
        MC_UNROLL for (int group = 0; group < groups; group++) {
            sum[row][group] = floats_splat(0);
        }
    }
    size_t steps = (size_t)mc_steps(work->inputs, 2);
    for (size_t step = 0; step < steps; step++) {
        pairs weights[2];
        tile_prefetch(work, groups, step);
        MC_UNROLL for (int group = 0; group < groups; group++) {
            weights[group] = pairs_load(work->weights + group * work->group_bytes + step * 64);
        }
        MC_UNROLL for (int row = 0; row < rows; row++) {
            inputs2 x = row_inputs(work, row, step);
            MC_UNROLL for (int group = 0; group < groups; group++) {
                sum[row][group] = floats_dot(sum[row][group], weights[group], x);
            }
        }
    }
    MC_UNROLL for (int group = 0; group < groups; group++) {
        floats bias = tile_bias(work, group);
        MC_UNROLL for (int row = 0; row < rows; row++) {
            tile_store(work, row, group, floats_add(sum[row][group], bias));
        }
    }
}

MC_DEFINE_TILES

static void matmul(const mc_matrix *matrix, const uint8_t *prepared, int rows, int first, int last,
                   float *y, size_t y_stride) {
    run_tiles(matrix, prepared, row_bytes(matrix->inputs), rows, first, last, y, y_stride, tiles);
}

const mc_kernel MC_VARIANT(mc_bfloat16) = {row_bytes, prepare, matmul};
