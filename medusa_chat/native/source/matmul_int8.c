/* int8 weights, a scale an output, meet activations of MC_ACTIVATION_BITS, a scale for each 64.
 *
 * Weights are stored as code + 128, because the dot products of x86 take unsigned and signed
 * bytes. A row therefore starts each block from -128 times the sum of its own activations. The
 * sums of a block are exact integers. */
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
    size_t blocks = (size_t)mc_steps(inputs, MC_INT8_BLOCK);
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
    for (int input = 0; input < MC_INT8_BLOCK; input += 4) {
        mc_int8_input second = codes[input + 1];
        codes[input + 1] = codes[input + 2];
        codes[input + 2] = second;
    }
}
#else
static void reorder(mc_int8_input *codes) { (void)codes; }
#endif

static block_of_row prepare_block(const float *x, int count, mc_int8_input *to) {
    mc_int8_input codes[MC_INT8_BLOCK] = {0};
    float most = magnitude(x, count);
    block_of_row result = {0, 0};
    if (!(most < MC_NEGLIGIBLE)) {
        int full = count == MC_INT8_BLOCK;
        float inverse = MC_LEVELS / most;
        int32_t sum = full ? round_block(x, MC_INT8_BLOCK, inverse, codes)
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
        for (int first = 0; first < inputs; first += MC_INT8_BLOCK) {
            int left = inputs - first < MC_INT8_BLOCK ? inputs - first : MC_INT8_BLOCK;
            blocks[first / MC_INT8_BLOCK] = prepare_block(from + first, left, codes + first);
        }
    }
}

MC_INLINE const block_of_row *row_block(const mc_work *work, int row, size_t block) {
    const uint8_t *start = work->rows + (size_t)row * work->row_bytes + input_bytes(work->inputs);
    return (const block_of_row *)start + block;
}

/* Sums of the steps of one block; a step is four inputs. */
MC_INLINE void add_steps(const mc_work *work, const int rows, const int groups, size_t first,
                         size_t last, ints sum[MC_ROWS][2]) {
    size_t step = first;
    MC_UNROLL_STEPS
    do {
        codes weights[2];
        tile_prefetch(work, groups, step - (size_t)work->start / 4);
        MC_EACH_GROUP(groups, {
            weights[group] = codes_load(work->weights + group * work->group_bytes + step * 64);
        })
        MC_EACH_ROW(rows, {
            const uint8_t *start = work->rows + (size_t)row * work->row_bytes;
            inputs4 x = inputs4_load(start + step * 4 * sizeof(mc_int8_input));
            MC_EACH_GROUP(groups, {
                sum[row][group] = ints_dot(sum[row][group], weights[group], x);
            })
        })
    } while (++step < last);
}

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    const size_t steps_of_block = MC_INT8_BLOCK / 4;
    size_t steps = (size_t)mc_steps(work->end, 4);
    tile_clear_totals(work, rows, groups);
    for (size_t first = (size_t)work->start / 4; first < steps; first += steps_of_block) {
        size_t block = first / steps_of_block;
        size_t last = first + steps_of_block < steps ? first + steps_of_block : steps;
        ints sum[MC_ROWS][2];
        MC_EACH_ROW(rows, {
            MC_EACH_GROUP(groups, {
                sum[row][group] = ints_splat(row_block(work, row, block)->start);
            })
        })
        add_steps(work, rows, groups, first, last, sum);
        MC_EACH_ROW(rows, {
            floats scale = floats_splat(row_block(work, row, block)->scale);
            MC_EACH_GROUP(groups, {
                tile_add(work, row, group, floats_of_ints(sum[row][group]), scale);
            })
        })
    }
    if (work->end < work->inputs) {
        return;
    }
    MC_EACH_GROUP(groups, {
        floats bias = tile_bias(work, group);
        floats scales = floats_load(work->scales + group * MC_GROUP);
        MC_EACH_ROW(rows, {
            floats value = floats_multiply(floats_load(tile_total(work, row, group)), scales);
            tile_store(work, row, group, floats_add(value, bias));
        })
    })
}

MC_DEFINE_KERNEL(MC_VARIANT(mc_int8))
