/* bfloat16 weights and activations, summed in float32: in vectors the even input of a pair, then
 * the odd; in tiles of AMX the even inputs of 32, and then the odd ones. */
#include "tiles.h"

static size_t row_bytes(int inputs) {
    return mc_row_stride((size_t)mc_steps(inputs, 2) * 2 * sizeof(mc_bfloat16_input));
}

/* Without bfloat16 products the rounded values are kept as floats. */
MC_INLINE mc_bfloat16_input rounded_input(float value) {
#if defined(MC_AVX512)
    return mc_to_bfloat16(value);
#else
    return mc_from_bfloat16(mc_to_bfloat16(value));
#endif
}

static void prepare(int inputs, int count, const float *x, size_t x_stride, uint8_t *prepared) {
    for (int row = 0; row < count; row++) {
        const float *restrict from = x + (size_t)row * x_stride;
        uint8_t *bytes = prepared + (size_t)row * row_bytes(inputs);
        mc_bfloat16_input *restrict to = (mc_bfloat16_input *)bytes;
        for (int input = 0; input < inputs; input++) {
            to[input] = rounded_input(from[input]);
        }
        if (inputs % 2) {
            to[inputs] = 0;
        }
    }
}

#if defined(__AMX_TILE__)
#include "amx_bfloat16.h"

MC_DEFINE_KERNEL_OF(MC_VARIANT(mc_bfloat16), amx_matmul)
#else
/* The two inputs of a step of a row. */
MC_INLINE inputs2 row_inputs(const mc_work *work, int row, size_t step) {
    const uint8_t *start = work->rows + (size_t)row * work->row_bytes;
    return inputs2_load((const mc_bfloat16_input *)start + step * 2);
}

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
#endif
