/* Rows rounded to bfloat16, for the kernels whose weights are (or become) bfloat16. */
#ifndef MEDUSA_BFLOAT16_ROWS_H
#define MEDUSA_BFLOAT16_ROWS_H

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

/* The two inputs of a step of a row. */
MC_INLINE inputs2 row_inputs(const mc_work *work, int row, size_t step) {
    const uint8_t *start = work->rows + (size_t)row * work->row_bytes;
    return inputs2_load((const mc_bfloat16_input *)start + step * 2);
}

#endif
