/* bfloat16 products in tiles of AMX. */
#ifndef MEDUSA_AMX_BFLOAT16_H
#define MEDUSA_AMX_BFLOAT16_H

#include "amx.h"

enum { STEP_INPUTS = 32, SUMS_STRIDE = MC_TILE * sizeof(float) };

MC_INLINE amx_step step_of(const mc_work *work, const mc_work *second) {
    size_t first = (size_t)(work->start / STEP_INPUTS);
    const uint8_t *weights = work->weights + first * MC_AMX_BYTES;
    size_t skipped = first * MC_AMX_WIDTH;
    return (amx_step){{work->rows + skipped, second->rows + skipped},
                      work->row_bytes,
                      {weights, weights + work->group_bytes}};
}

MC_INLINE void add_step(const int parts) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (parts > 1) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

MC_INLINE void fetch(const mc_work *work, size_t step) {
    for (size_t line = 0; line < MC_AMX_ROWS; line++) {
        tile_prefetch(work, 2, step * MC_AMX_ROWS + line);
    }
}

/* The inputs from `start` to `end` of the rows of `work`, and of `second` as a second part. */
MC_INLINE void add_inputs(const mc_work *work, const mc_work *second, int fetches,
                          const int parts) {
    amx_step step = step_of(work, second);
    int inputs = work->end - work->start, steps = inputs / STEP_INPUTS;
    for (int number = 0; number < steps; number++) {
        if (fetches) fetch(work, (size_t)number);
        amx_load(&step, parts);
        add_step(parts);
        amx_advance(&step);
    }
    if (inputs % STEP_INPUTS) {
        amx_load_rest(&step, work->count, mc_steps(inputs % STEP_INPUTS, 2), parts);
        add_step(parts);
    }
}

static void put(const mc_work *work) {
    amx_put(work, 0, floats_splat(1));
    amx_put(work, 1, floats_splat(1));
}

/* Goes on from the sums of the inputs before `start`; there is none for the first. */
#define LOAD_SUMS(work, first, second)                                           \
    if ((work)->start) {                                                         \
        _tile_loadd(first, (work)->carried, SUMS_STRIDE);                        \
        _tile_loadd(second, (work)->carried + MC_GROUP, SUMS_STRIDE);            \
    } else {                                                                     \
        _tile_zero(first);                                                       \
        _tile_zero(second);                                                      \
    }
#define STORE_SUMS(work, first, second)                           \
    _tile_stored(first, (work)->carried, SUMS_STRIDE);            \
    _tile_stored(second, (work)->carried + MC_GROUP, SUMS_STRIDE);

static void one_part(const mc_work *work, int row) {
    mc_work part = amx_part(work, row);
    LOAD_SUMS(&part, 0, 1)
    add_inputs(&part, &part, row == 0, 1);
    STORE_SUMS(&part, 0, 1)
    put(&part);
}

static void two_parts(const mc_work *work, int row) {
    mc_work first = amx_part(work, row), second = amx_part(work, row + MC_AMX_ROWS);
    LOAD_SUMS(&first, 0, 1)
    LOAD_SUMS(&second, 2, 3)
    add_inputs(&first, &second, row == 0, 2);
    STORE_SUMS(&first, 0, 1)
    STORE_SUMS(&second, 2, 3)
    put(&first);
    put(&second);
}

static void tile_of_rows(const mc_work *work) {
    for (int row = 0; row < work->count; row += 2 * MC_AMX_ROWS) {
        if (work->count - row > MC_AMX_ROWS) two_parts(work, row);
        else one_part(work, row);
    }
}

/* Up to 32 rows meet the weights once: there is nothing to be gained by parts. */
MC_DEFINE_AMX_MATMUL(tile_of_rows, 2 * MC_AMX_ROWS)

#endif
