/* What attention reads: blocks of queries, and the keys and values that they meet.
 *
 * Included once for each family of processors. */
#include "compiler.h"
#include "elementwise.h"

typedef struct {
    const mc_attention *a;
    int padded;     /* head_dim, up to whole vectors */
    int first;      /* query */
    int count;      /* of queries */
    int base;       /* position of the first score, a multiple of 16 */
    int common;     /* positions before it are in slots of the same number for all queries */
    int stride;     /* of scores */
    float *queries; /* [count, padded] */
    float *sums;    /* [count, padded] */
    float *tile;    /* [TILES_AT_ONCE * 16, padded] */
    float *columns; /* [TILES_AT_ONCE, padded, 16], of keys */
    float *scores;  /* [count, stride] */
} block;

static int whole(int size) { return (size + SIZE - 1) / SIZE * SIZE; }
static int row_of(const block *b, int query) { return (b->first + query) / b->a->group; }
static int position_of(const block *b, int query) {
    return b->a->start + b->a->depth[row_of(b, query)];
}

static int lowest_of(const block *b, int query) {
    int lowest = position_of(b, query) - b->a->window + 1;
    return b->a->window && lowest > 0 ? lowest : 0;
}

/* Where this query's numbers start in a row of queries or of what is mixed. */
static size_t offset_of(const block *b, int query, size_t stride) {
    int head = (b->first + query) % b->a->group;
    return (size_t)row_of(b, query) * stride + (size_t)head * (size_t)b->a->head_dim;
}

/* Bytes of a key, or of a value. */
static size_t bytes_of_row(const block *b) {
    size_t number = b->a->format == MC_FLOAT32 ? sizeof(float) : sizeof(uint16_t);
    return (size_t)b->a->head_dim * number;
}

static void load_row(const block *b, const void *from, int slot, float *to) {
    const mc_attention *a = b->a;
    const char *row = (const char *)from + (size_t)slot * bytes_of_row(b);
    for (int i = 0; i < b->padded; i += SIZE)
        vector_store(to + i, load_as(row, a->format, i, a->head_dim - i));
}

/* Loads rows that follow one another in the cache. */
static void load_rows(const block *b, const void *from, int slot, int rows) {
    int size = b->a->head_dim;
    if (b->a->format == MC_BFLOAT16 && size == b->padded) {
        const uint16_t *numbers = (const uint16_t *)from + (size_t)slot * (size_t)size;
        for (int i = 0; i < rows * size; i += SIZE)
            vector_store(b->tile + i, vector_load_bfloat16(numbers + i));
        return;
    }
    for (int row = 0; row < rows; row++)
        load_row(b, from, slot + row, b->tile + row * b->padded);
}

/* The tile's rows as columns, so that a vector holds one number of 16 keys. */
static void turn_tile(const block *b, float *columns) {
    for (int i = 0; i < b->padded; i += SIZE)
        vector_transpose(b->tile + i, b->padded, columns + i * SIZE);
}

/* The same of 16 keys in the cache: two bfloat16 are turned as one float, then taken apart. */
static void turn_pairs(const uint16_t *keys, int size, float *columns) {
    float pairs[SIZE * SIZE];
    for (int i = 0; i < size; i += 2 * SIZE, columns += 2 * SIZE * SIZE) {
        vector_transpose((const float *)(const void *)(keys + i), size / 2, pairs);
        for (int pair = 0; pair < SIZE; pair++) {
            vector v = vector_load(pairs + pair * SIZE);
            vector_store(columns + 2 * pair * SIZE, vector_low_bfloat16(v));
            vector_store(columns + (2 * pair + 1) * SIZE, vector_high_bfloat16(v));
        }
    }
}

/* Up to 16 keys of the text from `slot` on, as columns. */
static void turn_text(const block *b, int slot, float *columns) {
    int left = b->common - slot, size = b->a->head_dim;
    if (b->a->format == MC_BFLOAT16 && left >= SIZE && size % (2 * SIZE) == 0) {
        turn_pairs((const uint16_t *)b->a->keys + (size_t)slot * (size_t)size, size, columns);
        return;
    }
    load_rows(b, b->a->keys, slot, left < SIZE ? left : SIZE);
    turn_tile(b, columns);
}

/* Fetches 16 rows of the text, which memory brings while others are computed. */
static void fetch_rows(const block *b, const void *from, int slot) {
    size_t row = bytes_of_row(b);
    if (slot + SIZE > b->common) return;
    const char *first = (const char *)from + (size_t)slot * row;
    for (size_t byte = 0; byte < SIZE * row; byte += 64) __builtin_prefetch(first + byte, 0, 2);
}

/* Loads up to 16 rows of a path from depth `depth` on; returns how many. */
static int load_path(block *b, int row, int depth, const void *from) {
    int count = b->a->depth[row] + 1 - depth;
    count = count < SIZE ? count : SIZE;
    for (int i = 0; i < count; i++)
        load_row(b, from, b->a->start + b->a->path[row][depth + i], b->tile + i * b->padded);
    return count;
}
