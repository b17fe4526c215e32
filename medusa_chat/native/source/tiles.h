/* Walks a matrix in tiles of outputs and rows; a kernel file brings the tile itself. */
#ifndef MEDUSA_TILES_H
#define MEDUSA_TILES_H

#include "dispatch.h"
#include "kernels.h"
#include "simd.h"

/* One tile: 32 outputs of up to MC_ROWS rows. */
typedef struct {
    const uint8_t *weights; /* two groups of 16 outputs */
    size_t group_bytes;
    int inputs;
    const uint8_t *rows; /* prepared */
    size_t row_bytes;
    const float *scales; /* of int8, from the first output on */
    const float *bias;   /* from the first output on, or NULL */
    int outputs;         /* that exist, from the first on */
    float *y;
    size_t y_stride;
    const uint8_t *ahead; /* weights wanted next */
    size_t ahead_step;    /* bytes to go ahead for each 64 bytes of a group */
} mc_work;

typedef void (*mc_tile_function)(const mc_work *work);

/* Weights wanted next while `line`, counted in 64 bytes of a group, is computed. */
MC_INLINE void tile_prefetch(const mc_work *work, int groups, size_t line) {
    const uint8_t *next = work->ahead + line * work->ahead_step;
    for (int group = 0; group < groups; group++) {
        __builtin_prefetch(next + group * work->group_bytes, 0, 2);
    }
}

MC_INLINE floats tile_bias(const mc_work *work, int group) {
    float bias[MC_GROUP] = {0};
    int count = work->outputs - group * MC_GROUP;
    if (work->bias && count > 0) {
        size_t lanes = count < MC_GROUP ? (size_t)count : MC_GROUP;
        memcpy(bias, work->bias + group * MC_GROUP, lanes * sizeof(float));
    }
    return floats_load(bias);
}

MC_INLINE void tile_store(const mc_work *work, int row, int group, floats value) {
    float *y = work->y + (size_t)row * work->y_stride + group * MC_GROUP;
    int count = work->outputs - group * MC_GROUP;
    if (count >= MC_GROUP) {
        floats_store(y, value);
    } else if (count > 0) {
        float lanes[MC_GROUP];
        floats_store(lanes, value);
        memcpy(y, lanes, (size_t)count * sizeof(float));
    }
}

/* The part of a tile that starts at its second group. */
MC_INLINE mc_work tile_second_group(const mc_work *work) {
    mc_work second = *work;
    second.weights += work->group_bytes;
    second.ahead += work->group_bytes;
    second.scales += MC_GROUP;
    second.bias = work->bias ? work->bias + MC_GROUP : NULL;
    second.outputs -= MC_GROUP;
    second.y += MC_GROUP;
    return second;
}

/* Defines a function for `count` rows: all 32 outputs at a time where the registers allow. */
#define MC_DEFINE_TILE(count)                                 \
    static void tile_of_##count(const mc_work *work) {        \
        if (count <= MC_WIDE_ROWS) {                          \
            compute_tile(work, count, 2);                     \
        } else {                                              \
            mc_work second = tile_second_group(work);         \
            compute_tile(work, count, 1);                     \
            compute_tile(&second, count, 1);                  \
        }                                                     \
    }

#if MC_ROWS == 8
#define MC_DEFINE_TILES                                                                       \
    MC_DEFINE_TILE(1) MC_DEFINE_TILE(2) MC_DEFINE_TILE(3) MC_DEFINE_TILE(4) MC_DEFINE_TILE(5) \
    MC_DEFINE_TILE(6) MC_DEFINE_TILE(7) MC_DEFINE_TILE(8)                                     \
    static const mc_tile_function tiles[] = {tile_of_1, tile_of_2, tile_of_3, tile_of_4,      \
                                             tile_of_5, tile_of_6, tile_of_7, tile_of_8};
#else
#define MC_DEFINE_TILES                                                     \
    MC_DEFINE_TILE(1) MC_DEFINE_TILE(2) MC_DEFINE_TILE(3) MC_DEFINE_TILE(4) \
    static const mc_tile_function tiles[] = {tile_of_1, tile_of_2, tile_of_3, tile_of_4};
#endif

enum {
    MC_NEAR = 2048,           /* bytes ahead in a group while one pass streams it */
    MC_WHOLE_TILE = 256 << 10 /* larger tiles are not fetched whole ahead of time */
};

/* With one pass over a tile, fetch a little ahead. With several, the later ones find the tile in
 * the cache, so spread the fetching of the next tile over all of them. */
MC_INLINE void look_ahead(mc_work *work, int pass, int passes, int is_last) {
    size_t lines = work->group_bytes / 64;
    if (passes == 1 || 2 * work->group_bytes > MC_WHOLE_TILE) {
        work->ahead = work->weights + MC_NEAR;
        work->ahead_step = 64;
    } else if (is_last) {
        work->ahead = work->weights;
        work->ahead_step = 0;
    } else {
        work->ahead_step = 64 / (size_t)passes;
        work->ahead = work->weights + 2 * work->group_bytes;
        work->ahead += (size_t)pass * lines * work->ahead_step;
    }
}

MC_INLINE void run_tiles(const mc_matrix *matrix, const uint8_t *prepared, size_t row_bytes,
                         int rows, int first, int last, float *y, size_t y_stride,
                         const mc_tile_function *functions) {
    size_t group_bytes = mc_group_bytes(matrix->format, matrix->inputs);
    size_t groups = (size_t)mc_padded_outputs(matrix->outputs) / MC_GROUP;
    const uint8_t *weights = matrix->packed;
    const float *scales = (const float *)(weights + groups * group_bytes);
    int passes = mc_steps(rows, MC_ROWS);
    for (int output = first; output < last; output += MC_TILE) {
        for (int pass = 0; pass < passes; pass++) {
            int row = pass * MC_ROWS;
            int count = rows - row < MC_ROWS ? rows - row : MC_ROWS;
            mc_work work = {
                .weights = weights + (size_t)(output / MC_GROUP) * group_bytes,
                .group_bytes = group_bytes,
                .inputs = matrix->inputs,
                .rows = prepared + (size_t)row * row_bytes,
                .row_bytes = row_bytes,
                .scales = scales + output,
                .bias = matrix->bias ? matrix->bias + output : NULL,
                .outputs = last - output,
                .y = y + (size_t)row * y_stride + output,
                .y_stride = y_stride,
            };
            look_ahead(&work, pass, passes, output + MC_TILE >= last);
            functions[count - 1](&work);
        }
    }
}

#endif
