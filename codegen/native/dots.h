// Products of a few weight rows with a few tokens, along the inputs: what each level multiplies with, and the block.
#pragma once
#include <immintrin.h>

#include "prefetch.h"

namespace {

// Weights and tokens in float32.
struct Floats {
    using Weight = float;
    using Token = float;
    using Sum = Vec;
    using WeightVec = Vec;
    using TokenVec = Vec;
    static constexpr int64_t kStep = Vec::kLanes;
    static WeightVec weights(const Weight *p) { return Vec::load(p); }
    static WeightVec weights(const Weight *p, int64_t n) { return Vec::load(p, static_cast<int>(n)); }
    static TokenVec tokens(const Token *p) { return Vec::load(p); }
    static Sum add(Sum sum, WeightVec w, TokenVec t) { return fma(w, t, sum); }
};

// Weights in bfloat16, widened as they are read; tokens in float32.
struct Widened : Floats {
    using Weight = uint16_t;
    static WeightVec weights(const Weight *p) { return Vec::load(p); }
    static WeightVec weights(const Weight *p, int64_t n) { return Vec::load(p, static_cast<int>(n)); }
};

#ifdef DSMOE_PAIRS
// Weights and tokens in bfloat16, multiplied in pairs.
struct Pairs {
    using Weight = uint16_t;
    using Token = uint16_t;
    using Sum = Vec;
    using WeightVec = __m512bh;
    using TokenVec = __m512bh;
    static constexpr int64_t kStep = 32;
    static WeightVec weights(const Weight *p) { return (__m512bh)_mm512_loadu_si512(p); }
    static WeightVec weights(const Weight *p, int64_t n) {
        return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
    }
    static TokenVec tokens(const Token *p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Sum add(Sum sum, WeightVec w, TokenVec t) { return {_mm512_dpbf16_ps(sum.v, w, t)}; }
};
#endif

constexpr int kDotRows = 4;                            // weight rows of a block
constexpr int kDotTokens = Vec::kLanes == 16 ? 6 : 3;  // tokens of a block: as many sums as there are registers for

// sums[t · stride + r] = Σ_k w[r][k] · x[t][k], of N tokens.
template <class Dot, int N>
inline __attribute__((always_inline)) void dots(const typename Dot::Weight *const *w,
                                                const typename Dot::Token *const *x, int64_t inputs, float *sums,
                                                int stride, Reader &ahead) {
    typename Dot::Sum c[N][kDotRows];
    for (int t = 0; t < N; t++)
        for (int r = 0; r < kDotRows; r++) c[t][r] = Vec::of(0.f);
    const int64_t whole = inputs / Dot::kStep * Dot::kStep;
    for (int64_t k = 0; k < whole; k += Dot::kStep) {
        typename Dot::TokenVec v[N];
        for (int t = 0; t < N; t++) v[t] = Dot::tokens(x[t] + k);
        for (int r = 0; r < kDotRows; r++) {
            const auto a = Dot::weights(w[r] + k);
            for (int t = 0; t < N; t++) c[t][r] = Dot::add(c[t][r], a, v[t]);
        }
        ahead.step();
    }
    if (whole < inputs) {  // tokens are filled with zeros, weights end with the matrix
        for (int r = 0; r < kDotRows; r++) {
            const auto a = Dot::weights(w[r] + whole, inputs - whole);
            for (int t = 0; t < N; t++) c[t][r] = Dot::add(c[t][r], a, Dot::tokens(x[t] + whole));
        }
    }
    for (int t = 0; t < N; t++) sum_four(c[t], sums + t * stride);
}

template <class Dot>
inline void dots(int n, const typename Dot::Weight *const *w, const typename Dot::Token *const *x, int64_t inputs,
                 float *sums, int stride, Reader &ahead) {
    switch (n) {
        case 1:
            return dots<Dot, 1>(w, x, inputs, sums, stride, ahead);
        case 2:
            return dots<Dot, 2>(w, x, inputs, sums, stride, ahead);
        case 3:
            return dots<Dot, 3>(w, x, inputs, sums, stride, ahead);
#if !defined(DSMOE_FEW_REGISTERS)
        case 4:
            return dots<Dot, 4>(w, x, inputs, sums, stride, ahead);
        case 5:
            return dots<Dot, 5>(w, x, inputs, sums, stride, ahead);
        case 6:
            return dots<Dot, 6>(w, x, inputs, sums, stride, ahead);
#endif
        default:
            __builtin_unreachable();
    }
}

}  // namespace
