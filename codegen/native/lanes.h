// An expert's rows with a token in every lane: for many rows, and without AMX.
//
// Tokens are packed once, input by input: the numbers that a block of some vectors of tokens has at one input, or at a
// pair of bfloat16 inputs, lie side by side. A weight is spread over the lanes and multiplies them all, so that nothing
// is left to add up across lanes, and a product's numbers come out as the next product wants its tokens.
#pragma once
#include "rows.h"

namespace {

// One input, or pair of inputs, of N vectors of tokens times R rows of weights. x: the packed vectors at that input.
template <class Dot, int R, int N>
struct Spread {  // in float32
    static constexpr int64_t kInputs = 1;
    static inline __attribute__((always_inline)) void step(Vec (&c)[R][N], const float *w, int64_t stride,
                                                           const float *x) {
        Vec v[N];
        for (int n = 0; n < N; n++) v[n] = Vec::load(x + n * Vec::kLanes);
        for (int r = 0; r < R; r++) {
            const Vec a = Vec::of(w[r * stride]);
            for (int n = 0; n < N; n++) c[r][n] = fma(a, v[n], c[r][n]);
        }
    }
};

template <int R, int N>
struct Spread<Widened, R, N> {  // two inputs: their weights are the halves of one number of 32 bits
    static constexpr int64_t kInputs = 2;
    static inline __attribute__((always_inline)) void step(Vec (&c)[R][N], const uint16_t *w, int64_t stride,
                                                           const float *x) {
        for (int half = 0; half < 2; half++) {
            Vec v[N];
            for (int n = 0; n < N; n++) v[n] = Vec::load(x + (half * N + n) * Vec::kLanes);
            for (int r = 0; r < R; r++) {
                const Vec a = half ? Vec::of_high(w + r * stride) : Vec::of_low(w + r * stride);
                for (int n = 0; n < N; n++) c[r][n] = fma(a, v[n], c[r][n]);
            }
        }
    }
};

#ifdef DSMOE_PAIRS
template <int R, int N>
struct Spread<Pairs, R, N> {
    static constexpr int64_t kInputs = 2;
    static inline __attribute__((always_inline)) void step(Vec (&c)[R][N], const uint16_t *w, int64_t stride,
                                                           const float *x) {
        __m512bh v[N];
        for (int n = 0; n < N; n++) v[n] = (__m512bh)_mm512_loadu_ps(x + n * Vec::kLanes);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            memcpy(&pair, w + r * stride, sizeof pair);
            const __m512bh a = (__m512bh)_mm512_set1_epi32(pair);
            for (int n = 0; n < N; n++) c[r][n] = {_mm512_dpbf16_ps(c[r][n].v, a, v[n])};
        }
    }
};
#endif

template <class Dot>
struct ByLanes {
    using Weight = typename Dot::Weight;
    using Token = typename Dot::Token;
    using Whole = ByRows<Dot>;
    static constexpr int kLanes = Vec::kLanes;
    static constexpr int kMost = kLanes == 16 ? 6 : 3;                    // vectors of a block
    static constexpr int64_t kPerNumber = sizeof(float) / sizeof(Token);  // inputs in 32 bits of packed tokens
    static constexpr int64_t kEven = sizeof(Weight) == 2 ? 2 : 1;         // inputs are multiplied so many at once

    static size_t packed_bytes(const Rows &rows) { return vectors(rows) * vector_bytes(rows.ffn->hidden); }
    static size_t hidden_bytes(const Rows &rows) { return vectors(rows) * vector_bytes(rows.ffn->width); }
    static size_t panel_bytes(const Ffn &f) {
        const int64_t weights = f.products * f.hidden > f.width ? f.products * f.hidden : f.width;
        const size_t panels = kHiddenStep * (weights + 4) * sizeof(Weight);
        const size_t tokens = kLanes * Whole::padded(f.hidden) * sizeof(Token);
        return panels > tokens ? panels : tokens;
    }

    static void pack(const Batch &batch, const Rows &rows, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int64_t width = Whole::padded(f.hidden), numbers = round_up(f.hidden, kEven) / kPerNumber;
        for (Block block = block_at(rows, 0); block.vectors > 0; block = block_at(rows, block.first + block.vectors)) {
            for (int64_t v = 0; v < block.vectors; v++) {
                const float *from[kLanes];
                for (int lane = 0; lane < kLanes; lane++) {
                    const int64_t i = (block.first + v) * kLanes + lane;
                    Token *own = reinterpret_cast<Token *>(worker.panels) + lane * width;
                    from[lane] = reinterpret_cast<const float *>(
                        i < rows.count ? Whole::token_row(batch, rows, rows.pair(i), own, worker) : nullptr);
                }
                float *to = reinterpret_cast<float *>(rows.packed + block.first * vector_bytes(f.hidden)) + v * kLanes;
                for (int64_t k = 0; k < numbers; k += kLanes) {
                    const int there = static_cast<int>(numbers - k < kLanes ? numbers - k : kLanes);
                    Vec r[kLanes];
                    for (int lane = 0; lane < kLanes; lane++)
                        r[lane] = !from[lane]       ? Vec::of(0.f)
                                  : there == kLanes ? Vec::load(from[lane] + k)
                                                    : Vec::load(from[lane] + k, there);
                    transpose(r);
                    for (int i = 0; i < there; i++) r[i].store(to + (k + i) * block.vectors * kLanes);
                }
            }
        }
    }

    static void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        const Ffn &f = *rows.ffn;
        alignas(64) float sums[2][kHiddenStep * kMost * kLanes];
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int64_t to = least(from + kHiddenStep, range.to);
            const int64_t end = least(to + kHiddenStep, range.to);
            const int valid = static_cast<int>(to - from);
            Panel panels[2];
            for (int p = 0; p < f.products; p++)
                panels[p] = panel(f.first[p], rows.expert, from, valid, f.hidden, p, worker);
            Reader ahead(to < range.to ? before_first(rows, to, end) : range.next,
                         steps(rows, f.hidden) * f.products + kHiddenStep * vectors(rows) * kMiddleSteps);
            for (Block block = block_at(rows, 0); block.vectors > 0;
                 block = block_at(rows, block.first + block.vectors)) {
                const float *x = reinterpret_cast<const float *>(rows.packed + block.first * vector_bytes(f.hidden));
                for (int p = 0; p < f.products; p++) multiply(panels[p], block.vectors, x, f.hidden, sums[p], ahead);
                float *h = reinterpret_cast<float *>(rows.hidden + block.first * vector_bytes(f.width));
                activate(batch, rows, block, from, valid, sums[0], sums[1], h, ahead, worker);
            }
        }
    }

    static void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        const Ffn &f = *rows.ffn;
        alignas(64) float sums[kHiddenStep * kMost * kLanes];
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int64_t to = least(from + kHiddenStep, range.to);
            const int64_t end = least(to + kHiddenStep, range.to);
            const Panel weights = panel(f.down, rows.expert, from, static_cast<int>(to - from), f.width, 0, worker);
            Reader ahead(to < range.to ? before_second(rows, to, end) : range.next,
                         steps(rows, f.width) + kHiddenStep * vectors(rows));
            for (Block block = block_at(rows, 0); block.vectors > 0;
                 block = block_at(rows, block.first + block.vectors)) {
                const float *h = reinterpret_cast<const float *>(rows.hidden + block.first * vector_bytes(f.width));
                multiply(weights, block.vectors, h, f.width, sums, ahead);
                finish(batch, rows, block, from, static_cast<int>(to - from), sums, ahead, worker);
            }
        }
    }

  private:
    static constexpr int kMiddleSteps = 3;  // what a vector of the middle term takes, in steps of a product's loop

    // Some vectors of tokens, from vector `first` on.
    struct Block {
        int64_t first;
        int vectors;
    };

    static int64_t vectors(const Rows &rows) { return (rows.count + kLanes - 1) / kLanes; }
    // The block that begins at vector `first`: as large as it may be, but twice two rather than four (measured in
    // GFLOP/s a core: six vectors 220, five 196, four 175, three 200, two 185, one 150).
    static Block block_at(const Rows &rows, int64_t first) {
        const int64_t left = vectors(rows) - first;
        return {first, static_cast<int>(left >= kMost ? kMost : left == 4 ? 2 : left)};
    }
    static size_t vector_bytes(int64_t inputs) { return round_up(inputs, 2) / kPerNumber * sizeof(float) * kLanes; }
    static int64_t steps(const Rows &rows, int64_t inputs) {
        int64_t groups = 0;
        for (Block block = block_at(rows, 0); block.vectors > 0; block = block_at(rows, block.first + block.vectors))
            groups += kHiddenStep / rows_at_once(block.vectors);
        return groups * ((inputs + kEven - 1) / kEven);
    }

    // Weight rows that are multiplied at once with so many vectors: as many sums as there are registers for.
    static constexpr int rows_at_once(int vectors) { return vectors <= (kLanes == 16 ? 3 : 1) ? 8 : 4; }

    // The rows where they lie when all are there and their inputs come in whole steps, else a copy.
    static Panel panel(const Matrix &m, int64_t expert, int64_t from, int outputs, int64_t inputs, int which,
                       Worker &worker) {
        if (m.per_input == 1 && outputs == kHiddenStep && inputs % kEven == 0)
            return in_place(m, sizeof(Weight), expert, from);
        const int64_t padded = round_up(inputs, kEven);
        return copied(m, sizeof(Weight), expert, from, outputs, kHiddenStep, inputs, padded,
                      worker.panels + which * kHiddenStep * padded * sizeof(Weight));
    }

    template <int N>
    static void multiply_vectors(const Panel &panel, const float *x, int64_t inputs, float *sums, Reader &ahead) {
        constexpr int R = rows_at_once(N);
        using S = Spread<Dot, R, N>;
        const int64_t stride = panel.row_bytes / static_cast<int64_t>(sizeof(Weight));
        const int64_t count = (inputs + S::kInputs - 1) / S::kInputs;
        constexpr int64_t kAdvance = S::kInputs / kPerNumber * N * kLanes;
        for (int r = 0; r < kHiddenStep; r += R) {
            Vec c[R][N];
            for (auto &row : c)
                for (Vec &v : row) v = Vec::of(0.f);
            const Weight *w = reinterpret_cast<const Weight *>(panel.row(r));
            for (int64_t s = 0; s < count; s++) {
                S::step(c, w + s * S::kInputs, stride, x + s * kAdvance);
                ahead.step();
            }
            for (int i = 0; i < R; i++)
                for (int n = 0; n < N; n++) c[i][n].store(sums + ((r + i) * N + n) * kLanes);
        }
    }

    // sums[output][token] of the panel's outputs and a block's tokens.
    static void multiply(const Panel &panel, int vectors, const float *x, int64_t inputs, float *sums, Reader &ahead) {
        switch (vectors) {
            case 1:
                return multiply_vectors<1>(panel, x, inputs, sums, ahead);
            case 2:
                return multiply_vectors<2>(panel, x, inputs, sums, ahead);
            case 3:
                return multiply_vectors<3>(panel, x, inputs, sums, ahead);
#if !defined(DSMOE_FEW_REGISTERS)
            case 4:
                return multiply_vectors<4>(panel, x, inputs, sums, ahead);
            case 5:
                return multiply_vectors<5>(panel, x, inputs, sums, ahead);
            case 6:
                return multiply_vectors<6>(panel, x, inputs, sums, ahead);
#endif
            default:
                __builtin_unreachable();
        }
    }

    static const float *weights_of(const Batch &batch, const Rows &rows, const Term &term, const Block &block,
                                   float *to) {
        if (term.weighs)
            for (int64_t i = 0; i < block.vectors * kLanes; i++) {
                const int64_t at = block.first * kLanes + i;
                to[i] = at < rows.count ? batch.weights[rows.pair(static_cast<int32_t>(at))] : 0.f;
            }
        return to;
    }

    // The middle term, as the next product's tokens; zeros where inputs are multiplied that are not there.
    static void activate(const Batch &batch, const Rows &rows, const Block &block, int64_t from, int valid,
                         const float *gate, const float *up, float *hidden, Reader &ahead, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int columns = block.vectors * kLanes;
        alignas(64) float weights[kMost * kLanes];
        weights_of(batch, rows, f.middle, block, weights);
        for (int r = 0; r < valid; r += kLanes) {
            const int there = valid - r < kLanes ? valid - r : kLanes;
            const Reads reads{{gate + r * columns, up + r * columns}, weights, f.vectors, rows.expert, from + r, there};
            const float *h = evaluate<true>(f.middle, reads, kLanes, columns, worker.values);
            float *to = hidden + (from + r) / kPerNumber * columns;
            for (int i = 0; i < there; i += kEven)
                for (int c = 0; c < columns; c += kLanes) {
                    const Vec zero = Vec::of(0.f), low = Vec::load(h + i * columns + c);
                    const Vec high = kEven == 1 || i + 1 == there ? zero : Vec::load(h + (i + 1) * columns + c);
                    if (kPerNumber == 2)
                        paired(low, high).store(to + i / 2 * columns + c);
                    else
                        low.store(to + i * columns + c);
                    if (kPerNumber == 1 && kEven == 2) high.store(to + (i + 1) * columns + c);
                    ahead.steps(kMiddleSteps * kEven);
                }
        }
    }

    // The last term, each token's numbers to its row of y.
    static void finish(const Batch &batch, const Rows &rows, const Block &block, int64_t from, int valid,
                       const float *product, Reader &ahead, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int columns = block.vectors * kLanes;
        alignas(64) float weights[kMost * kLanes];
        weights_of(batch, rows, f.last, block, weights);
        for (int r = 0; r < valid; r += kLanes) {
            const int there = valid - r < kLanes ? valid - r : kLanes;
            const Reads reads{{product + r * columns, nullptr}, weights, f.vectors, rows.expert, from + r, there};
            const float *y = evaluate<true>(f.last, reads, kLanes, columns, worker.values);
            for (int v = 0; v < block.vectors; v++) {
                Vec t[kLanes];
                for (int i = 0; i < kLanes; i++) t[i] = Vec::load(y + i * columns + v * kLanes);
                transpose(t);
                for (int lane = 0; lane < kLanes; lane++) {
                    const int64_t i = (block.first + v) * kLanes + lane;
                    if (i >= rows.count) break;
                    float *to = batch.y + rows.pair(static_cast<int32_t>(i)) * f.out + from + r;
                    store_output(t[lane], there, to, batch.past_caches);
                    ahead.step();
                }
            }
        }
    }
};

}  // namespace
