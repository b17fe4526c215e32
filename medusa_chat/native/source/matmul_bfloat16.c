/* bfloat16 weights and activations, summed in float32: the even input of a pair, then the odd. */
#include "bfloat16_rows.h"

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    floats sum[MC_ROWS][2];
    MC_EACH_ROW(rows, {
        MC_EACH_GROUP(groups, {
            sum[row][group] = tile_begin(work, row, group);
        })
    })
    size_t start = (size_t)work->start / 2;
    size_t end = (size_t)mc_steps(work->end, 2);
    for (size_t step = start; step < end; step++) {
        pairs weights[2];
        tile_prefetch(work, groups, step - start);
        MC_EACH_GROUP(groups, {
            weights[group] = pairs_load(work->weights + group * work->group_bytes + step * 64);
        })
        MC_EACH_ROW(rows, {
            inputs2 x = row_inputs(work, row, step);
            MC_EACH_GROUP(groups, {
                sum[row][group] = floats_dot(sum[row][group], weights[group], x);
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

MC_DEFINE_KERNEL(MC_VARIANT(mc_bfloat16))
