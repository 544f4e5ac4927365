// An expert's rows by AMX: sixteen weight rows, as they are stored, times sixteen tokens.
//
// A tile holds 16 rows of 64 bytes. The first operand is 16 outputs × 32 inputs of the weights; the second 16 pairs of
// inputs × 16 tokens, so tokens are packed once: 32 inputs of 16 tokens are a tile of 1 KB. A product's tile is 16
// outputs × 16 tokens in float32; two of its rows, in bfloat16, are a row of pairs, which is how the next product
// wants them.
#pragma once
#include "rows.h"

namespace {

constexpr int64_t kSide = 16, kInputs = 32, kTile = 1024;  // rows, inputs, and bytes of a tile
constexpr int32_t kFewRows = 4;                            // up to so many, products are taken along the rows

// What a term of a tile takes, in steps of a product's loop: memory is kept busy meanwhile.
constexpr int kMiddleSteps = kSide / 2, kLastSteps = 4;

// The compiler may not keep tiles' memory in registers across the instructions, which it knows nothing of.
inline void fence() { asm volatile("" ::: "memory"); }

struct ByTiles {
    static int64_t blocks(const Rows &rows) { return (rows.count + kSide - 1) / kSide; }
    static int64_t depth(int64_t inputs) { return (inputs + kInputs - 1) / kInputs; }
    static size_t packed_bytes(const Rows &rows) { return blocks(rows) * depth(rows.ffn->hidden) * kTile; }
    static size_t hidden_bytes(const Rows &rows) { return blocks(rows) * depth(rows.ffn->width) * kTile; }

    static void enter() {
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; tile++) {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        asm volatile("" : : "r"(config) : "memory");  // the intrinsic of gcc 12 declares 8 of the 64 bytes
        _tile_loadconfig(config);
    }
    static void leave() {
        _tile_release();
        _mm_sfence();  // others read what was written past the caches
    }

    static void pack(const Batch &batch, const Rows &rows, Worker &worker) {
        const Ffn &f = *rows.ffn;
        for (int64_t b = 0; b < blocks(rows); b++) {
            const char *from[kSide];
            float factors[kSide];
            for (int i = 0; i < kSide; i++) {
                const int64_t at = b * kSide + i;
                from[i] = nullptr;
                if (at >= rows.count) continue;
                const int64_t pair = rows.pair(static_cast<int32_t>(at));
                from[i] = batch.x + pair / batch.slots * batch.per_token * 2;
                factors[i] = ByRows<Pairs>::factor_of(batch, f, pair, worker);
            }
            char *to = rows.packed + b * depth(f.hidden) * kTile;
            for (int64_t k = 0; k < f.hidden; k += kInputs, to += kTile) {
                const int64_t left = f.hidden - k;
                const __mmask32 there = left < kInputs ? static_cast<__mmask32>((1ull << left) - 1) : ~0u;
                __m512 r[kSide];
                for (int i = 0; i < kSide; i++) {
                    const __m512i v =
                        from[i] ? _mm512_maskz_loadu_epi16(there, from[i] + 2 * k) : _mm512_setzero_si512();
                    r[i] = _mm512_castsi512_ps(from[i] && f.factor.count ? times(v, factors[i]) : v);
                }
                transpose(r);
                for (int i = 0; i < kSide; i++) _mm512_store_ps(reinterpret_cast<float *>(to + 64 * i), r[i]);
            }
        }
    }

    static void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int64_t nk = depth(f.hidden), tokens = nk * kTile, hidden = depth(f.width) * kTile, n = blocks(rows);
        alignas(64) float c[4][kSide * kSide];
        for (int64_t from = range.from; from < range.to; from += kHiddenStep) {
            const int64_t to = least(from + kHiddenStep, range.to);
            const int64_t end = least(to + kHiddenStep, range.to);
            Panel panels[2];
            for (int p = 0; p < f.products; p++)
                panels[p] = panel(f.first[p], rows.expert, from, to - from, kHiddenStep, f.hidden, p, worker);
            Reader ahead(to < range.to ? before_first(rows, to, end) : range.next,
                         nk * (f.products == 2 ? n / 2 * 2 + n % 2 : n / 2 + n % 2) + 2 * n * kMiddleSteps);
            char *h = rows.hidden + from / kHiddenStep * kTile;
            if (f.products == 1) {
                const char *a = panels[0].row(0), *b = panels[0].row(kSide);
                for (int64_t i = 0; i < n; i += 2) {
                    const bool two = i + 1 < n;
                    const char *x = rows.packed + i * tokens;
                    if (two)
                        two_by_two(a, b, panels[0].row_bytes, x, x + tokens, nk, c[0], ahead);
                    else
                        two_by_one(a, b, panels[0].row_bytes, x, nk, c[0], ahead);
                    for (int64_t j = 0; j < (two ? 2 : 1); j++)
                        for (int half = 0; half < 2; half++)
                            activate(batch, rows, i + j, from + half * kSide, to, c[2 * half + j], nullptr,
                                     h + (i + j) * hidden + half * kTile / 2, ahead, worker);
                }
                continue;
            }
            int64_t i = 0;
            for (; i + 2 <= n; i += 2)
                for (int half = 0; half < 2; half++) {
                    const char *x = rows.packed + i * tokens;
                    two_by_two(panels[0].row(half * kSide), panels[1].row(half * kSide), panels[0].row_bytes, x,
                               x + tokens, nk, c[0], ahead);
                    for (int64_t j = 0; j < 2; j++)
                        activate(batch, rows, i + j, from + half * kSide, to, c[j], c[2 + j],
                                 h + (i + j) * hidden + half * kTile / 2, ahead, worker);
                }
            if (i < n) {
                four_by_one(panels[0].row(0), panels[0].row(kSide), panels[1].row(0), panels[1].row(kSide),
                            panels[0].row_bytes, rows.packed + i * tokens, nk, c[0], ahead);
                for (int half = 0; half < 2; half++)
                    activate(batch, rows, i, from + half * kSide, to, c[half], c[2 + half],
                             h + i * hidden + half * kTile / 2, ahead, worker);
            }
        }
    }

    static void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int64_t nk = depth(f.width), hidden = nk * kTile, n = blocks(rows);
        alignas(64) float c[4][kSide * kSide];
        for (int64_t from = range.from; from < range.to; from += kOutStep) {
            const int64_t to = least(from + kOutStep, range.to);
            const int64_t end = least(to + kOutStep, range.to);
            const Panel w = panel(f.down, rows.expert, from, to - from, kOutStep, f.width, 0, worker);
            Reader ahead(to < range.to ? before_second(rows, to, end) : range.next,
                         nk * (n / 2 * 2 + n % 2) + 4 * n * kLastSteps);
            int64_t i = 0;
            for (; i + 2 <= n; i += 2)
                for (int64_t r = 0; r < kOutStep; r += 2 * kSide) {
                    const char *h = rows.hidden + i * hidden;
                    two_by_two(w.row(r), w.row(r + kSide), w.row_bytes, h, h + hidden, nk, c[0], ahead);
                    for (int64_t j = 0; j < 2; j++)
                        for (int64_t half = 0; half < 2; half++)
                            finish(batch, rows, i + j, from + r + half * kSide, to, c[2 * half + j], ahead, worker);
                }
            if (i < n) {
                four_by_one(w.row(0), w.row(kSide), w.row(2 * kSide), w.row(3 * kSide), w.row_bytes,
                            rows.hidden + i * hidden, nk, c[0], ahead);
                for (int64_t q = 0; q < 4; q++) finish(batch, rows, i, from + q * kSide, to, c[q], ahead, worker);
            }
        }
    }

    static size_t panel_bytes(const Ffn &f) {
        const size_t first = f.products * kHiddenStep * depth(f.hidden), second = kOutStep * depth(f.width);
        return (first > second ? first : second) * kInputs * 2;
    }

  private:
    // The rows where they lie when they are whole tiles, else a copy that is.
    static Panel panel(const Matrix &m, int64_t expert, int64_t from, int64_t outputs, int64_t step, int64_t inputs,
                       int which, Worker &worker) {
        if (m.per_input == 1 && outputs == step && inputs % kInputs == 0) return in_place(m, 2, expert, from);
        const int64_t padded = depth(inputs) * kInputs;
        return copied(m, 2, expert, from, outputs, step, inputs, padded, worker.panels + which * step * padded * 2);
    }

    static __m512i times(__m512i x, float factor) {
        alignas(64) uint16_t numbers[32];
        _mm512_store_si512(numbers, x);
        for (int i = 0; i < 32; i += 16) (Vec::load(numbers + i) * Vec::of(factor)).store(numbers + i);
        return _mm512_load_si512(numbers);
    }

    // c: a0·b0, a0·b1, a1·b0, a1·b1.
    static inline __attribute__((always_inline)) void two_by_two(const char *a0, const char *a1, int64_t stride,
                                                                 const char *b0, const char *b1, int64_t nk, float *c,
                                                                 Reader &ahead) {
        zero_four();
        for (int64_t k = 0; k < nk; k++) {
            _tile_loadd(6, b0 + kTile * k, 64);
            _tile_loadd(4, a0 + 64 * k, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b1 + kTile * k, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a1 + 64 * k, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            ahead.step();
        }
        store_four(c);
    }

    // c: a0·b, a1·b, a2·b, a3·b.
    static inline __attribute__((always_inline)) void four_by_one(const char *a0, const char *a1, const char *a2,
                                                                  const char *a3, int64_t stride, const char *b,
                                                                  int64_t nk, float *c, Reader &ahead) {
        zero_four();
        for (int64_t k = 0; k < nk; k++) {
            _tile_loadd(4, b + kTile * k, 64);
            _tile_loadd(5, a0 + 64 * k, stride);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, a1 + 64 * k, stride);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, a2 + 64 * k, stride);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, a3 + 64 * k, stride);
            _tile_dpbf16ps(3, 5, 4);
            ahead.step();
        }
        store_four(c);
    }

    // c: a0·b in the first tile, a1·b in the third.
    static inline __attribute__((always_inline)) void two_by_one(const char *a0, const char *a1, int64_t stride,
                                                                 const char *b, int64_t nk, float *c, Reader &ahead) {
        zero_four();
        for (int64_t k = 0; k < nk; k++) {
            _tile_loadd(6, b + kTile * k, 64);
            _tile_loadd(4, a0 + 64 * k, stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, a1 + 64 * k, stride);
            _tile_dpbf16ps(2, 5, 6);
            ahead.step();
        }
        store_four(c);
    }

    static inline __attribute__((always_inline)) void zero_four() {
        fence();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    static inline __attribute__((always_inline)) void store_four(float *c) {
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        _tile_stored(2, c + 512, 64);
        _tile_stored(3, c + 768, 64);
        fence();
    }

    static const float *weights_of(const Batch &batch, const Rows &rows, const Term &term, int64_t block, float *to) {
        if (term.weighs)
            for (int i = 0; i < kSide; i++) {
                const int64_t at = block * kSide + i;
                to[i] = at < rows.count ? batch.weights[rows.pair(static_cast<int32_t>(at))] : 0.f;
            }
        return to;
    }

    // The middle term of 16 hidden numbers × 16 tokens, as eight rows of pairs; zeros past the last hidden number.
    static void activate(const Batch &batch, const Rows &rows, int64_t block, int64_t from, int64_t end,
                         const float *gate, const float *up, char *to, Reader &ahead, Worker &worker) {
        const Ffn &f = *rows.ffn;
        const int valid = static_cast<int>(from >= end ? 0 : end - from < kSide ? end - from : kSide);
        alignas(64) float weights[kSide];
        const Reads reads{{gate, up},       weights_of(batch, rows, f.middle, block, weights),
                          f.vectors,        rows.expert,
                          valid ? from : 0, valid};
        const float *h = evaluate<true>(f.middle, reads, kSide, kSide, worker.values);
        for (int r = 0; r < kSide; r += 2) {
            ahead.step();
            const Vec zero = Vec::of(0.f);
            const Vec low = r < valid ? Vec::load(h + r * kSide) : zero,
                      high = r + 1 < valid ? Vec::load(h + (r + 1) * kSide) : zero;
            const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low.v));
            const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high.v));
            _mm512_store_si512(to + 32 * r, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
        }
    }

    // The last term of 16 outputs × 16 tokens, each token's to its row of y.
    static void finish(const Batch &batch, const Rows &rows, int64_t block, int64_t from, int64_t end,
                       const float *product, Reader &ahead, Worker &worker) {
        const Ffn &f = *rows.ffn;
        if (from >= end) return;
        const int valid = static_cast<int>(end - from < kSide ? end - from : kSide);
        alignas(64) float weights[kSide];
        const Reads reads{
            {product, nullptr}, weights_of(batch, rows, f.last, block, weights), f.vectors, rows.expert, from, valid};
        const float *y = evaluate<true>(f.last, reads, kSide, kSide, worker.values);
        __m512 r[kSide];
        for (int i = 0; i < kSide; i++) r[i] = _mm512_loadu_ps(y + kSide * i);
        transpose(r);
        for (int i = 0; i < kSide && block * kSide + i < rows.count; i++) {
            if (i % (kSide / kLastSteps) == 0) ahead.step();
            float *to = batch.y + rows.pair(static_cast<int32_t>(block * kSide + i)) * f.out + from;
            store_output({r[i]}, valid, to, batch.past_caches);
        }
    }
};

}  // namespace
