/* The memory of an engine: all of it is taken at once, and a step takes none. */
#include <stdlib.h>
#include <string.h>

#include "worker.h"

void *mc_allocate(size_t bytes) { return aligned_alloc(64, (bytes / 64 + 1) * 64); }

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t prepared_bytes(const mc_matrix *matrix, int rows) {
    return mc_rows_bytes(matrix->format, rows, matrix->inputs);
}

/* Bytes of `rows` rows, prepared for whichever matrix needs most. */
static size_t widest_rows(const mc_model *model, int rows) {
    size_t bytes = prepared_bytes(&model->lm_head, rows);
    for (int index = 0; index < model->layers; index++) {
        const mc_layer *layer = &model->layer[index];
        bytes = larger(bytes, prepared_bytes(&layer->qkv, rows));
        bytes = larger(bytes, prepared_bytes(&layer->output, rows));
        bytes = larger(bytes, prepared_bytes(&layer->gate, rows));
        bytes = larger(bytes, prepared_bytes(&layer->down, rows));
    }
    return bytes;
}

/* Bytes of a row for each head, prepared one by one or together. */
static size_t heads_rows(const mc_model *model, const mc_heads *heads) {
    if (!heads) return 0;
    size_t count = (size_t)heads->heads, bytes = prepared_bytes(&model->lm_head, heads->heads);
    size_t block = prepared_bytes(&heads->block[0], 1) + 64;
    size_t own = heads->lm_head ? prepared_bytes(&heads->lm_head[0], 1) + 64 : 0;
    return larger(bytes, count * larger(block, own));
}

static size_t scratch_floats(const mc_engine *engine) {
    const mc_operations *operations = engine->operations;
    /* One query over everything, or as many as forward.c lets share a unit. */
    size_t many = operations->attend_scratch(MC_QUERIES, 0, engine->model->head_dim);
    size_t one = operations->attend_scratch(1, engine->capacity, engine->model->head_dim);
    size_t shared = many + (size_t)MC_SHARED_SCORES + MC_QUERIES * 16;
    return larger(one, shared);
}

static int add_worker(mc_engine *engine, int index) {
    const mc_model *model = engine->model;
    mc_worker *worker = &engine->workers[index];
    int few = MC_FEW_ROWS;
    if (engine->heads && engine->heads->heads > few) few = engine->heads->heads;
    size_t hidden = (size_t)model->hidden, number = sizeof(float);
    size_t most = larger((size_t)model->vocabulary, (size_t)model->intermediate);
    size_t rows = larger(widest_rows(model, MC_FEW_ROWS), heads_rows(model, engine->heads));
    worker->engine = engine;
    worker->index = index;
    worker->own_x = mc_allocate((size_t)few * hidden * number);
    worker->own_prepared = mc_allocate(rows);
    worker->normed = mc_allocate(hidden * number);
    worker->piece = mc_allocate((most + MC_MOST_ROWS * MC_PIECE) * number);
    worker->scratch = mc_allocate(scratch_floats(engine) * number);
    return worker->own_x && worker->own_prepared && worker->normed && worker->piece &&
           worker->scratch;
}

static int add_shared(mc_engine *engine) {
    const mc_model *model = engine->model;
    size_t rows = MC_MOST_ROWS, number = sizeof(float), hidden = (size_t)model->hidden;
    size_t heads = engine->heads ? (size_t)engine->heads->heads : 0;
    size_t many = larger(rows, heads);
    size_t qkv = (size_t)model->layer[0].qkv.outputs, mixed = (size_t)model->layer[0].output.inputs;
    engine->x = mc_allocate(rows * hidden * number);
    engine->qkv = mc_allocate((rows * qkv + heads * hidden) * number);
    engine->mixed = mc_allocate(rows * mixed * number);
    engine->gated = mc_allocate(rows * (size_t)model->intermediate * number);
    engine->product = mc_allocate(many * hidden * number);
    engine->guess = mc_allocate(heads * (size_t)model->vocabulary * number);
    engine->prepared = mc_allocate(widest_rows(model, MC_MOST_ROWS));
    engine->paths = mc_allocate(MC_MOST_ROWS * (MC_MOST_ROWS + 1) / 2 * sizeof(int32_t));
    return engine->x && engine->qkv && engine->mixed && engine->gated && engine->product &&
           engine->guess && engine->prepared && engine->paths;
}

static int fits(const mc_model *model, const mc_heads *heads) {
    int whole = model->kv_heads > 0 && model->heads % model->kv_heads == 0 && model->layers > 0;
    int turned = model->rotary % 2 == 0 && model->rotary <= model->head_dim;
    int few = !heads || (heads->heads > 0 && heads->heads <= MC_MOST_ROWS && heads->layers > 0);
    return whole && turned && few && model->head_dim <= MC_MOST_HEAD_DIM && model->positions > 0;
}

mc_engine *mc_engine_new(const mc_model *model, const mc_heads *heads, mc_team *team,
                         int capacity) {
    if (!fits(model, heads) || capacity < 1) return NULL;
    mc_engine *engine = calloc(1, sizeof *engine);
    if (!engine) return NULL;
    engine->model = model;
    engine->heads = heads;
    engine->team = team;
    engine->capacity = capacity;
    engine->operations = mc_operations_here();
    engine->threads = mc_team_threads(team);
    engine->workers = calloc((size_t)engine->threads, sizeof *engine->workers);
    int there = engine->workers && add_shared(engine);
    for (int i = 0; there && i < engine->threads; i++) there = add_worker(engine, i);
    if (there) return engine;
    mc_engine_free(engine);
    return NULL;
}

void mc_engine_free(mc_engine *engine) {
    if (!engine) return;
    for (int i = 0; engine->workers && i < engine->threads; i++) {
        mc_worker *worker = &engine->workers[i];
        void *owned[] = {worker->own_x, worker->own_prepared, worker->normed, worker->piece,
                         worker->scratch};
        for (size_t j = 0; j < sizeof owned / sizeof *owned; j++) free(owned[j]);
    }
    void *owned[] = {engine->workers, engine->x,     engine->qkv,      engine->mixed, engine->gated,
                     engine->product, engine->guess, engine->prepared, engine->paths};
    for (size_t j = 0; j < sizeof owned / sizeof *owned; j++) free(owned[j]);
    free(engine);
}
