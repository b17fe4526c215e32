/* Chooses nodes among random candidates in memory of the exact size, for sanitizers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "choose.h"
#include "dispatch.h"
#include "kernels.h"

enum { VOCABULARY = 301 };

static unsigned state = 1;

static unsigned draw(unsigned below) {
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % below;
}

static float likely(void) {
    unsigned which = draw(40);
    return which == 0 ? -INFINITY : which == 1 ? 0 : -(float)draw(1000) / 100;
}

static int32_t *numbers(int count, unsigned below) {
    int32_t *drawn = malloc((size_t)count * sizeof *drawn);
    for (int i = 0; i < count; i++) drawn[i] = (int32_t)draw(below);
    return drawn;
}

static float *floats(int count, float (*one)(void)) {
    float *drawn = malloc((size_t)count * sizeof *drawn);
    for (int i = 0; i < count; i++) drawn[i] = one();
    return drawn;
}

static float near_one(void) { return 0.5f + (float)draw(100) / 100; }

static void *matrix(int rows, int rank, mc_format format) {
    size_t count = (size_t)rows * (size_t)rank;
    float *wide = malloc(count * sizeof *wide);
    uint16_t *half = malloc(count * sizeof *half);
    for (size_t i = 0; i < count; i++) {
        wide[i] = (float)draw(1000) / 500 - 1;
        half[i] = mc_to_bfloat16(wide[i]);
    }
    free(format == MC_FLOAT32 ? (void *)half : (void *)wide);
    return format == MC_FLOAT32 ? (void *)wide : (void *)half;
}

typedef struct {
    mc_choice choice;
    mc_candidates candidates;
    mc_coupling coupling;
    mc_bias bias;
} made;

/* Each path becomes a parent of a few, level by level; no deeper than the heads. */
static int grow(int most, int heads, int ranked, int32_t *parents, int32_t *ranks, int32_t *depth) {
    int paths = 1;
    depth[0] = parents[0] = ranks[0] = 0;
    for (int parent = 0; parent < paths && depth[parent] < heads; parent++) {
        int children = 1 + (int)draw(parent ? 3 : 8);
        for (int rank = (int)draw(2); rank < ranked && children-- && paths < most; rank++) {
            parents[paths] = parent;
            ranks[paths] = rank;
            depth[paths++] = depth[parent] + 1;
        }
    }
    return paths;
}

static void make(made *m, int heads, int ranked, int most, int chain, int rank) {
    int32_t parents[MC_MOST_PATHS], ranks[MC_MOST_PATHS], depth[MC_MOST_PATHS];
    int paths = grow(most, heads, ranked, parents, ranks, depth), guesses = heads * ranked;
    int nodes = paths > 1 ? 1 + (int)draw((unsigned)paths) : 1 + (int)draw((unsigned)chain + 1);
    size_t bytes = (size_t)paths * sizeof *parents;
    memset(m, 0, sizeof *m);
    mc_format format = draw(2) ? MC_FLOAT32 : MC_BFLOAT16;
    m->bias = (mc_bias){rank, (int32_t)format, 20, 50, matrix(20, rank + 1, format),
                        matrix(50, rank + 1, format), numbers(VOCABULARY, 20)};
    m->coupling = (mc_coupling){draw(1 << 20), draw(1 << 20), draw(2) ? 1 : 0.8,
                                draw(2) ? 0 : 0.05, floats(heads, near_one),
                                floats(heads, near_one), floats(guesses, near_one), near_one(),
                                (int32_t)draw(8)};
    m->candidates = (mc_candidates){heads, ranked, VOCABULARY, numbers(guesses, VOCABULARY),
                                    numbers(guesses, 50), floats(guesses, likely),
                                    rank ? &m->bias : NULL};
    m->choice = (mc_choice){
        .paths = paths, .nodes = nodes, .chain = chain,
        .parents = memcpy(malloc(bytes), parents, bytes), .ranks = memcpy(malloc(bytes), ranks, bytes), .scale = floats(heads, near_one),
        .shift = floats(heads, near_one), .measured = draw(4) ? NULL : floats(paths, likely),
        .chain_tokens = numbers(chain, VOCABULARY), .chain_log_p = floats(chain, near_one),
        .coupling = draw(2) ? &m->coupling : NULL, .rows = numbers(nodes, 9),
        .tokens = numbers(nodes, 9), .row_parents = numbers(nodes, 9),
    };
    float *copied = (float *)(uintptr_t)m->choice.chain_log_p;
    int32_t *tokens = (int32_t *)(uintptr_t)m->choice.chain_tokens;
    for (int k = 0; k < chain; k++) {
        copied[k] = -copied[k];
        if (k < heads && ranked && draw(4)) tokens[k] = m->candidates.tokens[k * ranked];
    }
}

static void drop(made *m) {
    const void *owned[] = {m->bias.first, m->bias.second, m->bias.rows, m->coupling.of_log_p,
                           m->coupling.of_noise, m->coupling.noise,
                           m->candidates.tokens, m->candidates.indices, m->candidates.log_p,
                           m->choice.parents, m->choice.ranks, m->choice.scale, m->choice.shift,
                           m->choice.measured, m->choice.chain_tokens, m->choice.chain_log_p,
                           m->choice.rows, m->choice.tokens, m->choice.row_parents};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free((void *)(uintptr_t)owned[i]);
}

/* 1 unless the rows are a tree in order, of tokens that there are. */
static int is_wrong(const mc_choice *choice) {
    int wrong = choice->rows[0] != 0 || choice->row_parents[0] != 0;
    for (int i = 1; i < choice->nodes; i++) {
        wrong |= choice->rows[i] <= choice->rows[i - 1];
        wrong |= choice->rows[i] >= choice->paths + choice->chain;
        wrong |= choice->row_parents[i] < 0 || choice->row_parents[i] >= i;
        wrong |= choice->tokens[i] < 0 || choice->tokens[i] >= VOCABULARY;
    }
    return wrong || choice->joint < 0 || choice->joint >= choice->paths;
}

/* Rows of a packed matrix, each as if it had been packed alone. */
static int picks_wrong(mc_format format) {
    int32_t rows[] = {32, 3, 3, 17, 0};
    float weights[33 * 64], chosen[5 * 64];
    for (int i = 0; i < 33 * 64; i++) weights[i] = near_one();
    for (int i = 0; i < 5; i++) memcpy(chosen + i * 64, weights + rows[i] * 64, 64 * sizeof(float));
    size_t bytes = mc_packed_bytes(format, 5, 64);
    uint8_t *whole = aligned_alloc(64, (mc_packed_bytes(format, 33, 64) + 63) / 64 * 64);
    uint8_t *some = calloc(1, bytes), *expected = calloc(1, bytes);
    mc_pack(format, 33, 64, 0, 33, weights, MC_FLOAT32, whole);
    mc_pack(format, 5, 64, 0, 5, chosen, MC_FLOAT32, expected);
    mc_matrix from = {format, 33, 64, whole, NULL};
    int wrong = mc_pack_rows(&from, rows, 5, some) || memcmp(some, expected, bytes);
    rows[4] = 33;
    wrong |= mc_pack_rows(&from, rows, 5, some) != -1;
    free(whole);
    free(some);
    free(expected);
    return wrong;
}

int main(void) {
    static const char *const names[] = {"portable", "avx2", "avx2vnni", "avx512", "arm"};
    int failed = 0;
    for (int format = MC_FLOAT32; format <= MC_NF4; format++)
        failed += picks_wrong((mc_format)format);
    for (int i = 0; i < 1500; i++) {
        if (mc_use(names[i % 5])) continue;
        int large = i % 49 == 0, heads = large ? MC_MOST_DEPTH : (int)draw(6);
        int ranked = large ? MC_MOST_GUESSES : heads ? 1 + (int)draw(40) : 0;
        int most = large ? MC_MOST_PATHS : heads ? 1 + (int)draw(60) : 1;
        int chain = large ? MC_MOST_CHAIN : (int)draw(12), rank = (int)draw(3) * (int)draw(40);
        made m;
        make(&m, heads, ranked, most, chain, large ? MC_MOST_RANK : rank);
        failed += mc_choose(&m.choice, &m.candidates, (int32_t)draw(VOCABULARY)) != 0;
        failed += is_wrong(&m.choice);
        failed += mc_choose(&m.choice, &m.candidates, VOCABULARY) != -1;
        drop(&m);
    }
    printf("%d failed\n", failed);
    return failed != 0;
}
