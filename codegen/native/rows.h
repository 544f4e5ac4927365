// An expert's rows as rows: tokens and hidden rows lie one after the other, and products are taken along them.
#pragma once
#include "dots.h"
#include "elementary.h"
#include "panels.h"

namespace {

template <class Dot>
struct ByRows {
    using Weight = typename Dot::Weight;
    using Token = typename Dot::Token;
    static constexpr size_t kWeight = sizeof(Weight);

    static int64_t padded(int64_t inputs) { return round_up(inputs, Dot::kStep); }

    // x is read where it lies when it is as the products want it: of their type, and in whole steps.
    static bool reads_x(const Ffn &f) {
        return sizeof(Token) == element_bytes(f.dtype) && f.factor.count == 0 && f.hidden % Dot::kStep == 0;
    }
    static size_t packed_bytes(const Rows &rows) {
        return reads_x(*rows.ffn) ? 0 : rows.count * padded(rows.ffn->hidden) * sizeof(Token);
    }
    static size_t hidden_bytes(const Rows &rows) { return rows.count * padded(rows.ffn->width) * sizeof(Token); }
    static size_t panel_bytes(const Ffn &f) {
        const int64_t first = f.products * padded(f.hidden), last = padded(f.width);
        return kHiddenStep * (first > last ? first : last) * kWeight;
    }

    static void pack(const Batch &batch, const Rows &rows, Worker &worker) {
        const Ffn &f = *rows.ffn;
        if (reads_x(f)) return;
        for (int32_t i = 0; i < rows.count; i++)
            token_row(batch, rows, rows.pair(i), reinterpret_cast<Token *>(rows.packed) + i * padded(f.hidden), worker);
    }

    // A pair's token as the products read it: in x, or in `own` with zeros behind it.
    static const Token *token_row(const Batch &batch, const Rows &rows, int64_t pair, Token *own, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const char *from = batch.x + pair / batch.slots * batch.per_token * element_bytes(f.dtype);
        if (reads_x(f)) return reinterpret_cast<const Token *>(from);
        const float factor = factor_of(batch, f, pair, worker);
        if (f.dtype == kFloat32)
            row(reinterpret_cast<const float *>(from), f.hidden, padded(f.hidden), f, factor, own);
        else
            row(reinterpret_cast<const uint16_t *>(from), f.hidden, padded(f.hidden), f, factor, own);
        return own;
    }

    static void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int64_t width = padded(f.width);
        alignas(64) float sums[2][kDotTokens * kHiddenStep];
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int valid = static_cast<int>(least(kHiddenStep, range.to - from));
            Panel panels[2];
            for (int p = 0; p < f.products; p++)
                panels[p] = panel(f.first[p], rows.expert, from, valid, f.hidden, p, worker);
            const int groups = (valid + kDotRows - 1) / kDotRows;
            Reader ahead(from + kHiddenStep < range.to
                             ? before_first(rows, from + kHiddenStep, least(from + 2 * kHiddenStep, range.to))
                             : range.next,
                         blocks(rows) * groups * f.products * (f.hidden / Dot::kStep) + rows.count * kMiddleSteps);
            for (int32_t begin = 0, n; begin < rows.count; begin += n) {
                n = block(rows, begin);
                const Token *x[kDotTokens];
                for (int t = 0; t < n; t++) x[t] = token(batch, rows, begin + t);
                for (int p = 0; p < f.products; p++)
                    multiply(panels[p], valid, n, x, f.hidden, sums[p], kHiddenStep, ahead);
                float weights[kDotTokens];
                weights_of(batch, rows, f.middle, begin, n, weights);
                const Reads reads{{sums[0], sums[1]}, weights, f.vectors, rows.expert, from, valid};
                const float *h = evaluate<false>(f.middle, reads, n, kHiddenStep, worker.values);
                for (int t = 0; t < n; t++) {
                    Token *to = reinterpret_cast<Token *>(rows.hidden) + (begin + t) * width + from;
                    store(h + t * kHiddenStep, valid, to);
                    if (from + valid == f.width) memset(to + valid, 0, (width - f.width) * sizeof(Token));
                    ahead.steps(kMiddleSteps);
                }
            }
        }
    }

    static void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int64_t width = padded(f.width);
        alignas(64) float sums[kDotTokens * kHiddenStep];
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int valid = static_cast<int>(least(kHiddenStep, range.to - from));
            const Panel rows_of = panel(f.down, rows.expert, from, valid, f.width, 0, worker);
            const int groups = (valid + kDotRows - 1) / kDotRows;
            const int64_t end = least(from + 2 * kHiddenStep, range.to);
            Reader ahead(from + kHiddenStep < range.to ? before_second(rows, from + kHiddenStep, end) : range.next,
                         blocks(rows) * groups * (f.width / Dot::kStep) + rows.count * kLastSteps);
            for (int32_t begin = 0, n; begin < rows.count; begin += n) {
                n = block(rows, begin);
                const Token *h[kDotTokens];
                for (int t = 0; t < n; t++) h[t] = reinterpret_cast<const Token *>(rows.hidden) + (begin + t) * width;
                multiply(rows_of, valid, n, h, f.width, sums, kHiddenStep, ahead);
                float weights[kDotTokens];
                weights_of(batch, rows, f.last, begin, n, weights);
                const Reads reads{{sums, nullptr}, weights, f.vectors, rows.expert, from, valid};
                const float *y = evaluate<false>(f.last, reads, n, kHiddenStep, worker.values);
                for (int t = 0; t < n; t++) {
                    store(y + t * kHiddenStep, valid, batch.y + rows.pair(begin + t) * f.out + from);
                    ahead.steps(kLastSteps);
                }
            }
        }
    }

  private:
    // What the terms of a token's numbers in a panel take, in steps of a product's loop.
    static constexpr int kMiddleSteps = 8, kLastSteps = 3;

    // Tokens in blocks that differ by one at most.
    static int32_t blocks(const Rows &rows) { return (rows.count + kDotTokens - 1) / kDotTokens; }
    static int32_t block(const Rows &rows, int32_t begin) {
        const int32_t count = blocks(rows);
        const int32_t at = static_cast<int32_t>((static_cast<int64_t>(begin) * count + rows.count - 1) / rows.count);
        return static_cast<int32_t>(static_cast<int64_t>(rows.count) * (at + 1) / count) - begin;
    }

    static const Token *token(const Batch &batch, const Rows &rows, int32_t i) {
        if (!reads_x(*rows.ffn)) return reinterpret_cast<const Token *>(rows.packed) + i * padded(rows.ffn->hidden);
        return reinterpret_cast<const Token *>(batch.x) + rows.pair(i) / batch.slots * batch.per_token;
    }

    static Panel panel(const Matrix &m, int64_t expert, int64_t output, int64_t outputs, int64_t inputs, int which,
                       Worker &worker) {
        if (m.per_input == 1) return in_place(m, kWeight, expert, output);
        char *to = worker.panels + which * kHiddenStep * padded(inputs) * kWeight;
        return copied(m, kWeight, expert, output, outputs, outputs, inputs, padded(inputs), to);
    }

    static void multiply(const Panel &panel, int valid, int n, const Token *const *x, int64_t inputs, float *sums,
                         int stride, Reader &ahead) {
        for (int r = 0; r < valid; r += kDotRows) {
            const Weight *w[kDotRows];
            for (int i = 0; i < kDotRows; i++)  // past the last row, the last one again
                w[i] = reinterpret_cast<const Weight *>(panel.row(r + i < valid ? r + i : valid - 1));
            dots<Dot>(n, w, x, inputs, sums + r, stride, ahead);
        }
    }

    static const float *weights_of(const Batch &batch, const Rows &rows, const Term &term, int32_t begin, int n,
                                   float *to) {
        if (term.weighs)
            for (int t = 0; t < n; t++) to[t] = batch.weights[rows.pair(begin + t)];
        return to;
    }

    template <class T>
    static void store(const float *from, int n, T *to) {
        int i = 0;
        for (; i + Vec::kLanes <= n; i += Vec::kLanes) Vec::load(from + i).store(to + i);
        if (i < n) Vec::load(from + i).store(to + i, n - i);
    }

    // A token's row as the products read it, times its factor, rounded where x's type rounds, and zeros behind it.
    template <class From>
    static void row(const From *from, int64_t n, int64_t width, const Ffn &f, float factor, Token *to) {
        const bool scaled = f.factor.count > 0;
        for (int64_t i = 0; i < n; i += Vec::kLanes) {
            const int there = static_cast<int>(n - i < Vec::kLanes ? n - i : Vec::kLanes);
            Vec v = there < Vec::kLanes ? Vec::load(from + i, there) : Vec::load(from + i);
            if (scaled) v = f.dtype == kBfloat16 ? round_bfloat16(v * Vec::of(factor)) : v * Vec::of(factor);
            if (there < Vec::kLanes)
                v.store(to + i, there);
            else
                v.store(to + i);
        }
        memset(to + n, 0, (width - n) * sizeof(Token));
    }

  public:
    static float factor_of(const Batch &batch, const Ffn &f, int64_t pair, Worker &worker) {
        if (f.factor.count == 0) return 1.f;
        float weight[Vec::kLanes];
        for (float &w : weight) w = batch.weights[pair];
        const Reads reads{{nullptr, nullptr}, weight, nullptr, 0, 0, 1};
        return evaluate<true>(f.factor, reads, 1, Vec::kLanes, worker.values)[0];
    }
};

// The first n numbers of v to y. Lines that will have left the caches when they are read need not be read to be written.
inline void store_output(Vec v, int n, float *y, bool past_caches) {
    if (n < Vec::kLanes)
        v.store(y, n);
    else if (past_caches)
        v.store_past_caches(y);
    else
        v.store(y);
}

// out[i] = Σ factors[r] · rows[r][i].
inline void add_rows(const float *const *rows, const float *factors, int count, int64_t width, int32_t dtype,
                     void *out) {
    int64_t i = 0;
    for (; i < width; i += Vec::kLanes) {
        const int there = static_cast<int>(width - i < Vec::kLanes ? width - i : Vec::kLanes);
        const bool whole = there == Vec::kLanes;
        Vec sum = Vec::of(0.f);
        for (int r = 0; r < count; r++)
            sum = fma(whole ? Vec::load(rows[r] + i) : Vec::load(rows[r] + i, there), Vec::of(factors[r]), sum);
        if (dtype == kFloat32) {
            float *to = static_cast<float *>(out) + i;
            whole ? sum.store(to) : sum.store(to, there);
        } else {
            uint16_t *to = static_cast<uint16_t *>(out) + i;
            whole ? sum.store(to) : sum.store(to, there);
        }
    }
}

}  // namespace
