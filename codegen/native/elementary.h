// Elementary functions of vectors, and pointwise terms of blocks of numbers. A level includes its vectors before.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "term_limits.h"

namespace {

inline Vec clamp(Vec a, Vec low, Vec high) { return ordered_minimum(high, ordered_maximum(low, a)); }

// NaN where either is.
inline Vec maximum(Vec a, Vec b) { return select(equal(a, a), ordered_maximum(a, b), a); }
inline Vec minimum(Vec a, Vec b) { return select(equal(a, a), ordered_minimum(a, b), a); }

inline Vec sign(Vec a) {
    const Vec zero = Vec::of(0.f), one = Vec::of(1.f);
    return select(less(zero, a), one, select(less(a, zero), zero - one, zero));
}

// ((c0·x + c1)·x + c2)…
template <int N>
inline Vec polynomial(Vec x, const float (&coefficients)[N]) {
    Vec p = Vec::of(coefficients[0]);
    for (int i = 1; i < N; i++) p = fma(p, x, Vec::of(coefficients[i]));
    return p;
}

constexpr float kLow = -86.64339f;  // e to it is 2⁻¹²⁵

// e^r − 1 for |r| ≤ ln 2 / 2 (Cephes expf).
inline Vec exponential_near_zero(Vec r) {
    const float terms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    return fma(polynomial(r, terms), r * r, r);
}

// eˣ to 2 units in the last place, by 2ⁿ·e^r with |r| ≤ ln 2 / 2; 2⁻¹²⁵ for all that is below it.
inline Vec exponential_above(Vec x) {
    const Vec one = Vec::of(1.f), inside = clamp(x, Vec::of(kLow), Vec::of(89.4f));  // the upper one is past infinity
    const Vec n = nearest_integer(inside * Vec::of(1.44269504088896341f));
    Vec r = fma(n, Vec::of(-0.693359375f), inside);
    r = fma(n, Vec::of(2.12194440e-4f), r);
    const Vec e = exponential_near_zero(r) + one;
    return scale_by_power(e + e, n - one);  // 2¹²⁸ is no number, 2·2¹²⁷ is infinity where it has to be
}

inline Vec exponential(Vec x) { return select(less(x, Vec::of(kLow)), Vec::of(0.f), exponential_above(x)); }

inline Vec sigmoid(Vec x) { return Vec::of(1.f) / (Vec::of(1.f) + exponential_above(Vec::of(0.f) - x)); }

inline Vec silu(Vec x) { return x / (Vec::of(1.f) + exponential_above(Vec::of(0.f) - x)); }

// Cephes tanhf: a polynomial near 0, by eˣ elsewhere.
inline Vec hyperbolic_tangent(Vec x) {
    const float terms[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                           -3.33332819422e-1f};
    const Vec one = Vec::of(1.f), two = Vec::of(2.f), square = x * x;
    const Vec near = fma(polynomial(square, terms) * square, x, x);
    const Vec far = one - two / (exponential(two * absolute(x)) + one);
    return select(less(absolute(x), Vec::of(0.625f)), near, select(less(x, Vec::of(0.f)), Vec::of(0.f) - far, far));
}

// Cephes erff up to 1; above it Abramowitz and Stegun, 7.1.26 (within 1.5e-7).
inline Vec error_function(Vec x) {
    const float inner[] = {7.853861353153693e-5f, -8.010193625184903e-4f, 5.188327685732524e-3f, -2.685381193529856e-2f,
                           1.128358514861418e-1f, -3.761262582423300e-1f, 1.128379165726710e+0f};
    const float outer[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f, 0.f};
    const Vec one = Vec::of(1.f), size = absolute(x), square = x * x;
    const Vec near = x * polynomial(square, inner);
    const Vec t = one / fma(Vec::of(0.3275911f), size, one);
    const Vec far = one - polynomial(t, outer) * exponential(Vec::of(0.f) - square);
    return select(less(size, one), near, select(less(x, Vec::of(0.f)), Vec::of(0.f) - far, far));
}

inline Vec elu(Vec a, Vec alpha, Vec scale, Vec input_scale) {
    const Vec x = a * input_scale, near = exponential_near_zero(x), far = exponential(x) - Vec::of(1.f);
    const Vec below = alpha * scale * select(less(absolute(x), Vec::of(0.34f)), near, far);
    return select(less(Vec::of(0.f), a), a * scale, below);
}

// Numbers of leaves come first, then those of operators.
enum Leaf : int32_t { kProduct, kVector, kConstant, kWeight, kLeaves };
enum Operator : int32_t {
    kBeforeOperators = kLeaves - 1,
#define VECTOR(name, expression) kOp_##name,
#define SCALAR VECTOR
#include "operators.def"
#undef VECTOR
#undef SCALAR
};

// What a block's term reads. A block is `rows` × `columns` numbers; the columns of rows that are tokens are outputs
// `column`, `column + 1`, …, and the other way round where the tokens are in the lanes.
struct Reads {
    const float *products[2];
    const float *weights;  // one for each token
    const Vector *vectors;
    int64_t expert, column;
    int valid;  // outputs that there are
};

// A leaf's numbers, spread over a block.
template <bool kTokensInLanes>
inline void spread(const Instruction &line, const Reads &reads, int rows, int columns, float *to) {
    if (line.op == kConstant) {
        for (int i = 0; i < rows * columns; i++) to[i] = line.constants[0];
        return;
    }
    const bool by_token = line.op == kWeight;
    float outputs[64];
    const float *from = reads.weights;
    if (!by_token) {
        const Vector &vector = reads.vectors[line.args[0]];
        const int width = kTokensInLanes ? rows : columns;
        for (int i = 0; i < width; i++) {
            const int64_t column = reads.column + (i < reads.valid ? i : 0);
            outputs[i] =
                number(vector.data, vector.dtype, reads.expert * vector.per_expert + column * vector.per_column);
        }
        from = outputs;
    }
    if (by_token == kTokensInLanes) {  // along a row
        for (int r = 0; r < rows; r++) memcpy(to + r * columns, from, sizeof(float) * columns);
    } else {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < columns; c++) to[r * columns + c] = from[r];
    }
}

// The term's value: a block in `scratch` (kBlock numbers a line), or one of the products.
template <bool kTokensInLanes>
inline const float *evaluate(const Term &term, const Reads &reads, int rows, int columns, float *scratch) {
    const float *values[kMaxLines];
    const int count = rows * columns;
    const Vec zero = Vec::of(0.f), half = Vec::of(0.5f), one = Vec::of(1.f);
    (void)half;
    for (int i = 0; i < term.count; i++) {
        const Instruction &line = term.lines[i];
        if (line.op == kProduct) {
            values[i] = reads.products[line.args[0]];
            continue;
        }
        float *to = scratch + i * kBlock;
        values[i] = to;
        if (line.op < kLeaves) {
            spread<kTokensInLanes>(line, reads, rows, columns, to);
            continue;
        }
        const float *pa = values[line.args[0]], *pb = values[line.args[1]], *pc = values[line.args[2]];
        switch (line.op) {
#define VECTOR(name, expression)                                                                                     \
    case kOp_##name: {                                                                                               \
        const Vec k0 = Vec::of(line.constants[0]), k1 = Vec::of(line.constants[1]), k2 = Vec::of(line.constants[2]); \
        (void)k0, (void)k1, (void)k2;                                                                                \
        for (int j = 0; j < count; j += Vec::kLanes) {                                                               \
            const Vec a = Vec::load(pa + j), b = Vec::load(pb + j), c = Vec::load(pc + j);                           \
            (void)b, (void)c;                                                                                        \
            (expression).store(to + j);                                                                              \
        }                                                                                                            \
        break;                                                                                                       \
    }
#define SCALAR(name, expression)                                    \
    case kOp_##name: {                                              \
        const float k0 = line.constants[0], k1 = line.constants[1]; \
        (void)k0, (void)k1;                                         \
        for (int j = 0; j < count; j++) {                           \
            const float a = pa[j];                                  \
            to[j] = expression;                                     \
        }                                                           \
        break;                                                      \
    }
#include "operators.def"
#undef VECTOR
#undef SCALAR
            default:
                break;
        }
    }
    return values[term.count - 1];
}

}  // namespace
