/* Runs every kernel over odd sizes in memory of the exact size, and the team, for sanitizers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"
#include "matmul.h"
#include "team.h"

static unsigned state = 1;

static float draw(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 23) - 1;
}

static float *draw_floats(size_t count) {
    float *numbers = malloc(count * sizeof *numbers);
    for (size_t index = 0; index < count; index++) {
        numbers[index] = draw();
    }
    return numbers;
}

/* Ends at a multiple of 64 past an aligned start, as the callers of the kernels allocate. */
static void *allocate(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

typedef struct {
    mc_matrix matrix;
    void *prepared;
    int rows;
    float *y;
} product;

static void run_product(void *context, mc_team *team, int index) {
    product *self = context;
    int outputs = self->matrix.outputs;
    (void)index;
    for (int unit; (unit = mc_team_next(team, index, (outputs + MC_TILE - 1) / MC_TILE)) >= 0;) {
        int first = unit * MC_TILE;
        int last = first + MC_TILE < outputs ? first + MC_TILE : outputs;
        mc_matmul(&self->matrix, self->prepared, self->rows, first, last, -1, self->y,
                  (size_t)outputs);
    }
    mc_team_barrier(team, index);
}

/* 1 where a row of plain C is further away than its roundings explain. */
static int differs_from_twin(const char *name, product *work, const float *x, int row) {
    const mc_matrix *matrix = &work->matrix;
    int inputs = matrix->inputs;
    int outputs = matrix->outputs;
    int differs = 0;
    mc_use("portable");
    float *twin = calloc((size_t)outputs, sizeof *twin);
    void *prepared = allocate(mc_rows_bytes(matrix->format, 1, inputs));
    const float *values = x + (size_t)row * inputs;
    mc_prepare_rows(matrix->format, inputs, 1, 0, 1, values, (size_t)inputs, prepared);
    mc_matmul(matrix, prepared, 1, 0, outputs, -1, twin, (size_t)outputs);
    for (int output = 0; output < outputs; output++) {
        differs |= fabsf(twin[output] - work->y[(size_t)row * outputs + output]) > 1e-4f;
    }
    free(twin);
    free(prepared);
    mc_use(name);
    return differs;
}

/* 1 where the last row differs from the twin's, or the first row differs between all rows on
 * several threads and the row alone. */
static int check(const char *name, mc_team *team, mc_format format, int outputs, int inputs,
                 int rows) {
    size_t bytes = mc_packed_bytes(format, outputs, inputs);
    if (!bytes) {
        return 0;
    }
    float *weights = draw_floats((size_t)outputs * inputs);
    float *x = draw_floats((size_t)rows * inputs);
    float *bias = draw_floats((size_t)outputs);
    float *y = calloc((size_t)rows * outputs, sizeof *y);
    float *alone = calloc((size_t)outputs, sizeof *alone);
    void *packed = allocate(bytes);
    void *prepared = allocate(mc_rows_bytes(format, rows, inputs));
    mc_pack(format, outputs, inputs, 0, outputs, weights, MC_FLOAT32, packed);
    mc_prepare_rows(format, inputs, rows, 0, rows, x, (size_t)inputs, prepared);
    product work = {{format, outputs, inputs, packed, bias}, prepared, rows, y};
    mc_team_run(team, run_product, &work);
    mc_matmul(&work.matrix, prepared, 1, 0, outputs, -1, alone, (size_t)outputs);
    int differs = memcmp(y, alone, (size_t)outputs * sizeof *y) != 0;
    differs |= differs_from_twin(name, &work, x, rows - 1);
    free(weights);
    free(x);
    free(bias);
    free(y);
    free(alone);
    free(packed);
    free(prepared);
    return differs;
}

static int check_variant(const char *name, mc_team *team) {
    static const int sizes[][2] = {{1, 1}, {33, 3}, {31, 80}, {48, 96}, {65, 127}, {97, 192}};
    static const int rows[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 17};
    int failed = 0;
    if (mc_use(name)) {
        return 0;
    }
    for (int format = MC_FLOAT32; format <= MC_NF4; format++) {
        for (size_t size = 0; size < sizeof sizes / sizeof *sizes; size++) {
            for (size_t row = 0; row < sizeof rows / sizeof *rows; row++) {
                failed += check(name, team, (mc_format)format, sizes[size][0], sizes[size][1],
                                rows[row]);
            }
        }
    }
    printf("%s: %d failed\n", name, failed);
    return failed;
}

int main(void) {
    static const char *const names[] = {"portable", "avx2", "avx2vnni", "avx512", "arm"};
    mc_team *team = mc_team_new(2);
    mc_team *other = mc_team_new(3);
    int failed = 0;
    for (size_t index = 0; index < sizeof names / sizeof *names; index++) {
        failed += check_variant(names[index], index % 2 ? team : other);
    }
    mc_team_free(team);
    mc_team_free(other);
    return failed != 0;
}
