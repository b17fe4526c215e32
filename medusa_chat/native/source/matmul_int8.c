/* int8 weights, a scale an output. They are stored as code + 128. */
#include "byte_rows.h"

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
    const size_t steps_of_block = MC_BLOCK / 4;
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

#if defined(__AMX_TILE__)
#include "amx_bytes.h"

static void many_rows(const mc_work *work) {
    const uint8_t *part = work->weights + (size_t)(work->start / MC_BLOCK) * MC_AMX_BYTES;
    add_rows(work, (amx_weights[2]){{part, NULL}, {part + work->group_bytes, NULL}}, 0);
    amx_put(work, 0, floats_load(work->scales));
    amx_put(work, 1, floats_load(work->scales + MC_GROUP));
}

MC_DEFINE_AMX_KERNEL(MC_VARIANT(mc_int8), MC_CARRIED_ROWS)
#else
MC_DEFINE_KERNEL(MC_VARIANT(mc_int8))
#endif
