/* nf4 weights, unpacked to bfloat16 as they are used; each block of 64 inputs has its absmax. */
#include "bfloat16_rows.h"

enum { CHUNKS = MC_NF4_BLOCK / 8, STEPS_OF_CHUNK = 4 };

/* Sums of one block, before its absmax. first_step counts pairs of inputs. */
MC_INLINE void add_chunk(const mc_work *work, const int rows, const int groups, nf4_table table,
                         const uint8_t *chunk, size_t first_step, floats sum[MC_ROWS][2]) {
    MC_UNROLL for (int group = 0; group < groups; group++) {
        pairs weights[STEPS_OF_CHUNK];
        nf4_unpack(table, chunk + group * work->group_bytes, weights);
        MC_UNROLL for (int step = 0; step < STEPS_OF_CHUNK; step++) {
            MC_UNROLL for (int row = 0; row < rows; row++) {
                inputs2 x = row_inputs(work, row, first_step + step);
                sum[row][group] = floats_dot(sum[row][group], weights[step], x);
            }
        }
    }
}

MC_INLINE void compute_tile(const mc_work *work, const int rows, const int groups) {
    uint16_t values[16];
    for (int code = 0; code < 16; code++) {
        values[code] = mc_to_bfloat16(mc_nf4_values[code]);
    }
    nf4_table table = nf4_table_of(values);
    floats total[MC_ROWS][2];
    MC_UNROLL for (int row = 0; row < rows; row++) {
        MC_UNROLL for (int group = 0; group < groups; group++) {
            total[row][group] = floats_splat(0);
        }
    }
    size_t blocks = (size_t)(work->inputs / MC_NF4_BLOCK);
    for (size_t block = 0; block < blocks; block++) {
        const uint8_t *start = work->weights + block * MC_NF4_BLOCK_BYTES;
        floats sum[MC_ROWS][2];
        MC_UNROLL for (int row = 0; row < rows; row++) {
            MC_UNROLL for (int group = 0; group < groups; group++) {
                sum[row][group] = floats_splat(0);
            }
        }
        tile_prefetch(work, groups, block * (CHUNKS + 1));
        for (size_t chunk = 0; chunk < CHUNKS; chunk++) {
            tile_prefetch(work, groups, block * (CHUNKS + 1) + chunk + 1);
            add_chunk(work, rows, groups, table, start + (chunk + 1) * MC_NF4_CHUNK,
                      (block * CHUNKS + chunk) * STEPS_OF_CHUNK, sum);
        }
        MC_UNROLL for (int group = 0; group < groups; group++) {
            floats absmax = floats_load(start + group * work->group_bytes);
            MC_UNROLL for (int row = 0; row < rows; row++) {
                total[row][group] = floats_fma(sum[row][group], absmax, total[row][group]);
            }
        }
    }
    MC_UNROLL for (int group = 0; group < groups; group++) {
        floats bias = tile_bias(work, group);
        MC_UNROLL for (int row = 0; row < rows; row++) {
            tile_store(work, row, group, floats_add(total[row][group], bias));
        }
    }
}

MC_DEFINE_TILES

static void matmul(const mc_matrix *matrix, const uint8_t *prepared, int rows, int first, int last,
                   float *y, size_t y_stride) {
    run_tiles(matrix, prepared, row_bytes(matrix->inputs), rows, first, last, y, y_stride, tiles);
}

const mc_kernel MC_VARIANT(mc_nf4) = {row_bytes, prepare, matmul};
