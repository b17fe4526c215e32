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
static size_t heads_rows(const mc_engine *engine) {
    const mc_heads *heads = engine->heads;
    if (!heads) return 0;
    size_t count = (size_t)heads->heads;
    size_t bytes = prepared_bytes(mc_shared_lm_head(engine), heads->heads);
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
    size_t rows = larger(widest_rows(model, MC_FEW_ROWS), heads_rows(engine));
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
    size_t ranked = engine->heads ? (size_t)engine->heads->vocabulary : 0;
    engine->guess = mc_allocate(heads * ranked * number);
    engine->guessed = mc_allocate(heads * MC_MOST_GUESSES * sizeof(int32_t));
    engine->prepared = mc_allocate(widest_rows(model, MC_MOST_ROWS));
    engine->paths = mc_allocate(MC_MOST_ROWS * (MC_MOST_ROWS + 1) / 2 * sizeof(int32_t));
    return engine->x && engine->qkv && engine->mixed && engine->gated && engine->product &&
           engine->guess && engine->guessed && engine->prepared && engine->paths;
}

static int whole_numbers(const int32_t *numbers, int count, int below) {
    for (int i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= below) return 0;
    return 1;
}

static int bias_fits(const mc_model *model, const mc_heads *heads) {
    const mc_bias *bias = &heads->bias;
    if (!bias->rank) return 1;
    if (bias->rank < 0 || bias->rank > MC_MOST_RANK || bias->tokens != heads->vocabulary) return 0;
    if (bias->format != MC_FLOAT32 && bias->format != MC_BFLOAT16) return 0;
    if (!bias->rows) return bias->parents == model->vocabulary;
    return whole_numbers(bias->rows, model->vocabulary, bias->parents);
}

static int heads_fit(const mc_model *model, const mc_heads *heads) {
    int ranked = heads->vocabulary;
    if (heads->heads < 1 || heads->heads > MC_MOST_ROWS || heads->layers < 1) return 0;
    if (ranked < 1 || (!heads->tokens && ranked != model->vocabulary)) return 0;
    if (heads->tokens && !whole_numbers(heads->tokens, ranked, model->vocabulary)) return 0;
    const mc_matrix *shared = heads->shared ? heads->shared : &model->lm_head;
    const mc_matrix *lm_head = heads->lm_head ? heads->lm_head : shared;
    return lm_head->outputs == ranked && bias_fits(model, heads);
}

static int fits(const mc_model *model, const mc_heads *heads) {
    int whole = model->kv_heads > 0 && model->heads % model->kv_heads == 0 && model->layers > 0;
    int turned = model->rotary % 2 == 0 && model->rotary <= model->head_dim;
    int few = !heads || heads_fit(model, heads);
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
    void *owned[] = {engine->workers, engine->x,       engine->qkv,      engine->mixed,
                     engine->gated,   engine->product, engine->guess,    engine->guessed,
                     engine->prepared, engine->paths};
    for (size_t j = 0; j < sizeof owned / sizeof *owned; j++) free(owned[j]);
    free(engine);
}
