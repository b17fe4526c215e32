/* What a step is made of, from its checks to greedy acceptance. */
#include "step.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker.h"

void mc_structure_sizes(int32_t sizes[10]) {
    sizes[0] = sizeof(mc_matrix);
    sizes[1] = sizeof(mc_layer);
    sizes[2] = sizeof(mc_model);
    sizes[3] = sizeof(mc_heads);
    sizes[4] = sizeof(mc_cache);
    sizes[5] = sizeof(mc_step);
    sizes[6] = sizeof(mc_choice);
    sizes[7] = sizeof(mc_coupling);
    sizes[8] = sizeof(mc_bias);
    sizes[9] = sizeof(mc_candidates);
}

static double now(void) {
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Tokens that stand in the step have to be there; those of the heads are. */
static int tokens_in_range(const mc_engine *engine, const mc_step *step) {
    int known = 1 + (step->ranked && engine->heads ? step->ranked * engine->heads->heads : 0);
    for (int row = 0; row < step->rows; row++) {
        if (!step->tokens && (step->table[row] < 0 || step->table[row] >= known)) return 0;
        int32_t token = step->tokens ? step->tokens[row] : step->root;
        if (token < 0 || token >= engine->model->vocabulary) return 0;
    }
    return 1;
}

static int texts_in_range(const mc_cache *cache, const mc_step *step) {
    if (step->parents || step->accept || !step->places) return 0;
    for (int row = 0; row < step->rows; row++) {
        int32_t text = step->texts[row], place = step->places[row];
        if (text < 0 || place < 0 || text >= cache->capacity) return 0;
        if (place >= cache->capacity - text) return 0;
    }
    return 1;
}

static int in_range(const mc_engine *engine, const mc_cache *cache, const mc_step *step) {
    int rows = step->rows, ranked = step->ranked;
    if (rows < 0 || rows > MC_MOST_ROWS || ranked < 0 || ranked > MC_MOST_GUESSES) return 0;
    if (ranked && !(engine->heads && step->last && step->guesses)) return 0;
    if (ranked && ranked > engine->heads->vocabulary) return 0;
    if (!rows) return 1;
    if (cache->capacity > engine->capacity || step->start < 0) return 0;
    if (rows > cache->capacity - step->start || !(step->tokens || step->table)) return 0;
    if (step->first_logits < 0 || step->first_logits > rows) return 0;
    if (step->texts) return texts_in_range(cache, step) && tokens_in_range(engine, step);
    if (step->accept && (step->first_logits || !step->argmax || !step->last)) return 0;
    if (step->choice) return 1; /* its rows are not known yet */
    for (int row = 1; step->parents && row < rows; row++)
        if (step->parents[row] < 0 || step->parents[row] >= row) return 0;
    return tokens_in_range(engine, step);
}

/* Points the step to the rows that its choice will find. */
static int takes_choice(const mc_engine *engine, mc_step *step) {
    mc_choice *choice = step->choice;
    mc_candidates candidates = mc_candidates_of(engine, step);
    if (!choice) return 1;
    if (step->texts || !mc_choice_in_range(choice, &candidates, step->root)) return 0;
    step->rows = choice->nodes;
    step->tokens = choice->tokens;
    step->parents = choice->row_parents;
    return 1;
}

static int is_chain(const mc_step *step) {
    for (int row = 1; row < step->rows && step->parents; row++)
        if (step->parents[row] != row - 1) return 0;
    return 1;
}

/* Depths, and the rows from the root down to each row. */
static void lay_paths(mc_engine *engine) {
    const mc_step *step = engine->step;
    int32_t *free = engine->paths;
    engine->is_chain = is_chain(step);
    for (int row = 0; row < step->rows; row++) {
        int parent = engine->is_chain ? row - 1 : step->parents[row];
        int depth = engine->depth[row] = row ? engine->depth[parent] + 1 : 0;
        if (engine->is_chain) continue;
        if (row) memcpy(free, engine->path[parent], (size_t)depth * sizeof *free);
        free[depth] = row;
        engine->path[row] = free;
        free += depth + 1;
    }
}

/* Chooses the rows, if the step does not name them. */
static void settle_rows(mc_engine *engine) {
    mc_step *step = engine->step;
    if (step->choice) {
        mc_candidates candidates = mc_candidates_of(engine, step);
        mc_choose(step->choice, &candidates, step->root);
        lay_paths(engine);
    }
    engine->between = now();
}

static void run(void *context, mc_team *team, int index) {
    mc_engine *engine = context;
    mc_worker *worker = &engine->workers[index];
    if (engine->step->ranked) mc_guess(worker);
    if (index == 0) settle_rows(engine);
    if (engine->step->choice) mc_team_barrier(team, index);
    if (engine->step->rows) mc_forward(worker);
}

static void forget_best(const mc_engine *engine) {
    for (int i = 0; i < engine->threads; i++)
        for (int row = 0; row < engine->step->rows; row++) {
            engine->workers[i].best[row] = -INFINITY;
            engine->workers[i].best_token[row] = engine->model->vocabulary;
        }
}

/* The first of the likeliest tokens that the threads found. */
static void join_best(const mc_engine *engine) {
    const mc_step *step = engine->step;
    for (int row = 0; row < step->rows - step->first_logits; row++) {
        const mc_worker *best = engine->workers;
        for (int i = 1; i < engine->threads; i++) {
            const mc_worker *other = &engine->workers[i];
            int above = other->best[row] > best->best[row];
            int equal = other->best[row] == best->best[row];
            if (above || (equal && other->best_token[row] < best->best_token[row])) best = other;
        }
        int32_t token = best->best_token[row]; /* none where all logits are NaN */
        step->argmax[row] = token < engine->model->vocabulary ? token : 0;
    }
}

static void accept(const mc_engine *engine) {
    mc_step *step = engine->step;
    uint8_t alive[MC_MOST_ROWS] = {1};
    step->accepted = 0;
    for (int row = 1; row < step->rows; row++) {
        int parent = step->parents ? step->parents[row] : row - 1;
        alive[row] = alive[parent] && mc_token_of(step, row) == step->argmax[parent];
        if (alive[row] && engine->depth[row] > engine->depth[step->accepted]) step->accepted = row;
    }
    step->next = step->argmax[step->accepted];
    size_t size = (size_t)engine->model->hidden;
    memcpy(step->last, step->hidden + (size_t)step->accepted * size, size * sizeof(float));
}

int mc_engine_step(mc_engine *engine, const mc_cache *cache, mc_step *step) {
    if (!takes_choice(engine, step) || !in_range(engine, cache, step)) return -1;
    engine->cache = cache;
    engine->step = step;
    if (!step->choice) lay_paths(engine);
    if (step->argmax) forget_best(engine);
    double begin = now();
    mc_team_run(engine->team, run, engine);
    if (step->rows && step->argmax) join_best(engine);
    if (step->rows && step->accept) accept(engine);
    step->heads_seconds = engine->between - begin;
    step->rows_seconds = now() - engine->between;
    return 0;
}

void mc_cache_keep(const mc_cache *cache, int layers, int kv_heads, int head_dim, int start,
                   const int32_t *rows, int count) {
    size_t number = cache->format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    size_t bytes = (size_t)head_dim * number;
    for (int layer = 0; layer < layers; layer++)
        for (int head = 0; head < kv_heads; head++) {
            size_t place = (size_t)layer * (size_t)cache->layer_stride +
                           (size_t)head * (size_t)cache->head_stride;
            char *keys = (char *)cache->keys + place * number + (size_t)start * bytes;
            char *values = (char *)cache->values + place * number + (size_t)start * bytes;
            for (int i = 0; i < count; i++) {
                if (rows[i] == i) continue;
                memcpy(keys + (size_t)i * bytes, keys + (size_t)rows[i] * bytes, bytes);
                memcpy(values + (size_t)i * bytes, values + (size_t)rows[i] * bytes, bytes);
            }
        }
}
