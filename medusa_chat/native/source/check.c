/* Compares the variant in use with the portable one, so that a processor on which a variant has
 * never been tried cannot give wrong text in silence. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "matmul.h"
#include "operations.h"

enum {
    ROWS = 9,
    INPUTS = 192,
    OUTPUTS = 48,
    SLOTS = 40,
    HEAD = 64,
    PRODUCTS = ROWS * OUTPUTS,
    DOTS = 3,
    MIXED = ROWS * HEAD,
    RESULTS = 4 * PRODUCTS + 3 * INPUTS + 2 * MIXED + 1 + DOTS,
};

/* Bytes for whatever a check lays out; the largest is a packed float32 matrix. */
enum { SPACE = 1 << 18 };

static const mc_format formats[] = {MC_FLOAT32, MC_BFLOAT16, MC_INT8, MC_NF4};

/* Numbers between -1 and 1 that depend on their place alone. */
static void fill(float *numbers, int count, int seed) {
    for (int i = 0; i < count; i++) {
        numbers[i] = sinf(0.37f * (float)(i + 1) + (float)seed) * cosf(1.3f * (float)i);
    }
}

static void multiply(mc_format format, uint8_t *space, float *products) {
    static float weights[OUTPUTS * INPUTS], x[ROWS * INPUTS];
    fill(weights, OUTPUTS * INPUTS, 1);
    fill(x, ROWS * INPUTS, 2);
    uint8_t *rows = space + SPACE / 2;
    memset(space, 0, SPACE);
    mc_pack(format, OUTPUTS, INPUTS, 0, OUTPUTS, weights, MC_FLOAT32, space);
    mc_prepare_rows(format, INPUTS, ROWS, 0, ROWS, x, INPUTS, rows);
    mc_matrix matrix = {format, OUTPUTS, INPUTS, space, NULL};
    mc_matmul(&matrix, rows, ROWS, 0, OUTPUTS, -1, products, OUTPUTS);
}

static void change_rows(const mc_operations *operations, float *changed) {
    static float x[INPUTS], y[INPUTS];
    fill(x, INPUTS, 3);
    fill(y, INPUTS, 4);
    operations->norm(x, y, INPUTS, 1e-5f, changed);
    memcpy(changed + INPUTS, x, sizeof x);
    operations->gate(MC_SILU, changed + INPUTS, y, INPUTS);
    memcpy(changed + 2 * INPUTS, x, sizeof x);
    operations->rotate(changed + 2 * INPUTS, y, y + INPUTS / 2, INPUTS / 2);
    changed[3 * INPUTS] = operations->log_sum(x, INPUTS);
    static const int32_t rows[DOTS] = {4, 0, 2};
    operations->dots(x, MC_FLOAT32, rows, DOTS, y, INPUTS / 8, changed + 3 * INPUTS + 1);
}

static void attend(const mc_operations *operations, mc_format format, uint8_t *space,
                   float *mixed) {
    static float queries[MIXED], keys[SLOTS * HEAD], values[SLOTS * HEAD];
    static int32_t depth[ROWS];
    fill(queries, MIXED, 5);
    fill(keys, SLOTS * HEAD, 6);
    fill(values, SLOTS * HEAD, 7);
    for (int row = 0; row < ROWS; row++) depth[row] = row;
    uint8_t *stored[] = {space, space + SPACE / 4};
    operations->store(keys, SLOTS * HEAD, format, stored[0]);
    operations->store(values, SLOTS * HEAD, format, stored[1]);
    mc_attention attention = {
        .queries = queries, .mixed = mixed, .query_stride = HEAD, .mixed_stride = HEAD,
        .keys = stored[0], .values = stored[1], .format = format, .head_dim = HEAD, .group = 1,
        .start = SLOTS - ROWS, .scale = 0.125f, .depth = depth,
    };
    operations->attend(&attention, 0, ROWS, (float *)(space + SPACE / 2));
}

static void run(uint8_t *space, float *results) {
    const mc_operations *operations = mc_operations_here();
    for (int i = 0; i < 4; i++) {
        multiply(formats[i], space, results);
        results += PRODUCTS;
    }
    change_rows(operations, results);
    results += 3 * INPUTS + 1 + DOTS;
    attend(operations, MC_FLOAT32, space, results);
    attend(operations, MC_BFLOAT16, space, results + MIXED);
}

static int close_enough(const float *a, const float *b) {
    for (int i = 0; i < RESULTS; i++) {
        float bound = 1e-2f + 1e-2f * fabsf(b[i]);
        if (!(fabsf(a[i] - b[i]) <= bound)) return 0; /* a NaN is not close either */
    }
    return 1;
}

int mc_check(void) {
    const char *name = mc_variant();
    uint8_t *space = aligned_alloc(64, SPACE);
    float *ours = calloc(RESULTS, sizeof *ours), *portable = calloc(RESULTS, sizeof *portable);
    int agrees = 0;
    if (space && ours && portable) {
        run(space, ours);
        mc_use("portable");
        run(space, portable);
        mc_use(name);
        agrees = close_enough(ours, portable);
    }
    free(portable);
    free(ours);
    free(space);
    return agrees;
}
