/* Walks a matrix in tiles of outputs and rows; a kernel file brings the tile itself. */
#ifndef MEDUSA_TILES_H
#define MEDUSA_TILES_H

/* gcc 12 gives a sum two registers here, one before and one behind each addition, and runs out of
 * them. Its other way of choosing registers does not. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-coalesce-vars")
#endif

#include "dispatch.h"
#include "kernels.h"
#include "simd.h"

/* One tile: 32 outputs of up to MC_ROWS rows, over the inputs from `start` to `end`. */
typedef struct {
    const uint8_t *weights; /* two groups of 16 outputs */
    size_t group_bytes;
    int inputs;
    int start;
    int end;
    const uint8_t *rows; /* prepared */
    size_t row_bytes;
    int count; /* of rows */
    const float *scales; /* of int8, from the first output on */
    const float *bias;   /* from the first output on, or NULL */
    int outputs;         /* that exist, from the first on */
    float *y;
    size_t y_stride;
    float *carried;       /* [count, MC_TILE] sums of the inputs before `start` */
    const uint8_t *ahead; /* weights wanted next */
    size_t ahead_step;    /* bytes to go ahead for each 64 bytes of a group */
} mc_work;

typedef void (*mc_tile_function)(const mc_work *work);

/* Fetch weights wanted next while `line` is computed: 64 bytes of a group, counted from `start`. */
MC_INLINE void tile_prefetch(const mc_work *work, int groups, size_t line) {
    const uint8_t *next = work->ahead + line * work->ahead_step;
    for (int group = 0; group < groups; group++) {
        __builtin_prefetch(next + group * work->group_bytes, 0, 2);
    }
}

MC_INLINE floats tile_begin(const mc_work *work, int row, int group) {
    if (work->start == 0) {
        return floats_splat(0);
    }
    return floats_load(work->carried + row * MC_TILE + group * MC_GROUP);
}

/* 1 where the sums are carried to the next part of the inputs, so that nothing is to be stored. */
MC_INLINE int tile_carries(const mc_work *work, int rows, int groups, floats sum[MC_ROWS][2]) {
    if (work->end == work->inputs) {
        return 0;
    }
    MC_EACH_ROW(rows, {
        MC_EACH_GROUP(groups, {
            floats_store(work->carried + row * MC_TILE + group * MC_GROUP, sum[row][group]);
        })
    })
    return 1;
}

/* The place of a sum that stays in memory, because the registers hold the sums of a block. */
MC_INLINE float *tile_total(const mc_work *work, int row, int group) {
    return work->carried + row * MC_TILE + group * MC_GROUP;
}

MC_INLINE void tile_clear_totals(const mc_work *work, int rows, int groups) {
    if (work->start) {
        return;
    }
    MC_EACH_ROW(rows, {
        MC_EACH_GROUP(groups, {
            floats_store(tile_total(work, row, group), floats_splat(0));
        })
    })
}

/* total += sum * scale */
MC_INLINE void tile_add(const mc_work *work, int row, int group, floats sum, floats scale) {
    float *total = tile_total(work, row, group);
    floats_store(total, floats_fma(sum, scale, floats_load(total)));
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
    second.carried += MC_GROUP;
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

/* Bytes of weights that several passes read one after another. */
#if defined(__AMX_TILE__)
enum { MC_CACHED_BYTES = 32 << 10 };
#else
enum { MC_CACHED_BYTES = 16 << 10 };
#endif

enum { MC_CARRIED_ROWS = 64 }; /* rows whose sums are carried along at most */

/* A call: all rows from `first` to `last`. */
typedef struct {
    const mc_matrix *matrix;
    const uint8_t *prepared;
    size_t row_bytes;
    int rows;
    int first;
    int last;
    int following; /* the output wanted after these, or -1 */
    float *y;
    size_t y_stride;
    mc_tile_function tile;
    int pass;  /* rows that `tile` takes at once */
    int whole; /* rows up to which all inputs are one part */
} mc_call;

/* Inputs of a part of a tile that stays in the first cache while all rows pass over it. */
MC_INLINE int inputs_of_part(const mc_call *call) {
    if (call->rows <= call->whole) {
        return call->matrix->inputs;
    }
    size_t block = 2 * mc_group_bytes(call->matrix->format, 64);
    return 64 * (int)(MC_CACHED_BYTES / block);
}

/* While a part is computed, the same part of the tile after it is fetched. Several passes over a
 * part share the fetching. */
MC_INLINE void look_ahead(mc_work *work, const mc_call *call, int output, int pass, int passes) {
    size_t here = mc_group_bytes(call->matrix->format, work->start);
    size_t lines = (mc_group_bytes(call->matrix->format, work->end) - here) / 64;
    int next = output + MC_TILE < call->last ? output + MC_TILE : call->following;
    ptrdiff_t groups = next < 0 ? 0 : (next - output) / MC_GROUP;
    work->ahead_step = next < 0 ? 0 : 64 / (size_t)passes;
    work->ahead = work->weights + groups * (ptrdiff_t)work->group_bytes + here
        + lines * work->ahead_step * (size_t)pass;
}

/* What a tile's work has in common for all rows and inputs. */
MC_INLINE mc_work work_of_tile(const mc_call *call, int output) {
    const mc_matrix *matrix = call->matrix;
    size_t group_bytes = mc_group_bytes(matrix->format, matrix->inputs);
    size_t groups = (size_t)mc_padded_outputs(matrix->outputs) / MC_GROUP;
    const uint8_t *packed = matrix->packed;
    return (mc_work){
        .weights = packed + (size_t)(output / MC_GROUP) * group_bytes,
        .group_bytes = group_bytes,
        .inputs = matrix->inputs,
        .row_bytes = call->row_bytes,
        .scales = (const float *)(packed + groups * group_bytes) + output,
        .bias = matrix->bias ? matrix->bias + output : NULL,
        .outputs = call->last - output,
        .y_stride = call->y_stride,
    };
}

/* Part by part of the inputs, rows `row` to `row + count - 1`. The order of a row's own additions
 * does not depend on the parts. */
MC_INLINE void run_tile(const mc_call *call, int output, int row, int count) {
    float carried[MC_CARRIED_ROWS * MC_TILE];
    mc_work work = work_of_tile(call, output);
    int passes = mc_steps(count, call->pass);
    int part = inputs_of_part(call);
    for (work.start = 0; work.start < work.inputs; work.start = work.end) {
        work.end = work.inputs - work.start < part ? work.inputs : work.start + part;
        for (int pass = 0; pass < passes; pass++) {
            int done = pass * call->pass;
            work.count = count - done < call->pass ? count - done : call->pass;
            work.rows = call->prepared + (size_t)(row + done) * call->row_bytes;
            work.y = call->y + (size_t)(row + done) * call->y_stride + output;
            work.carried = carried + done * MC_TILE;
            look_ahead(&work, call, output, pass, passes);
            call->tile(&work);
        }
    }
}

MC_INLINE void run_tiles(const mc_call *call) {
    for (int output = call->first; output < call->last; output += MC_TILE) {
        for (int row = 0; row < call->rows; row += MC_CARRIED_ROWS) {
            int left = call->rows - row;
            run_tile(call, output, row, left < MC_CARRIED_ROWS ? left : MC_CARRIED_ROWS);
        }
    }
}

/* Defines the kernel that the dispatcher calls; needs row_bytes, prepare and matmul. */
#define MC_DEFINE_KERNEL_OF(name, matmul) const mc_kernel name = {row_bytes, prepare, matmul};

/* Defines the matmul of a tile function that knows the number of its rows when it is compiled. */
#define MC_DEFINE_MATMUL                                                                         \
    MC_DEFINE_TILES                                                                              \
    static void few_rows(const mc_work *work) { tiles[work->count - 1](work); }                  \
    static void matmul(const mc_matrix *matrix, const uint8_t *prepared, int rows, int first,    \
                       int last, int following, float *y, size_t y_stride) {                     \
        mc_call call = {matrix, prepared, row_bytes(matrix->inputs), rows, first, last,          \
                        following, y, y_stride, few_rows, MC_ROWS, MC_ROWS};                     \
        run_tiles(&call);                                                                        \
    }

#define MC_DEFINE_KERNEL(name) \
    MC_DEFINE_MATMUL           \
    MC_DEFINE_KERNEL_OF(name, matmul)

#endif
