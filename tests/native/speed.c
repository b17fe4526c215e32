/* Minimum times of the products. speed FORMAT OUTPUTS INPUTS THREADS [ROWS...]. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dispatch.h"
#include "matmul.h"
#include "team.h"

enum { UNIT = 64, MOST_BYTES = 256 << 20 };

typedef struct {
    mc_matrix matrix;
    const void *prepared;
    int rows;
    float *y;
} product;

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + now.tv_nsec * 1e-9;
}

static void run(void *context, mc_team *team, int index) {
    product *self = context;
    int outputs = self->matrix.outputs;
    (void)index;
    for (int unit; (unit = mc_team_next(team, index, (outputs + UNIT - 1) / UNIT)) >= 0;) {
        int first = unit * UNIT;
        int last = first + UNIT < outputs ? first + UNIT : outputs;
        mc_matmul(&self->matrix, self->prepared, self->rows, first, last, -1, self->y,
                  (size_t)outputs);
    }
    mc_team_barrier(team, index);
}

/* Copies of the matrix in turn, so that its weights come from memory as in a model. */
static double measure(mc_team *team, product *work, const char *copies, size_t bytes, int count) {
    double best = 1;
    double begin = seconds();
    for (int turn = 0; turn < 400 && (turn < 3 * count || seconds() - begin < 0.4); turn++) {
        work->matrix.packed = copies + (size_t)(turn % count) * bytes;
        double start = seconds();
        mc_team_run(team, run, work);
        double taken = seconds() - start;
        best = taken < best ? taken : best;
    }
    return best;
}

int main(int argc, char **argv) {
    mc_format format = (mc_format)atoi(argv[1]);
    int outputs = atoi(argv[2]);
    int inputs = atoi(argv[3]);
    mc_team *team = mc_team_new(atoi(argv[4]));
    size_t bytes = (mc_packed_bytes(format, outputs, inputs) + 63) / 64 * 64;
    int count = (int)(MOST_BYTES / bytes) + 1;
    char *copies = aligned_alloc(64, bytes * (size_t)count);
    float *x = malloc(sizeof *x * 64 * (size_t)inputs);
    float *y = malloc(sizeof *y * 64 * (size_t)outputs);
    float *weights = calloc((size_t)outputs * inputs, sizeof *weights);
    for (int index = 0; index < 64 * inputs; index++) {
        x[index] = (float)(index % 37) - 18;
    }
    for (size_t index = 0; index < (size_t)outputs * inputs; index++) {
        weights[index] = (float)(index % 41) - 20;
    }
    mc_pack(format, outputs, inputs, 0, outputs, weights, MC_FLOAT32, copies);
    for (int copy = 1; copy < count; copy++) {
        memcpy(copies + (size_t)copy * bytes, copies, bytes);
    }
    void *prepared = aligned_alloc(64, mc_rows_bytes(format, 64, inputs));
    mc_prepare_rows(format, inputs, 64, 0, 64, x, (size_t)inputs, prepared);
    static const char *const names[] = {"float32", "bfloat16", "int8", "nf4"};
    printf("%s %s %dx%d %s threads:", mc_variant(), names[format], outputs, inputs, argv[4]);
    product work = {{format, outputs, inputs, copies, NULL}, prepared, 1, y};
    for (int argument = 5; argument < argc; argument++) {
        work.rows = atoi(argv[argument]);
        double best = measure(team, &work, copies, bytes, count);
        printf("  %d: %.1f us (%.1f GB/s)", work.rows, best * 1e6, (double)bytes / best * 1e-9);
    }
    printf("\n");
    return 0;
}
