/* bfloat16 products in tiles of AMX. */
#ifndef MEDUSA_AMX_BFLOAT16_H
#define MEDUSA_AMX_BFLOAT16_H

#include "amx.h"

enum { STEP_INPUTS = 32 };

/* 64 bytes each of 16 rows, or of two times 16, and the weights of two groups that they meet. */
typedef struct {
    const uint8_t *rows[2];
    size_t row_bytes;
    const uint8_t *weights[2];
} amx_step;

MC_INLINE amx_step step_of(const mc_work *work, const mc_work *second) {
    return (amx_step){{work->rows, second->rows},
                      work->row_bytes,
                      {work->weights, work->weights + work->group_bytes}};
}

MC_INLINE void advance(amx_step *step) {
    for (int i = 0; i < 2; i++) {
        step->rows[i] += MC_AMX_WIDTH;
        step->weights[i] += MC_AMX_BYTES;
    }
}

MC_INLINE void load(const amx_step *step, const int parts) {
    _tile_loadd(6, step->weights[0], MC_AMX_WIDTH);
    _tile_loadd(7, step->weights[1], MC_AMX_WIDTH);
    _tile_loadd(4, step->rows[0], step->row_bytes);
    if (parts > 1) _tile_loadd(5, step->rows[1], step->row_bytes);
}

/* The last inputs, fewer than a step: they fill only some lines of the weights. */
static void load_rest(const amx_step *step, int rows, int lines, const int parts) {
    uint8_t padded[4][MC_AMX_BYTES];
    amx_step rest = {{padded[0], padded[1]}, MC_AMX_WIDTH, {padded[2], padded[3]}};
    for (int i = 0; i < 2; i++) {
        amx_pad(padded[i], step->rows[i], rows, step->row_bytes, (size_t)lines * 4);
        amx_pad(padded[2 + i], step->weights[i], lines, MC_AMX_WIDTH, MC_AMX_WIDTH);
    }
    amx_settle();
    load(&rest, parts);
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

/* All inputs of the rows of `work`, and of `second` where there are two parts. */
MC_INLINE void add_inputs(const mc_work *work, const mc_work *second, int fetches,
                          const int parts) {
    amx_step step = step_of(work, second);
    int steps = work->inputs / STEP_INPUTS, rest = work->inputs % STEP_INPUTS;
    for (int number = 0; number < steps; number++) {
        if (fetches) fetch(work, (size_t)number);
        load(&step, parts);
        add_step(parts);
        advance(&step);
    }
    if (rest) {
        load_rest(&step, work->count, mc_steps(rest, 2), parts);
        add_step(parts);
    }
}

static void put(const mc_work *work) {
    for (int group = 0; group < 2; group++) {
        floats bias = tile_bias(work, group);
        for (int row = 0; row < work->count; row++) {
            floats sum = floats_load(tile_total(work, row, group));
            tile_store(work, row, group, floats_add(sum, bias));
        }
    }
}

static void one_part(const mc_work *work, int row) {
    const size_t stride = MC_TILE * sizeof(float);
    mc_work part = amx_part(work, row);
    _tile_zero(0);
    _tile_zero(1);
    add_inputs(&part, &part, row == 0, 1);
    _tile_stored(0, part.carried, stride);
    _tile_stored(1, part.carried + MC_GROUP, stride);
    put(&part);
}

static void two_parts(const mc_work *work, int row) {
    const size_t stride = MC_TILE * sizeof(float);
    mc_work first = amx_part(work, row), second = amx_part(work, row + MC_AMX_ROWS);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    add_inputs(&first, &second, row == 0, 2);
    _tile_stored(0, first.carried, stride);
    _tile_stored(1, first.carried + MC_GROUP, stride);
    _tile_stored(2, second.carried, stride);
    _tile_stored(3, second.carried + MC_GROUP, stride);
    put(&first);
    put(&second);
}

static void tile_of_rows(const mc_work *work) {
    for (int row = 0; row < work->count; row += 2 * MC_AMX_ROWS) {
        if (work->count - row > MC_AMX_ROWS) two_parts(work, row);
        else one_part(work, row);
    }
}

MC_DEFINE_AMX_MATMUL(tile_of_rows, MC_CARRIED_ROWS)

#endif
