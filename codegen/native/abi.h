// What crosses the C interface: a layer's experts, and one call. Sizes and strides are in elements.
//
// Letters: T tokens, D model width, F hidden width of an expert, E experts, K slots of a token, P = T·K pairs.
#pragma once
#include <cstdint>
#include <cstring>

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// E matrices: the number (expert, output, input) lies at data[expert·per_expert + output·per_output + input·per_input].
struct Matrix {
    const void *data;
    int64_t per_expert, per_output, per_input;
};

// A vector of each expert, at data[expert·per_expert + column·per_column]; per_column 0: one number for all columns.
struct Vector {
    const void *data;
    int64_t per_expert, per_column;
    int32_t dtype;
};

// One line of a pointwise term: an operator (operators.def) of earlier lines and constants.
struct Instruction {
    int32_t op;
    int32_t args[3];
    float constants[3];
};

// A pointwise term in value-numbered form; the last line is its value. No lines: there is no term.
struct Term {
    const Instruction *lines;
    int32_t count;
    int32_t weighs;  // whether a line reads the token's weight
};

// FFNs that lie alike: y = last(down · middle(first[0] · x', first[1] · x')), x' = x · factor(w), times w if weighted.
struct Ffn {
    int64_t experts, hidden, width, out;  // E, D, F, and the outputs' width
    int32_t dtype;                        // of x and of the matrices
    int32_t products;                     // 1 or 2
    int32_t weighted;
    Matrix first[2];  // (F, D) each
    Matrix down;      // (out, F)
    Term factor, middle, last;
    const Vector *vectors;  // the terms' vectors, by number
};

// out[t] = Σ_k routed(x[t]) of expert ids[t·K + k], plus shared(x[t]); id −1 adds nothing.
struct Call {
    const void *x;
    int64_t per_token;  // from one of x's rows to the next
    int64_t tokens, slots;
    const int64_t *ids;   // (T, K), dense
    const void *weights;  // (T, K), dense; null where no term reads them
    const void *gates;    // (T,), dense: the weights of the shared experts; null likewise
    int32_t weights_dtype, gates_dtype, out_dtype;
    void *out;  // (T, out), dense
    int32_t threads;
    int32_t level;
};

// A number of a tensor. (Static: every level compiles its own.)
static inline float number(const void *data, int32_t dtype, int64_t at) {
    if (dtype == kFloat32) return static_cast<const float *>(data)[at];
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t *>(data)[at]) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
