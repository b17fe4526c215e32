/* Rows as bytes, a scale for each 64: what meets weights of int8 and nf4.
 *
 * x86 multiplies unsigned bytes, the weights, with signed ones, the inputs: MC_CODE_OFFSET is added
 * to a weight. A row therefore starts each block from -MC_CODE_OFFSET times the sum of its own
 * inputs. The sums of a block are exact integers. */
#ifndef MEDUSA_BYTE_ROWS_H
#define MEDUSA_BYTE_ROWS_H

#include "rounding.h"
#include "tiles.h"

#define MC_LEVELS (MC_ACTIVATION_BITS == 16 ? 32512 : 127)

/* A block's scale and the sum to start from. */
typedef struct {
    float scale;
    int32_t start;
} block_of_row;

static size_t input_bytes(int inputs) {
    return (size_t)mc_steps(inputs, 8) * 8 * sizeof(mc_int8_input);
}

static size_t row_bytes(int inputs) {
    size_t blocks = (size_t)mc_steps(inputs, MC_BLOCK);
    return mc_row_stride(input_bytes(inputs) + blocks * sizeof(block_of_row));
}

MC_INLINE int32_t round_block(const float *restrict x, int count, float inverse,
                              mc_int8_input *restrict codes) {
    int32_t sum = 0;
    for (int input = 0; input < count; input++) {
        int32_t code = nearest(x[input] * inverse);
        codes[input] = (mc_int8_input)code;
        sum += code;
    }
    return sum;
}

#ifdef MC_INPUTS_IN_PAIRS
static void reorder(mc_int8_input *codes) {
    for (int input = 0; input < MC_BLOCK; input += 4) {
        mc_int8_input second = codes[input + 1];
        codes[input + 1] = codes[input + 2];
        codes[input + 2] = second;
    }
}
#else
static void reorder(mc_int8_input *codes) { (void)codes; }
#endif

static block_of_row prepare_block(const float *x, int count, mc_int8_input *to) {
    mc_int8_input codes[MC_BLOCK] = {0};
    float most = magnitude(x, count);
    block_of_row result = {0, 0};
    if (!(most < MC_NEGLIGIBLE)) {
        int full = count == MC_BLOCK;
        float inverse = MC_LEVELS / most;
        int32_t sum = full ? round_block(x, MC_BLOCK, inverse, codes)
                           : round_block(x, count, inverse, codes);
        result.scale = most / MC_LEVELS;
        result.start = -MC_CODE_OFFSET * sum;
        reorder(codes);
    }
    memcpy(to, codes, input_bytes(count));
    return result;
}

static void prepare(int inputs, int count, const float *x, size_t x_stride, uint8_t *prepared) {
    for (int row = 0; row < count; row++) {
        uint8_t *start = prepared + (size_t)row * row_bytes(inputs);
        mc_int8_input *codes = (mc_int8_input *)start;
        block_of_row *blocks = (block_of_row *)(start + input_bytes(inputs));
        const float *from = x + (size_t)row * x_stride;
        for (int first = 0; first < inputs; first += MC_BLOCK) {
            int left = inputs - first < MC_BLOCK ? inputs - first : MC_BLOCK;
            blocks[first / MC_BLOCK] = prepare_block(from + first, left, codes + first);
        }
    }
}

MC_INLINE const block_of_row *row_block(const mc_work *work, int row, size_t block) {
    const uint8_t *start = work->rows + (size_t)row * work->row_bytes + input_bytes(work->inputs);
    return (const block_of_row *)start + block;
}

#endif
