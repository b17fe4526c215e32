/* Products that the threads of a step share. */
#include <math.h>
#include <string.h>

#include "worker.h"

int mc_piece(int outputs, int threads) {
    int tiles = (outputs + MC_TILE - 1) / MC_TILE, each = tiles / (threads * 4);
    return (each > 1 ? each : 1) * MC_TILE;
}

void mc_multiply(mc_worker *worker, const mc_matrix *matrix, const void *prepared, int rows,
                 float *y, size_t stride) {
    mc_engine *engine = worker->engine;
    int outputs = matrix->outputs, piece = mc_piece(outputs, engine->threads);
    int units = (outputs + piece - 1) / piece;
    for (int unit; (unit = mc_team_next(engine->team, units)) >= 0;) {
        int first = unit * piece, last = first + piece < outputs ? first + piece : outputs;
        mc_matmul(matrix, prepared, rows, first, last, y, stride);
    }
    mc_team_barrier(engine->team);
}

/* The likeliest token of a row so far, the first of equals. Units come to a thread in order. */
static void keep_best(mc_worker *worker, int row, const float *logits, int first, int count) {
    const mc_operations *operations = worker->engine->operations;
    int place = operations->first_above(logits, count, worker->best[row]);
    if (place == count) return;
    float best = operations->largest(logits, count);
    while (place < count - 1 && logits[place] < best) place++;
    worker->best[row] = best;
    worker->best_token[row] = first + place;
}

static void settle_piece(mc_worker *worker, int row, float *logits, int first, int count) {
    const mc_engine *engine = worker->engine;
    float cap = engine->model->final_cap;
    if (cap > 0) engine->operations->cap(logits, cap, count);
    if (engine->step->argmax) keep_best(worker, row, logits, first, count);
}

void mc_logits(mc_worker *worker, const mc_matrix *matrix, const void *prepared, int rows) {
    mc_engine *engine = worker->engine;
    int outputs = matrix->outputs, units = (outputs + MC_PIECE - 1) / MC_PIECE;
    float *to = engine->step->logits ? engine->step->logits : worker->piece;
    size_t stride = engine->step->logits ? (size_t)outputs : MC_PIECE;
    for (int row = 0; row < rows; row++) {
        worker->best[row] = -INFINITY;
        worker->best_token[row] = outputs;
    }
    for (int unit; (unit = mc_team_next(engine->team, units)) >= 0;) {
        int first = unit * MC_PIECE;
        int last = first + MC_PIECE < outputs ? first + MC_PIECE : outputs;
        mc_matmul(matrix, prepared, rows, first, last, to, stride);
        for (int row = 0; row < rows; row++)
            settle_piece(worker, row, to + (size_t)row * stride + first, first, last - first);
    }
}
