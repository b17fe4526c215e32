/* nf4 weights meet the same rows as int8.
 *
 * The values of nf4 are bytes here: times 112 they lie nearest to whole numbers, within 0.004 of
 * bitsandbytes' own, a twentieth of the distance between two of them. */
#include "byte_rows.h"

enum { CHUNKS = MC_BLOCK / 8, LEVELS = 112 };

static nf4_table table_of_values(void) {
    uint8_t values[16];
    for (int code = 0; code < 16; code++) {
        values[code] = (uint8_t)(nearest(mc_nf4_values[code] * LEVELS) + MC_CODE_OFFSET);
    }
    return nf4_table_of(values);
}

/* Four of a chunk's eight inputs: the first ones, or those in the high half of each byte. */
MC_INLINE void add_half(const mc_work *work, const int rows, const int groups, nf4_table table,
                        const uint8_t *chunk, size_t input, const int high,
                        ints sum[MC_ROWS][2]) {
    codes weights[2];
    MC_EACH_GROUP(groups, {
        weights[group] = nf4_load(table, chunk + group * work->group_bytes, high);
    })
    MC_EACH_ROW(rows, {
        const uint8_t *start = work->rows + (size_t)row * work->row_bytes;
        inputs4 x = inputs4_load(start + (input + 4 * high) * sizeof(mc_int8_input));
        MC_EACH_GROUP(groups, { sum[row][group] = ints_dot(sum[row][group], weights[group], x); })
    })
}

/* Sums of one block, before its scales. */
MC_INLINE void add_block(const mc_work *work, const int rows, const int groups, nf4_table table,
                         size_t block, ints sum[MC_ROWS][2]) {
    size_t line = (block - (size_t)work->start / MC_BLOCK) * (CHUNKS + 1);
    const uint8_t *chunks = work->weights + block * MC_NF4_BLOCK_BYTES + MC_NF4_CHUNK;
    MC_EACH_ROW(rows, {
        MC_EACH_GROUP(groups, {
            sum[row][group] = ints_splat(row_block(work, row, block)->start);
        })
    })
    tile_prefetch(work, groups, line);
    for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
        const uint8_t *from = chunks + chunk * MC_NF4_CHUNK;
        size_t input = block * MC_BLOCK + chunk * 8;
        tile_prefetch(work, groups, line + chunk + 1);
        add_half(work, rows, groups, table, from, input, 0, sum);
        add_half(work, rows, groups, table, from, input, 1, sum);
    }
}

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    nf4_table table = table_of_values();
    floats unit = floats_splat(1.0f / LEVELS);
    tile_clear_totals(work, rows, groups);
    size_t last_block = (size_t)(work->end / MC_BLOCK);
    for (size_t block = (size_t)(work->start / MC_BLOCK); block < last_block; block++) {
        const uint8_t *start = work->weights + block * MC_NF4_BLOCK_BYTES;
        ints sum[MC_ROWS][2];
        add_block(work, rows, groups, table, block, sum);
        MC_EACH_GROUP(groups, {
            floats absmax = floats_load(start + group * work->group_bytes);
            floats weight = floats_multiply(absmax, unit);
            MC_EACH_ROW(rows, {
                floats own = floats_splat(row_block(work, row, block)->scale);
                floats scale = floats_multiply(weight, own);
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

#if defined(__AMX_TILE__)
#include "amx_bytes.h"

enum { PART_BLOCKS = MC_CACHED_BYTES / (2 * MC_NF4_BLOCK_BYTES) };

/* The bytes of a group's part, as int8 has them, and its scales. */
static void unpack(const mc_work *work, int group, uint8_t *bytes, float *scales) {
    nf4_table table = table_of_values();
    size_t first = (size_t)(work->start / MC_BLOCK), last = (size_t)(work->end / MC_BLOCK);
    const uint8_t *from = work->weights + (size_t)group * work->group_bytes;
    for (size_t block = first; block < last; block++) {
        const uint8_t *start = from + block * MC_NF4_BLOCK_BYTES;
        floats weight = floats_multiply(floats_load(start), floats_splat(1.0f / LEVELS));
        floats_store(scales + (block - first) * MC_GROUP, weight);
        for (size_t half = 0; half < 2 * CHUNKS; half++) {
            const uint8_t *chunk = start + MC_NF4_CHUNK + half / 2 * MC_NF4_CHUNK;
            codes weights = nf4_load(table, chunk, half % 2);
            _mm512_storeu_si512(bytes + half * MC_AMX_WIDTH, weights);
        }
        bytes += MC_AMX_BYTES;
    }
    amx_settle();
}

static void many_rows(const mc_work *work) {
    uint8_t bytes[2][PART_BLOCKS * MC_AMX_BYTES] __attribute__((aligned(64)));
    float scales[2][PART_BLOCKS * MC_GROUP];
    for (int group = 0; group < 2; group++) unpack(work, group, bytes[group], scales[group]);
    add_rows(work, (amx_weights[2]){{bytes[0], scales[0]}, {bytes[1], scales[1]}}, 1);
    amx_put(work, 0, floats_splat(1));
    amx_put(work, 1, floats_splat(1));
}

MC_DEFINE_AMX_KERNEL(MC_VARIANT(mc_nf4), MC_ROWS)
#else
MC_DEFINE_KERNEL(MC_VARIANT(mc_nf4))
#endif
