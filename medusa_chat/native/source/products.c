/* Products that the threads of a step share. */
#include <math.h>
#include <string.h>

#include "kernels.h"
#include "worker.h"

int mc_piece(int outputs, int threads) {
    int tiles = mc_steps(outputs, MC_TILE), each = tiles / (threads * 4);
    while (each > 1 && mc_steps(tiles, each) % threads) each--; /* the same for every thread */
    return (each > 1 ? each : 1) * MC_TILE;
}

static int claim(const mc_units *units) {
    const mc_worker *worker = units->worker;
    int count = mc_steps(units->outputs, units->piece);
    int unit = mc_team_next(worker->engine->team, worker->index, count);
    return unit < 0 ? -1 : unit * units->piece;
}

void mc_advance(mc_units *units) {
    int last = units->following + units->piece;
    units->first = units->following;
    units->last = last < units->outputs ? last : units->outputs;
    units->following = units->first < 0 ? -1 : claim(units);
}

mc_units mc_units_of(mc_worker *worker, int outputs, int piece) {
    mc_units units = {.worker = worker, .outputs = outputs, .piece = piece};
    units.following = claim(&units);
    mc_advance(&units);
    return units;
}

void mc_fetch_first(const mc_worker *worker, const mc_matrix *matrix, int piece) {
    int count = mc_steps(matrix->outputs, piece);
    int unit = mc_team_first(worker->engine->team, worker->index, count);
    if (unit < count) mc_fetch(matrix, unit * piece);
}

void mc_multiply(mc_worker *worker, const mc_matrix *matrix, const void *prepared, int rows,
                 float *y, size_t stride) {
    int piece = mc_piece(matrix->outputs, worker->engine->threads);
    mc_units units = mc_units_of(worker, matrix->outputs, piece);
    for (; units.first >= 0; mc_advance(&units))
        mc_matmul(matrix, prepared, rows, units.first, units.last, units.following, y, stride);
    mc_team_barrier(worker->engine->team, worker->index);
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
    int outputs = matrix->outputs;
    float *to = engine->step->logits ? engine->step->logits : worker->piece;
    size_t stride = engine->step->logits ? (size_t)outputs : MC_PIECE;
    mc_units units = mc_units_of(worker, outputs, MC_PIECE);
    for (; units.first >= 0; mc_advance(&units)) {
        int first = units.first, last = units.last;
        mc_matmul(matrix, prepared, rows, first, last, units.following, to, stride);
        for (int row = 0; row < rows; row++)
            settle_piece(worker, row, to + (size_t)row * stride + first, first, last - first);
    }
}
