/* Products of a few rows with a packed matrix: y = x W^T + bias.
 *
 * Every sum runs over the inputs in one fixed order that depends on the matrix alone. The result
 * of a row is therefore the same, bit for bit, whichever rows are computed beside it and however
 * the outputs are split among threads.
 */
#ifndef MEDUSA_MATMUL_H
#define MEDUSA_MATMUL_H

#include <stddef.h>
#include <stdint.h>

typedef enum { MC_FLOAT32, MC_BFLOAT16, MC_INT8, MC_NF4 } mc_format;

/* Outputs that a kernel computes together: threads split a matrix at multiples of it. */
enum { MC_TILE = 32 };

typedef struct {
    mc_format format;
    int outputs;
    int inputs;
    const void *packed; /* written by mc_pack or mc_pack_nf4, scales included; 64-byte aligned */
    const float *bias;  /* [outputs], or NULL */
} mc_matrix;

/* Bytes of a packed matrix, or 0 where the format cannot hold such sizes. */
size_t mc_packed_bytes(mc_format format, int outputs, int inputs);

/* Pack rows of float32 or bfloat16 weights [outputs, inputs], first_output on; the rest may follow
 * in later calls. int8 rounds with one scale a row, nf4 as bitsandbytes does (blocks of 64). */
void mc_pack(mc_format format, int outputs, int inputs, int first_output, int count,
             const void *weights, mc_format source, void *packed);

/* Pack int8 weights [count, inputs] with a scale a row: weight = code * scale. */
void mc_pack_int8(int outputs, int inputs, int first_output, int count, const int8_t *codes,
                  const float *scales, void *packed);

/* Pack bitsandbytes' nf4: two codes a byte (high nibble first), absmax for each 64 inputs. */
void mc_pack_nf4(int outputs, int inputs, int first_output, int count, const uint8_t *codes,
                 const float *absmax, void *packed);

/* Take `count` rows of a packed matrix, in any order, as one of the same format. 0, or -1 for rows
 * that it does not have; then nothing was done. */
int mc_pack_rows(const mc_matrix *matrix, const int32_t *rows, int count, void *packed);

/* Bytes of `rows` rows in the form that mc_matmul reads; each row is prepared by itself. */
size_t mc_rows_bytes(mc_format format, int rows, int inputs);
void mc_prepare_rows(mc_format format, int inputs, int rows, int first_row, int count,
                     const float *x, size_t x_stride, void *prepared);

/* Outputs first to last - 1 (first a multiple of MC_TILE) of all rows into
 * y[row * y_stride + output]. Meanwhile the weights of output `following` and those behind it are
 * fetched; -1 for none. */
void mc_matmul(const mc_matrix *matrix, const void *prepared, int rows, int first, int last,
               int following, float *y, size_t y_stride);

/* Fetch the weights of a tile, so that a matmul that begins there soon finds them in the cache. */
void mc_fetch(const mc_matrix *matrix, int output);

#endif
