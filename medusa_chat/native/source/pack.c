/* The packed forms of weights, written in plain C: packing happens once. */
#include "kernels.h"

#include <math.h>
#include <string.h>

const float mc_nf4_values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

size_t mc_packed_bytes(mc_format format, int outputs, int inputs) {
    if (outputs < 1 || inputs < 1 || (format == MC_NF4 && inputs % MC_NF4_BLOCK)) {
        return 0;
    }
    size_t padded = (size_t)mc_padded_outputs(outputs);
    size_t scales = format == MC_INT8 ? padded * sizeof(float) : 0;
    return padded / MC_GROUP * mc_group_bytes(format, inputs) + scales;
}

static uint8_t *group_of(mc_format format, int inputs, int output, void *packed) {
    return (uint8_t *)packed + (size_t)(output / MC_GROUP) * mc_group_bytes(format, inputs);
}

static float *scale_of(int outputs, int inputs, int output, void *packed) {
    size_t groups = (size_t)mc_padded_outputs(outputs) / MC_GROUP;
    uint8_t *scales = (uint8_t *)packed + groups * mc_group_bytes(MC_INT8, inputs);
    return (float *)scales + output;
}

static float weight_at(const void *weights, mc_format source, size_t index) {
    if (source == MC_BFLOAT16) {
        return mc_from_bfloat16(((const uint16_t *)weights)[index]);
    }
    return ((const float *)weights)[index];
}

static void put_float32(int inputs, const void *row, mc_format source, float *lane) {
    for (int input = 0; input < inputs; input++) {
        lane[(size_t)input * MC_GROUP] = weight_at(row, source, input);
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

static float largest(int inputs, const void *row, mc_format source, int first) {
    float most = 0;
    for (int input = first; input < inputs; input++) {
        most = fmaxf(most, fabsf(weight_at(row, source, input)));
    }
    return most;
}

static uint8_t *code_at(uint8_t *lane, int input) {
    return lane + (size_t)(input / 4) * MC_GROUP * 4 + input % 4;
}

static void pad_int8(int inputs, uint8_t *lane) {
    for (int input = inputs; input % 4; input++) {
        *code_at(lane, input) = 128;
    }
}

static float put_int8(int inputs, const void *row, mc_format source, uint8_t *lane) {
    float scale = largest(inputs, row, source, 0) / 127;
    for (int input = 0; input < inputs; input++) {
        float value = scale > 0 ? weight_at(row, source, input) / scale : 0;
        *code_at(lane, input) = (uint8_t)(128 + (int)fminf(127, fmaxf(-127, rintf(value))));
    }
    pad_int8(inputs, lane);
    return scale;
}

/* Inputs 8c to 8c + 7 of a group share chunk c: input 8c + 2v + p of an output sits in the word
 * [output][p], at bits 4v and up, so that one shift gives the indices of a pair of inputs. */
static void put_nf4_code(uint8_t *group, int lane, int input, unsigned code) {
    uint8_t *block = group + (size_t)(input / MC_NF4_BLOCK) * MC_NF4_BLOCK_BYTES;
    uint8_t *chunk = block + MC_GROUP * sizeof(float) + input % MC_NF4_BLOCK / 8 * MC_NF4_CHUNK;
    uint16_t *word = (uint16_t *)chunk + lane * 2 + input % 2;
    int shift = input % 8 / 2 * 4;
    *word = (uint16_t)((*word & ~(15u << shift)) | code << shift);
}

static void put_nf4_absmax(uint8_t *group, int lane, int block, float absmax) {
    ((float *)(group + (size_t)block * MC_NF4_BLOCK_BYTES))[lane] = absmax;
}

/* bitsandbytes compares with the middles between its values. */
static unsigned nearest_nf4(float value) {
    unsigned code = 0;
    while (code < 15 && value > (mc_nf4_values[code] + mc_nf4_values[code + 1]) / 2) {
        code++;
    }
    return code;
}

static void put_nf4(int inputs, const void *row, mc_format source, uint8_t *group, int lane) {
    for (int first = 0; first < inputs; first += MC_NF4_BLOCK) {
        float absmax = largest(first + MC_NF4_BLOCK, row, source, first);
        put_nf4_absmax(group, lane, first / MC_NF4_BLOCK, absmax);
        for (int input = first; input < first + MC_NF4_BLOCK; input++) {
            float value = absmax > 0 ? weight_at(row, source, input) * (1 / absmax) : 0;
            put_nf4_code(group, lane, input, nearest_nf4(value));
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
        for (int input = 0; input < inputs; input++) {
            *code_at(lane, input) = (uint8_t)(codes[(size_t)index * inputs + input] + 128);
        }
        pad_int8(inputs, lane);
        *scale_of(outputs, inputs, output, packed) = scales[index];
    }
    finish(MC_INT8, outputs, inputs, first_output + count, packed);
}

void mc_pack_nf4(int outputs, int inputs, int first_output, int count, const uint8_t *codes,
                 const float *absmax, void *packed) {
    int blocks = inputs / MC_NF4_BLOCK;
    for (int index = 0; index < count; index++) {
        int output = first_output + index;
        int lane = output % MC_GROUP;
        uint8_t *group = group_of(MC_NF4, inputs, output, packed);
        for (int block = 0; block < blocks; block++) {
            put_nf4_absmax(group, lane, block, absmax[(size_t)index * blocks + block]);
        }
        for (int input = 0; input < inputs; input++) {
            unsigned both = codes[((size_t)index * inputs + input) / 2];
            put_nf4_code(group, lane, input, input % 2 ? both & 15 : both >> 4);
        }
    }
    finish(MC_NF4, outputs, inputs, first_output + count, packed);
}
