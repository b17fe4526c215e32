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
    MC_EACH_ROW(rows, {
        MC_EACH_GROUP(groups, {
            sum[row][group] = tile_begin(work, row, group);
        })
    })
    size_t start = (size_t)work->start;
    for (size_t input = start; input < (size_t)work->end; input++) {
        floats weights[2];
        tile_prefetch(work, groups, input - start);
        MC_EACH_GROUP(groups, {
            weights[group] = floats_load(work->weights + group * work->group_bytes + input * 64);
        })
        MC_EACH_ROW(rows, {
            floats x = floats_splat(((const float *)(work->rows + row * work->row_bytes))[input]);
            MC_EACH_GROUP(groups, {
                sum[row][group] = floats_fma(weights[group], x, sum[row][group]);
            })
        })
    }
    if (tile_carries(work, rows, groups, sum)) {
        return;
    }
    MC_EACH_GROUP(groups, {
        floats bias = tile_bias(work, group);
        MC_EACH_ROW(rows, {
            tile_store(work, row, group, floats_add(sum[row][group], bias));
        })
    })
}

MC_DEFINE_KERNEL(MC_VARIANT(mc_float32))
