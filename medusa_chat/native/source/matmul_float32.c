/* float32 weights: one fused multiply-add an input. */
#include "tiles.h"

static size_t row_bytes(int inputs) { return mc_row_stride((size_t)inputs * sizeof(float)); }

static void prepare(int inputs, int count, const float *x, size_t x_stride, uint8_t *prepared) {
    for (int row = 0; row < count; row++) {
        memcpy(prepared + (size_t)row * row_bytes(inputs), x + (size_t)row * x_stride,
               (size_t)inputs * sizeof(float));
    }
}

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    floats sum[MC_ROWS][2];
    MC_UNROLL for (int row = 0; row < rows; row++) {
        MC_UNROLL for (int group = 0; group < groups; group++) {
            sum[row][group] = floats_splat(0);
        }
    }
    for (size_t input = 0; input < (size_t)work->inputs; input++) {
        floats weights[2];
        tile_prefetch(work, groups, input);
        MC_UNROLL for (int group = 0; group < groups; group++) {
            weights[group] = floats_load(work->weights + group * work->group_bytes + input * 64);
        }
        MC_UNROLL for (int row = 0; row < rows; row++) {
            floats x = floats_splat(((const float *)(work->rows + row * work->row_bytes))[input]);
            MC_UNROLL for (int group = 0; group < groups; group++) {
                sum[row][group] = floats_fma(weights[group], x, sum[row][group]);
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

const mc_kernel MC_VARIANT(mc_float32) = {row_bytes, prepare, matmul};
