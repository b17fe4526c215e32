/* nf4 weights meet activations of 12 bits, a scale for each 64 of both.
 *
 * The values of nf4 are kept as 15-bit integers, closer to bitsandbytes' own than bfloat16 is. The
 * sums of a block are exact integers, and the largest one just fits: 64 * 16383 * 2047 < 2^31. */
#include "rounding.h"
#include "tiles.h"

enum {
    CHUNKS = MC_NF4_BLOCK / 8,
    STEPS_OF_CHUNK = 4,
    WEIGHT_LEVELS = 16383,
    INPUT_LEVELS = 2047,
};

static size_t input_bytes(int inputs) { return (size_t)inputs * sizeof(int16_t); }

/* Integers of all inputs, then a scale for each block. */
static size_t row_bytes(int inputs) {
    return mc_row_stride(input_bytes(inputs) + (size_t)(inputs / MC_NF4_BLOCK) * sizeof(float));
}

/* Rounds a block and returns the scale that also brings the weights back. */
static float prepare_block(const float *restrict x, int16_t *restrict to) {
    float most = magnitude(x, MC_NF4_BLOCK);
    if (most < MC_NEGLIGIBLE) {
        memset(to, 0, MC_NF4_BLOCK * sizeof *to);
        return 0;
    }
    float inverse = INPUT_LEVELS / most;
    for (int input = 0; input < MC_NF4_BLOCK; input++) {
        to[input] = (int16_t)nearest(x[input] * inverse);
    }
    return most / INPUT_LEVELS / WEIGHT_LEVELS;
}

static void prepare(int inputs, int count, const float *x, size_t x_stride, uint8_t *prepared) {
    for (int row = 0; row < count; row++) {
        const float *from = x + (size_t)row * x_stride;
        uint8_t *start = prepared + (size_t)row * row_bytes(inputs);
        float *scales = (float *)(start + input_bytes(inputs));
        for (int first = 0; first < inputs; first += MC_NF4_BLOCK) {
            scales[first / MC_NF4_BLOCK] = prepare_block(from + first, (int16_t *)start + first);
        }
    }
}

MC_INLINE words2 row_words(const mc_work *work, int row, size_t step) {
    const uint8_t *start = work->rows + (size_t)row * work->row_bytes;
    return words2_load((const int16_t *)start + step * 2);
}

MC_INLINE floats row_scale(const mc_work *work, int row, size_t block) {
    const uint8_t *start = work->rows + (size_t)row * work->row_bytes + input_bytes(work->inputs);
    return floats_splat(((const float *)start)[block]);
}

/* Two of a chunk's four pairs of inputs: 0 and 2, or 1 and 3. first_step counts pairs. */
MC_INLINE void add_pairs(const mc_work *work, const int rows, const int groups, nf4_table table,
                         const uint8_t *chunk, size_t first_step, const int odd,
                         ints sum[MC_ROWS][2]) {
    words weights[2][2];
    MC_EACH_GROUP(groups, {
        nf4_unpack(table, chunk + group * work->group_bytes, odd, weights[group]);
    })
    MC_EACH_ROW(rows, {
        words2 x = row_words(work, row, first_step + odd);
        words2 later = row_words(work, row, first_step + odd + 2);
        MC_EACH_GROUP(groups, {
            sum[row][group] = ints_dot_words(sum[row][group], weights[group][0], x);
            sum[row][group] = ints_dot_words(sum[row][group], weights[group][1], later);
        })
    })
}

/* Sums of one block, before its scales. */
MC_INLINE void add_block(const mc_work *work, const int rows, const int groups, nf4_table table,
                         size_t block, ints sum[MC_ROWS][2]) {
    size_t line = (block - (size_t)work->start / MC_NF4_BLOCK) * (CHUNKS + 1);
    const uint8_t *chunks = work->weights + block * MC_NF4_BLOCK_BYTES + MC_NF4_CHUNK;
    MC_EACH_ROW(rows, {
        MC_EACH_GROUP(groups, {
            sum[row][group] = ints_splat(0);
        })
    })
    tile_prefetch(work, groups, line);
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        const uint8_t *from = chunks + chunk * MC_NF4_CHUNK;
        size_t first_step = (block * CHUNKS + chunk) * STEPS_OF_CHUNK;
        tile_prefetch(work, groups, line + chunk + 1);
        add_pairs(work, rows, groups, table, from, first_step, 0, sum);
        add_pairs(work, rows, groups, table, from, first_step, 1, sum);
    }
}

static nf4_table table_of_values(void) {
    int16_t values[16];
    for (int code = 0; code < 16; code++) {
        values[code] = (int16_t)nearest(mc_nf4_values[code] * WEIGHT_LEVELS);
    }
    return nf4_table_of(values);
}

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    nf4_table table = table_of_values();
    tile_clear_totals(work, rows, groups);
    size_t last_block = (size_t)(work->end / MC_NF4_BLOCK);
    for (size_t block = (size_t)(work->start / MC_NF4_BLOCK); block < last_block; block++) {
        const uint8_t *start = work->weights + block * MC_NF4_BLOCK_BYTES;
        ints sum[MC_ROWS][2];
        add_block(work, rows, groups, table, block, sum);
        MC_EACH_GROUP(groups, {
            floats absmax = floats_load(start + group * work->group_bytes);
            MC_EACH_ROW(rows, {
                floats scale = floats_multiply(absmax, row_scale(work, row, block));
                tile_add(work, row, group, floats_of_ints(sum[row][group]), scale);
            })
        })
    }
    if (work->end < work->inputs) {
        return;
    }
    MC_EACH_GROUP(groups, {
        floats bias = tile_bias(work, group);
        MC_EACH_ROW(rows, {
            floats value = floats_load(tile_total(work, row, group));
            tile_store(work, row, group, floats_add(value, bias));
        })
    })
}

MC_DEFINE_KERNEL(MC_VARIANT(mc_nf4))
