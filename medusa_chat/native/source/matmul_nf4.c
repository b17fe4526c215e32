/* nf4 weights, unpacked to bfloat16 as they are used; each block of 64 inputs has its absmax. */
#include "bfloat16_rows.h"

enum { CHUNKS = MC_NF4_BLOCK / 8, STEPS_OF_CHUNK = 4 };

#define MC_ADD_STEP(step)                                                             \
    {                                                                                 \
        inputs2 x = row_inputs(work, row, first_step + step);                         \
        MC_EACH_GROUP(groups, {                                                       \
            sum[row][group] = floats_dot(sum[row][group], weights[group][step], x);   \
        })                                                                            \
    }

/* Sums of one block, before its absmax. first_step counts pairs of inputs. */
MC_INLINE void add_chunk(const mc_work *work, const int rows, const int groups, nf4_table table,
                         const uint8_t *chunk, size_t first_step, floats sum[MC_ROWS][2]) {
    pairs weights[2][STEPS_OF_CHUNK];
    MC_EACH_GROUP(groups, {
        nf4_unpack(table, chunk + group * work->group_bytes, weights[group]);
    })
    MC_EACH_ROW(rows, {
        MC_ADD_STEP(0)
        MC_ADD_STEP(1)
        MC_ADD_STEP(2)
        MC_ADD_STEP(3)
    })
}

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    uint16_t values[16];
    for (int code = 0; code < 16; code++) {
        values[code] = mc_to_bfloat16(mc_nf4_values[code]);
    }
    nf4_table table = nf4_table_of(values);
    tile_clear_totals(work, rows, groups);
    size_t first_block = (size_t)(work->start / MC_NF4_BLOCK);
    size_t last_block = (size_t)(work->end / MC_NF4_BLOCK);
    for (size_t block = first_block; block < last_block; block++) {
        size_t line = (block - first_block) * (CHUNKS + 1);
        const uint8_t *start = work->weights + block * MC_NF4_BLOCK_BYTES;
        floats sum[MC_ROWS][2];
        MC_EACH_ROW(rows, {
            MC_EACH_GROUP(groups, {
                sum[row][group] = floats_splat(0);
            })
        })
        tile_prefetch(work, groups, line);
        for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
            tile_prefetch(work, groups, line + chunk + 1);
            add_chunk(work, rows, groups, table, start + (chunk + 1) * MC_NF4_CHUNK,
                      (block * CHUNKS + chunk) * STEPS_OF_CHUNK, sum);
        }
        MC_EACH_GROUP(groups, {
            floats absmax = floats_load(start + group * work->group_bytes);
            MC_EACH_ROW(rows, {
                tile_add(work, row, group, sum[row][group], absmax);
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
