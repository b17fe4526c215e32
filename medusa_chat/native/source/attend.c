/* Shares the attention of a step's rows among the threads. */
#include <limits.h>

#include "kernels.h"
#include "worker.h"

/* Reading the keys and values of a text takes as long as so many queries that meet them. */
enum { READING = 4 };

static mc_attention attention_of(mc_engine *engine, int index, int head) {
    const mc_model *model = engine->model;
    const mc_layer *layer = &model->layer[index];
    int group = model->heads / model->kv_heads;
    size_t first = (size_t)head * (size_t)(group * model->head_dim);
    size_t place = mc_slot(engine, index, head, 0);
    mc_attention attention = {
        .queries = engine->qkv + first,
        .mixed = engine->mixed + first,
        .query_stride = (size_t)layer->qkv.outputs,
        .mixed_stride = (size_t)layer->output.inputs,
        .keys = mc_at(engine, engine->cache->keys, place),
        .values = mc_at(engine, engine->cache->values, place),
        .format = (mc_format)engine->cache->format,
        .head_dim = model->head_dim,
        .group = group,
        .start = engine->step->start,
        .window = layer->window,
        .scale = model->attention_scale,
        .cap = model->attention_cap,
        .depth = engine->depth,
        .path = engine->is_chain ? NULL : engine->path,
    };
    return attention;
}

/* Queries that a unit takes. A unit reads all keys and values, so they should be many; but then
 * some threads may get more units than others. */
static int queries_of_unit(const mc_engine *engine) {
    int heads = engine->model->kv_heads, threads = engine->threads;
    int queries = engine->step->rows * (engine->model->heads / heads);
    int room = MC_SHARED_SCORES / (engine->step->start + engine->step->rows);
    int most = room < 1 ? 1 : room < MC_QUERIES ? room : MC_QUERIES;
    int fewest = mc_steps(queries, most), best = 1, least = INT_MAX;
    for (int blocks = fewest; blocks < fewest + threads; blocks++) {
        int size = mc_steps(queries, blocks);
        int time = mc_steps(heads * blocks, threads) * (READING + size);
        if (time < least) best = size;
        if (time < least) least = time;
    }
    return best;
}

/* The attention of one row to the text that it belongs to. */
static mc_attention attention_of_text(mc_engine *engine, int index, int head, int row) {
    static const int32_t none = 0;
    mc_attention attention = attention_of(engine, index, head);
    size_t size = (size_t)engine->model->head_dim;
    size_t first = (size_t)engine->step->texts[row] * size;
    attention.queries += (size_t)row * attention.query_stride;
    attention.mixed += (size_t)row * attention.mixed_stride;
    attention.keys = mc_at(engine, (void *)attention.keys, first);
    attention.values = mc_at(engine, (void *)attention.values, first);
    attention.start = engine->step->places[row];
    attention.depth = &none;
    return attention;
}

static void attend_texts(mc_worker *worker, int index) {
    mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    int group = model->heads / model->kv_heads, units = engine->step->rows * model->kv_heads;
    for (int unit; (unit = mc_team_next(engine->team, worker->index, units)) >= 0;) {
        int row = unit / model->kv_heads, most = MC_SHARED_SCORES / (engine->step->places[row] + 1);
        int size = most < 1 ? 1 : most < MC_QUERIES ? most : MC_QUERIES;
        mc_attention attention = attention_of_text(engine, index, unit % model->kv_heads, row);
        for (int first = 0; first < group; first += size) {
            int last = first + size < group ? first + size : group;
            engine->operations->attend(&attention, first, last, worker->scratch);
        }
    }
    mc_team_barrier(engine->team, worker->index);
}

static void attend_text(mc_worker *worker, int index) {
    mc_engine *engine = worker->engine;
    const mc_model *model = engine->model;
    int queries = engine->step->rows * (model->heads / model->kv_heads);
    int size = queries_of_unit(engine), blocks = (queries + size - 1) / size;
    int units = blocks * model->kv_heads;
    for (int unit; (unit = mc_team_next(engine->team, worker->index, units)) >= 0;) {
        mc_attention attention = attention_of(engine, index, unit / blocks);
        int first = unit % blocks * size;
        int last = first + size < queries ? first + size : queries;
        engine->operations->attend(&attention, first, last, worker->scratch);
    }
    mc_team_barrier(engine->team, worker->index);
}

void mc_attend(mc_worker *worker, int index) {
    if (worker->engine->step->texts) attend_texts(worker, index);
    else attend_text(worker, index);
}
