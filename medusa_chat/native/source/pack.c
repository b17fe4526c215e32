/* The packed forms of weights, written in plain C: packing happens once. */
#include "kernels.h"
#include "rounding.h"

#include <string.h>

const float mc_nf4_values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

size_t mc_packed_bytes(mc_format format, int outputs, int inputs) {
    if (outputs < 1 || inputs < 1 || (format == MC_NF4 && inputs % MC_BLOCK)) {
        return 0;
    }
    size_t padded = (size_t)mc_padded_outputs(outputs);
    size_t scales = format == MC_INT8 ? padded * sizeof(float) : 0;
    return padded / MC_GROUP * mc_group_bytes(format, inputs) + scales;
}

static uint8_t *group_of(mc_format format, int inputs, int output, const void *packed) {
    uint8_t *start = (uint8_t *)(uintptr_t)packed;
    return start + (size_t)(output / MC_GROUP) * mc_group_bytes(format, inputs);
}

static float *scale_of(int outputs, int inputs, int output, const void *packed) {
    size_t groups = (size_t)mc_padded_outputs(outputs) / MC_GROUP;
    uint8_t *scales = (uint8_t *)(uintptr_t)packed + groups * mc_group_bytes(MC_INT8, inputs);
    return (float *)scales + output;
}

enum { PIECE = 256 }; /* inputs of a row that are converted at a time; whole blocks of nf4 */

/* The weights of a row from `first` on, up to PIECE of them; returns how many. */
static int widen(int inputs, const void *row, mc_format source, int first, float *to) {
    int count = inputs - first < PIECE ? inputs - first : PIECE;
    if (source == MC_FLOAT32) {
        memcpy(to, (const float *)row + first, (size_t)count * sizeof *to);
        return count;
    }
    const uint16_t *from = (const uint16_t *)row + first;
    for (int index = 0; index < count; index++) {
        to[index] = mc_from_bfloat16(from[index]);
    }
    return count;
}

static float largest_of_row(int inputs, const void *row, mc_format source) {
    float most = 0;
    float weights[PIECE];
    for (int first = 0; first < inputs; first += PIECE) {
        float here = magnitude(weights, widen(inputs, row, source, first, weights));
        most = here > most ? here : most;
    }
    return most;
}

static void put_float32(int inputs, const void *row, mc_format source, float *lane) {
    float weights[PIECE];
    for (int first = 0; first < inputs; first += PIECE) {
        int count = widen(inputs, row, source, first, weights);
        for (int index = 0; index < count; index++) {
            lane[(size_t)(first + index) * MC_GROUP] = weights[index];
        }
    }
}

static void put_bfloat16(int inputs, const void *row, mc_format source, uint16_t *lane) {
    for (int input = 0; input < inputs; input++) {
        uint16_t value = source == MC_BFLOAT16 ? ((const uint16_t *)row)[input]
                                               : mc_to_bfloat16(((const float *)row)[input]);
        lane[(size_t)(input / 2) * MC_GROUP * 2 + input % 2] = value;
    }
    if (inputs % 2) {
        lane[(size_t)(inputs / 2) * MC_GROUP * 2 + 1] = 0;
    }
}

/* Codes of inputs `first` and up, in fours; those that pad the last four stand for 0. */
static void put_int8_codes(uint8_t *codes, int first, int count, uint8_t *lane) {
    for (int index = count; index % 4; index++) {
        codes[index] = 128;
    }
    for (int index = 0; index < count; index += 4) {
        memcpy(lane + (size_t)((first + index) / 4) * MC_GROUP * 4, codes + index, 4);
    }
}

static uint8_t int8_code(float value) {
    float bounded = value < -127 ? -127 : value > 127 ? 127 : value;
    return (uint8_t)(nearest(bounded) + 128);
}

static float put_int8(int inputs, const void *row, mc_format source, uint8_t *lane) {
    float scale = largest_of_row(inputs, row, source) / 127;
    float weights[PIECE];
    uint8_t codes[PIECE];
    for (int first = 0; first < inputs; first += PIECE) {
        int count = widen(inputs, row, source, first, weights);
        for (int index = 0; index < count; index++) {
            codes[index] = int8_code(scale > 0 ? weights[index] / scale : 0);
        }
        put_int8_codes(codes, first, count, lane);
    }
    return scale;
}

/* Inputs 8c to 8c + 7 of a group share chunk c: byte j of an output holds input 8c + j in its low
 * half and input 8c + 4 + j in its high half. */
static void put_nf4_block(uint8_t *group, int lane, int block, float absmax, const uint8_t *codes) {
    uint8_t *start = group + (size_t)block * MC_NF4_BLOCK_BYTES;
    ((float *)start)[lane] = absmax;
    uint8_t *bytes = start + MC_GROUP * sizeof(float) + lane * 4;
    for (int input = 0; input < MC_BLOCK; input += 8) {
        for (int j = 0; j < 4; j++) {
            bytes[j] = (uint8_t)(codes[input + j] | codes[input + 4 + j] << 4);
        }
        bytes += MC_NF4_CHUNK;
    }
}

/* bitsandbytes compares with the middles between its values. */
static void nf4_codes(const float *weights, float absmax, uint8_t *codes) {
    float inverse = absmax > 0 ? 1 / absmax : 0;
    int32_t above[MC_BLOCK] = {0};
    for (int code = 0; code < 15; code++) {
        float middle = (mc_nf4_values[code] + mc_nf4_values[code + 1]) / 2;
        for (int input = 0; input < MC_BLOCK; input++) {
            above[input] += weights[input] * inverse > middle;
        }
    }
    for (int input = 0; input < MC_BLOCK; input++) {
        codes[input] = (uint8_t)above[input];
    }
}

static void put_nf4(int inputs, const void *row, mc_format source, uint8_t *group, int lane) {
    float weights[PIECE];
    uint8_t codes[MC_BLOCK];
    for (int first = 0; first < inputs; first += PIECE) {
        int count = widen(inputs, row, source, first, weights);
        for (int index = 0; index < count; index += MC_BLOCK) {
            float absmax = magnitude(weights + index, MC_BLOCK);
            nf4_codes(weights + index, absmax, codes);
            put_nf4_block(group, lane, (first + index) / MC_BLOCK, absmax, codes);
        }
    }
}

/* Outputs that only pad the last tile hold zeros. Every form keeps four bytes of an output in each
 * line of 64. */
static void pad_outputs(mc_format format, int outputs, int inputs, void *packed) {
    size_t bytes = mc_group_bytes(format, inputs);
    for (int output = outputs; output < mc_padded_outputs(outputs); output++) {
        uint8_t *group = group_of(format, inputs, output, packed);
        for (size_t line = 0; line < bytes; line += 64) {
            memset(group + line + output % MC_GROUP * 4, format == MC_INT8 ? 128 : 0, 4);
        }
        if (format == MC_INT8) {
            *scale_of(outputs, inputs, output, packed) = 0;
        }
    }
}

static void finish(mc_format format, int outputs, int inputs, int end, void *packed) {
    if (end == outputs) {
        pad_outputs(format, outputs, inputs, packed);
    }
}

void mc_pack(mc_format format, int outputs, int inputs, int first_output, int count,
             const void *weights, mc_format source, void *packed) {
    size_t width = source == MC_BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
    for (int index = 0; index < count; index++) {
        const uint8_t *row = (const uint8_t *)weights + (size_t)index * inputs * width;
        int output = first_output + index;
        int lane = output % MC_GROUP;
        uint8_t *group = group_of(format, inputs, output, packed);
        switch (format) {
        case MC_FLOAT32: put_float32(inputs, row, source, (float *)group + lane); break;
        case MC_BFLOAT16: put_bfloat16(inputs, row, source, (uint16_t *)group + lane * 2); break;
        case MC_NF4: put_nf4(inputs, row, source, group, lane); break;
        case MC_INT8:
            *scale_of(outputs, inputs, output, packed) =
                put_int8(inputs, row, source, group + lane * 4);
        }
    }
    finish(format, outputs, inputs, first_output + count, packed);
}

void mc_pack_int8(int outputs, int inputs, int first_output, int count, const int8_t *codes,
                  const float *scales, void *packed) {
    for (int index = 0; index < count; index++) {
        int output = first_output + index;
        uint8_t *lane = group_of(MC_INT8, inputs, output, packed) + output % MC_GROUP * 4;
        const int8_t *row = codes + (size_t)index * inputs;
        for (int first = 0; first < inputs; first += PIECE) {
            uint8_t piece[PIECE];
            int many = inputs - first < PIECE ? inputs - first : PIECE;
            for (int input = 0; input < many; input++) {
                piece[input] = (uint8_t)(row[first + input] + 128);
            }
            put_int8_codes(piece, first, many, lane);
        }
        *scale_of(outputs, inputs, output, packed) = scales[index];
    }
    finish(MC_INT8, outputs, inputs, first_output + count, packed);
}

void mc_pack_nf4(int outputs, int inputs, int first_output, int count, const uint8_t *codes,
                 const float *absmax, void *packed) {
    int blocks = inputs / MC_BLOCK;
    for (int index = 0; index < count; index++) {
        int output = first_output + index;
        int lane = output % MC_GROUP;
        uint8_t *group = group_of(MC_NF4, inputs, output, packed);
        for (int block = 0; block < blocks; block++) {
            uint8_t nibbles[MC_BLOCK];
            size_t first = (size_t)index * inputs + (size_t)block * MC_BLOCK;
            for (int input = 0; input < MC_BLOCK; input += 2) {
                unsigned both = codes[(first + input) / 2];
                nibbles[input] = (uint8_t)(both >> 4);
                nibbles[input + 1] = both & 15;
            }
            put_nf4_block(group, lane, block, absmax[(size_t)index * blocks + block], nibbles);
        }
    }
    finish(MC_NF4, outputs, inputs, first_output + count, packed);
}

int mc_pack_rows(const mc_matrix *matrix, const int32_t *rows, int count, void *packed) {
    for (int output = 0; output < count; output++)
        if (rows[output] < 0 || rows[output] >= matrix->outputs) return -1;
    mc_format format = matrix->format;
    int inputs = matrix->inputs;
    size_t bytes = mc_group_bytes(format, inputs);
    for (int output = 0; output < count; output++) {
        const uint8_t *from = group_of(format, inputs, rows[output], matrix->packed);
        uint8_t *to = group_of(format, inputs, output, packed);
        from += rows[output] % MC_GROUP * 4;
        to += output % MC_GROUP * 4;
        for (size_t line = 0; line < bytes; line += 64) memcpy(to + line, from + line, 4);
        if (format == MC_INT8)
            *scale_of(count, inputs, output, packed) =
                *scale_of(matrix->outputs, inputs, rows[output], matrix->packed);
    }
    finish(format, count, inputs, count, packed);
    return 0;
}
