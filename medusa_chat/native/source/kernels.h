/* What a kernel file gives to the dispatcher: one format for one family of processors. */
#ifndef MEDUSA_KERNELS_H
#define MEDUSA_KERNELS_H

#include "matmul.h"

typedef struct {
    size_t (*row_bytes)(int inputs);
    void (*prepare)(int inputs, int count, const float *x, size_t x_stride, uint8_t *prepared);
    void (*matmul)(const mc_matrix *matrix, const uint8_t *prepared, int rows, int first, int last,
                   int following, float *y, size_t y_stride);
} mc_kernel;

/* The packed forms. All variants share them, so that a packed file serves every processor.
 * Outputs come in groups of 16, padded to whole tiles; a group is contiguous:
 *   float32   [inputs][16]
 *   bfloat16  [inputs / 2][16][2]
 *   int8      [inputs / 4][16][4], code + 128; a scale an output behind all groups
 *   nf4       [inputs / 64] of 16 absmax and [8][16][4] bytes; a byte holds inputs i and i + 4 */
enum {
    MC_GROUP = 16,
    MC_BLOCK = 64,        /* inputs that share a scale of the activations, and an absmax of nf4 */
    MC_NF4_CHUNK = 64,    /* bytes that hold eight inputs of a group */
    MC_NF4_BLOCK_BYTES = MC_GROUP * sizeof(float) + MC_GROUP * MC_BLOCK / 2,
};

static inline int mc_steps(int inputs, int width) { return (inputs + width - 1) / width; }

static inline int mc_padded_outputs(int outputs) {
    return mc_steps(outputs, MC_TILE) * MC_TILE;
}

/* Bytes of 16 outputs, without the scales of int8. */
static inline size_t mc_group_bytes(mc_format format, int inputs) {
    switch (format) {
    case MC_FLOAT32: return (size_t)inputs * 64;
    case MC_BFLOAT16: return (size_t)mc_steps(inputs, 2) * 64;
    case MC_INT8: return (size_t)mc_steps(inputs, 4) * 64;
    case MC_NF4: return (size_t)(inputs / MC_BLOCK) * MC_NF4_BLOCK_BYTES;
    }
    return 0;
}

/* Rows lie an odd number of cache lines apart, so that eight rows never share a cache set. */
static inline size_t mc_row_stride(size_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

/* bitsandbytes' 16 values of nf4. */
extern const float mc_nf4_values[16];

static inline uint16_t mc_to_bfloat16(float value) {
    union { float real; uint32_t bits; } word = {value};
    uint32_t rounded = (word.bits + 0x7fff + (word.bits >> 16 & 1)) >> 16;
    uint32_t not_a_number = word.bits >> 16 | 0x40;
    return (word.bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded;
}

static inline float mc_from_bfloat16(uint16_t value) {
    union { uint32_t bits; float real; } word = {(uint32_t)value << 16};
    return word.real;
}

#endif
