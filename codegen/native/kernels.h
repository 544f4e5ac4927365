// What a level of instructions provides, and what the schedule gives it to do.
#pragma once
#include <cstddef>

#include "abi.h"

// The rows of one expert, or a part of them. Row i is the pair pairs[i], or first_pair + i without a list; a pair's
// token is pair / slots.
struct Rows {
    const Ffn *ffn;
    int64_t expert;
    const int32_t *pairs;
    int32_t first_pair, count;
    int32_t tiled;  // the level's choice: so many of them, the first ones, lie packed in tiles or lanes
    char *packed;   // the tokens as the level reads them, where it does not read x itself
    char *hidden;   // the middle term's rows

    int64_t pair(int32_t i) const { return pairs ? pairs[i] : first_pair + i; }
};

// The tokens and where their experts' rows go, in float32: y[pair · out].
struct Batch {
    const char *x;
    int64_t per_token, slots;
    const float *weights;  // by pair; none where no term reads them
    float *y;
    bool past_caches;  // y is too large to stay in a cache, and its rows begin at cache lines
};

// Memory that is read next: up to two stretches, walked side by side while something else is computed.
struct Ahead {
    const char *at[2] = {nullptr, nullptr};
    int64_t lines = 0;  // cache lines of each
};

// A worker's own memory: `values` for terms, `panels` for weights that are not read where they lie.
struct Worker {
    float *values;
    char *panels;
};

// Which outputs of a product, and what is read after them.
struct Range {
    int64_t from, to;
    Ahead next;
};

// Outputs that are computed together: of the first products, and of the last.
constexpr int64_t kHiddenStep = 32, kOutStep = 64;

struct Kernels {
    int32_t (*tiled)(const Ffn &, int32_t rows);
    size_t (*packed_bytes)(const Rows &);
    size_t (*hidden_bytes)(const Rows &);
    size_t (*panel_bytes)(const Ffn &);
    void (*enter)();  // each worker, before the first kernel
    void (*leave)();  // and after the last
    void (*pack)(const Batch &, const Rows &, Worker &);
    void (*first)(const Batch &, const Rows &, const Range &, Worker &);
    void (*second)(const Batch &, const Rows &, const Range &, Worker &);
    // out[i] = Σ factors[r] · rows[r][i], in their order, as float32 or bfloat16.
    void (*add)(const float *const *rows, const float *factors, int count, int64_t width, int32_t dtype, void *out);
};

extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmx;

inline size_t element_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What products of so many outputs, from `from` on, read where their inputs are side by side.
inline Ahead stretch(const Ffn &ffn, const Matrix *matrices, int count, int64_t expert, int64_t from, int64_t outputs,
                     int64_t inputs) {
    Ahead ahead;
    if (outputs < 1) return ahead;
    const size_t size = element_bytes(ffn.dtype);
    for (int m = 0; m < count; m++) {
        const Matrix &matrix = matrices[m];
        if (matrix.per_input != 1) return Ahead();
        const char *at =
            static_cast<const char *>(matrix.data) + (expert * matrix.per_expert + from * matrix.per_output) * size;
        ahead.at[m] = at;
        ahead.lines = ((outputs - 1) * matrix.per_output + inputs) * size / 64;
    }
    if (count == 1) {  // in two halves
        ahead.lines /= 2;
        ahead.at[1] = ahead.at[0] + ahead.lines * 64;
    } else if (ahead.at[1] > ahead.at[0] && ahead.at[1] < ahead.at[0] + ahead.lines * 64 / 2) {  // interleaved
        ahead.lines /= 2;
        ahead.at[1] = ahead.at[0] + ahead.lines * 64;
    }
    return ahead;
}

inline Ahead before_first(const Rows &rows, int64_t from, int64_t to) {
    const Ffn &f = *rows.ffn;
    return stretch(f, f.first, f.products, rows.expert, from, to - from, f.hidden);
}

inline Ahead before_second(const Rows &rows, int64_t from, int64_t to) {
    const Ffn &f = *rows.ffn;
    return stretch(f, &f.down, 1, rows.expert, from, to - from, f.width);
}
