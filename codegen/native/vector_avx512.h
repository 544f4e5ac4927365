// Sixteen floats in a register of AVX-512.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace {

struct Vec {
    static constexpr int kLanes = 16;
    __m512 v;

    static Vec of(float value) { return {_mm512_set1_ps(value)}; }
    static Vec load(const float *p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const uint16_t *p) {  // bfloat16
        return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    // Of two bfloat16 numbers, the first or the second in every lane.
    static Vec of_low(const uint16_t *p) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi32(pair(p)), 16))};
    }
    static Vec of_high(const uint16_t *p) {
        return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(pair(p)), _mm512_set1_epi32(-65536)))};
    }
    // The first n < kLanes numbers, then zeros; nothing beyond them is read.
    static Vec load(const float *p, int n) { return {_mm512_maskz_loadu_ps(mask(n), p)}; }
    static Vec load(const uint16_t *p, int n) { return widened(_mm256_maskz_loadu_epi16(mask(n), p)); }

    // Every other number, the first one first; nothing beyond the last is read.
    static Vec alternate(const float *p) {
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), even, _mm512_maskz_loadu_ps(0x7fff, p + 16))};
    }
    // Of two rows of bfloat16, a number of each in a lane, the first row's in the lower half.
    static Vec both_rows(const uint16_t *low, const uint16_t *high) {
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(low)));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(high)));
        return {_mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)))};
    }
    static Vec both_rows_alternate(const uint16_t *low, const uint16_t *high) {
        const __m512i a = _mm512_maskz_loadu_epi16(0x7fffffff, low), b = _mm512_maskz_loadu_epi16(0x7fffffff, high);
        const __m512i lower = _mm512_and_si512(a, _mm512_set1_epi32(0xffff));
        return {_mm512_castsi512_ps(_mm512_or_si512(lower, _mm512_slli_epi32(b, 16)))};
    }

    void store(float *p) const { _mm512_storeu_ps(p, v); }
    void store_past_caches(float *p) const { _mm512_stream_ps(p, v); }  // a whole cache line
    void store(float *p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
    void store(uint16_t *p) const { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), narrowed()); }
    void store(uint16_t *p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), narrowed()); }

    // bfloat16 in the lower halves, to nearest even; NaN stays NaN.
    __m512i rounded() const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000)), 16);
    }
    __m256i narrowed() const { return _mm512_cvtepi32_epi16(rounded()); }

  private:
    static int32_t pair(const uint16_t *p) {
        int32_t both;
        memcpy(&both, p, sizeof both);
        return both;
    }
    static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
    static Vec widened(__m256i bits) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    }
};

using Mask = __mmask16;

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec absolute(Vec a) { return {_mm512_abs_ps(a.v)}; }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m, no.v, yes.v)}; }
// The second operand where either is NaN, as the processor has it: `ordered_…(limit, a)` keeps a's NaN.
inline Vec ordered_minimum(Vec limit, Vec a) { return {_mm512_min_ps(limit.v, a.v)}; }
inline Vec ordered_maximum(Vec limit, Vec a) { return {_mm512_max_ps(limit.v, a.v)}; }
inline Vec nearest_integer(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a · 2^n for integral n.
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Vec round_bfloat16(Vec a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.rounded(), 16))}; }
inline Vec round_float16(Vec a) {
    return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// The sums of four vectors.
inline void sum_four(const Vec *from, float *to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(from[0].v, from[1].v), _mm512_unpackhi_ps(from[0].v, from[1].v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(from[2].v, from[3].v), _mm512_unpackhi_ps(from[2].v, from[3].v));
    const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

// Pairs of bfloat16: the first operand's numbers in the lower halves.
inline Vec paired(Vec low, Vec high) {
    return {_mm512_castsi512_ps(_mm512_or_si512(low.rounded(), _mm512_slli_epi32(high.rounded(), 16)))};
}

// Rows of 16 32-bit numbers, transposed in place.
inline void transpose(__m512 *r) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
}

inline void transpose(Vec *rows) { transpose(&rows[0].v); }

}  // namespace
