/* The decoder: every thread runs it, and they wait for one another where rows meet. */
#include <math.h>
#include <string.h>

#include "worker.h"

typedef void (*row_work)(mc_worker *worker, int layer, int row);

/* Does some work for each row: all of them on every thread, or each on whichever takes it. */
static void each_row(mc_worker *worker, row_work work, int layer) {
    mc_engine *engine = worker->engine;
    int rows = engine->step->rows;
    if (worker->apart) {
        for (int row = 0; row < rows; row++) work(worker, layer, row);
        return;
    }
    for (int row; (row = mc_team_next(engine->team, worker->index, rows)) >= 0;)
        work(worker, layer, row);
    mc_team_barrier(engine->team, worker->index);
}

static void prepare(mc_worker *worker, const mc_matrix *matrix, int rows, int row, const float *x) {
    /* x is this row alone: no stride leads to it. */
    mc_prepare_rows(matrix->format, matrix->inputs, rows, row, 1, x, 0, worker->prepared);
}

static float *stream(const mc_worker *worker, int row) {
    return worker->x + (size_t)row * (size_t)worker->engine->model->hidden;
}

/* Norms a row of the residual stream, and lays it out for the matrix that reads it. */
static void enter(mc_worker *worker, const float *norm, const mc_matrix *matrix, int row) {
    const mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    engine->operations->norm(stream(worker, row), norm, model->hidden, model->epsilon,
                             worker->normed);
    prepare(worker, matrix, engine->step->rows, row, worker->normed);
}

/* Adds a product to the residual stream, behind the norm that some families have there. */
static void leave(mc_worker *worker, const float *norm, int row) {
    const mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    const float *product = engine->product + (size_t)row * (size_t)model->hidden;
    if (norm) {
        engine->operations->norm(product, norm, model->hidden, model->epsilon, worker->normed);
        product = worker->normed;
    }
    engine->operations->add(stream(worker, row), product, model->hidden);
}

int32_t mc_token_of(const mc_step *step, int row) {
    if (step->tokens) return step->tokens[row];
    int32_t place = step->table[row];
    return place ? step->guesses[place - 1] : step->root;
}

static void begin_row(mc_worker *worker, int layer, int row) {
    const mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    size_t bytes = model->embedding_format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    int32_t token = mc_token_of(engine->step, row);
    if (engine->step->row_tokens && (!worker->apart || worker->index == 0))
        engine->step->row_tokens[row] = token;
    size_t place = (size_t)token * (size_t)model->hidden * bytes;
    engine->operations->embed((const char *)model->embedding + place,
                              (mc_format)model->embedding_format, model->hidden,
                              model->embedding_scale, stream(worker, row));
    enter(worker, model->layer[layer].attention_norm, &model->layer[layer].qkv, row);
}

static void mixed_row(mc_worker *worker, int layer, int row) {
    const mc_matrix *output = &worker->engine->model->layer[layer].output;
    const float *mixed = worker->engine->mixed + (size_t)row * (size_t)output->inputs;
    prepare(worker, output, worker->engine->step->rows, row, mixed);
}

static void attended_row(mc_worker *worker, int index, int row) {
    const mc_layer *layer = &worker->engine->model->layer[index];
    leave(worker, layer->attention_post, row);
    enter(worker, layer->mlp_norm, &layer->gate, row);
}

static void gated_row(mc_worker *worker, int layer, int row) {
    const mc_matrix *down = &worker->engine->model->layer[layer].down;
    const float *gated = worker->engine->gated + (size_t)row * (size_t)down->inputs;
    prepare(worker, down, worker->engine->step->rows, row, gated);
}

static void next_row(mc_worker *worker, int index, int row) {
    const mc_layer *layer = &worker->engine->model->layer[index];
    leave(worker, layer->mlp_post, row);
    enter(worker, layer[1].attention_norm, &layer[1].qkv, row);
}

static void last_row(mc_worker *worker, int index, int row) {
    const mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    mc_step *step = engine->step;
    leave(worker, model->layer[index].mlp_post, row);
    float *normed = worker->normed;
    if (!worker->apart || worker->index == 0)
        normed = step->hidden + (size_t)row * (size_t)model->hidden;
    engine->operations->norm(stream(worker, row), model->final_norm, model->hidden, model->epsilon,
                             normed);
    int met = step->rows - step->first_logits;
    if (row >= step->first_logits)
        prepare(worker, &model->lm_head, met, row - step->first_logits, normed);
}

static int position_of(const mc_engine *engine, int row) {
    const mc_step *step = engine->step;
    return step->texts ? step->places[row] : step->start + engine->depth[row];
}

static int slot_of(const mc_step *step, int row) {
    return step->texts ? step->texts[row] + step->places[row] : step->start + row;
}

/* Norms and turns one head of a row; keys and values go to the cache. */
static void settle_head(mc_engine *engine, int index, int head, int row) {
    const mc_model *model = engine->model;
    const mc_layer *layer = &model->layer[index];
    const mc_operations *operations = engine->operations;
    int size = model->head_dim, kv = head - model->heads, slots = slot_of(engine->step, row);
    int position = position_of(engine, row);
    if (position >= model->positions) position = model->positions - 1;
    float *x = engine->qkv + (size_t)row * (size_t)layer->qkv.outputs + (size_t)head * (size_t)size;
    const float *norm = kv < 0 ? layer->query_norm : layer->key_norm;
    if (kv < model->kv_heads) {
        size_t place = (size_t)position * (size_t)(model->rotary / 2);
        if (norm) operations->norm(x, norm, size, model->epsilon, x);
        operations->rotate(x, model->cosine[layer->rope] + place, model->sine[layer->rope] + place,
                           model->rotary / 2);
    }
    if (kv < 0) return;
    void *base = kv < model->kv_heads ? engine->cache->keys : engine->cache->values;
    size_t place = mc_slot(engine, index, kv % model->kv_heads, slots);
    operations->store(x, size, (mc_format)engine->cache->format, mc_at(engine, base, place));
}

static int common_multiple(int a, int b) {
    int x = a, y = b;
    while (y) {
        int rest = x % y;
        x = y;
        y = rest;
    }
    return a / x * b;
}

/* Outputs of a unit of queries, keys and values: whole heads and whole tiles. */
static int qkv_piece(const mc_model *model) { return common_multiple(model->head_dim, MC_TILE); }

/* Queries, keys and values, whole heads a unit, so that their thread can settle them. */
static void project(mc_worker *worker, int index) {
    mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    const mc_matrix *qkv = &model->layer[index].qkv;
    int rows = engine->step->rows, outputs = qkv->outputs;
    mc_units units = mc_units_of(worker, outputs, qkv_piece(model));
    for (; units.first >= 0; mc_advance(&units)) {
        mc_matmul(qkv, worker->prepared, rows, units.first, units.last, units.following,
                  engine->qkv, (size_t)outputs);
        int last = units.last / model->head_dim;
        for (int head = units.first / model->head_dim; head < last; head++)
            for (int row = 0; row < rows; row++) settle_head(engine, index, head, row);
    }
    mc_team_barrier(engine->team, worker->index);
}

static void gate(mc_worker *worker, int index) {
    mc_engine *engine = worker->engine;
    const mc_layer *layer = &engine->model->layer[index];
    int rows = engine->step->rows, outputs = layer->gate.outputs;
    size_t stride = (size_t)outputs;
    mc_units units = mc_units_of(worker, outputs, MC_PIECE);
    for (; units.first >= 0; mc_advance(&units)) {
        int first = units.first, last = units.last, next = units.following;
        mc_matmul(&layer->gate, worker->prepared, rows, first, last, next, engine->gated, stride);
        mc_matmul(&layer->up, worker->prepared, rows, first, last, next, worker->piece, MC_PIECE);
        for (int row = 0; row < rows; row++)
            engine->operations->gate((mc_activation)engine->model->activation,
                                     engine->gated + (size_t)row * stride + first,
                                     worker->piece + row * MC_PIECE + first, last - first);
    }
    mc_team_barrier(engine->team, worker->index);
}

/* What a thread multiplies first is fetched while rows are normed, prepared and attended. */
static void fetch_piece(const mc_worker *worker, const mc_matrix *matrix) {
    mc_fetch_first(worker, matrix, mc_piece(matrix->outputs, worker->engine->threads));
}

static void fetch_next(const mc_worker *worker, int index) {
    const mc_model *model = worker->engine->model;
    if (index < model->layers) {
        mc_fetch_first(worker, &model->layer[index].qkv, qkv_piece(model));
    } else {
        mc_fetch_first(worker, &model->lm_head, MC_PIECE);
    }
}

static void run_layer(mc_worker *worker, int index) {
    mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    const mc_layer *layer = &model->layer[index];
    int rows = engine->step->rows;
    size_t stride = (size_t)model->hidden;
    project(worker, index);
    fetch_piece(worker, &layer->output);
    mc_attend(worker, index);
    each_row(worker, mixed_row, index);
    mc_multiply(worker, &layer->output, worker->prepared, rows, engine->product, stride);
    mc_fetch_first(worker, &layer->gate, MC_PIECE);
    mc_fetch_first(worker, &layer->up, MC_PIECE);
    each_row(worker, attended_row, index);
    gate(worker, index);
    fetch_piece(worker, &layer->down);
    each_row(worker, gated_row, index);
    mc_multiply(worker, &layer->down, worker->prepared, rows, engine->product, stride);
    fetch_next(worker, index + 1);
    each_row(worker, index + 1 < model->layers ? next_row : last_row, index);
}

void mc_forward(mc_worker *worker) {
    mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    int rows = engine->step->rows, met = rows - engine->step->first_logits;
    worker->apart = rows <= MC_FEW_ROWS;
    worker->x = worker->apart ? worker->own_x : engine->x;
    worker->prepared = worker->apart ? worker->own_prepared : engine->prepared;
    each_row(worker, begin_row, 0);
    for (int layer = 0; layer < model->layers; layer++) run_layer(worker, layer);
    if (met > 0) mc_logits(worker, &model->lm_head, worker->prepared, met);
}
