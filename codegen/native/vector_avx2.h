// Eight floats in a register of AVX2.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>

namespace {

struct Vec {
    static constexpr int kLanes = 8;
    __m256 v;

    static Vec of(float value) { return {_mm256_set1_ps(value)}; }
    static Vec load(const float *p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const uint16_t *p) {  // bfloat16
        return widened(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    // Of two bfloat16 numbers, the first or the second in every lane.
    static Vec of_low(const uint16_t *p) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi32(pair(p)), 16))};
    }
    static Vec of_high(const uint16_t *p) {
        return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(pair(p)), _mm256_set1_epi32(-65536)))};
    }
    // The first n < kLanes numbers, then zeros; nothing beyond them is read.
    static Vec load(const float *p, int n) { return {_mm256_maskload_ps(p, mask(n))}; }
    static Vec load(const uint16_t *p, int n) {
        uint16_t whole[kLanes] = {};
        memcpy(whole, p, sizeof(uint16_t) * n);
        return load(whole);
    }

    // Every other number, the first one first; nothing beyond the last is read.
    static Vec alternate(const float *p) {
        const __m256 a = _mm256_loadu_ps(p), b = _mm256_maskload_ps(p + 8, mask(7));
        const __m256 both = _mm256_shuffle_ps(a, b, 0x88);  // of a, of b, of a, of b: two of each
        return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(both), 0xd8))};
    }
    // Of two rows of bfloat16, a number of each in a lane, the first row's in the lower half.
    static Vec both_rows(const uint16_t *low, const uint16_t *high) {
        const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(low)));
        const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(high)));
        return {_mm256_castsi256_ps(_mm256_or_si256(a, _mm256_slli_epi32(b, 16)))};
    }
    static Vec both_rows_alternate(const uint16_t *low, const uint16_t *high) {
        const __m256i lower = _mm256_and_si256(fifteen(low), _mm256_set1_epi32(0xffff));
        return {_mm256_castsi256_ps(_mm256_or_si256(lower, _mm256_slli_epi32(fifteen(high), 16)))};
    }

    void store(float *p) const { _mm256_storeu_ps(p, v); }
    void store_past_caches(float *p) const { store(p); }  // half a line would be read to be completed
    void store(float *p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
    void store(uint16_t *p) const { _mm_storeu_si128(reinterpret_cast<__m128i *>(p), narrowed()); }
    void store(uint16_t *p, int n) const {
        uint16_t whole[kLanes];
        store(whole);
        memcpy(p, whole, sizeof(uint16_t) * n);
    }

    // bfloat16 in the lower halves, to nearest even; NaN stays NaN.
    __m256i rounded() const {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan), 16);
    }
    __m128i narrowed() const {
        const __m256i bits = rounded();
        return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    }

  private:
    static __m256i fifteen(const uint16_t *p) {
        uint16_t whole[16] = {};
        memcpy(whole, p, 15 * sizeof(uint16_t));
        return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(whole));
    }
    static int32_t pair(const uint16_t *p) {
        int32_t both;
        memcpy(&both, p, sizeof both);
        return both;
    }
    static __m256i mask(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Vec widened(__m128i bits) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
    }
};

struct Mask {
    __m256 m;
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec absolute(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
inline Mask less(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask less_equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask equal(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
// The second operand where either is NaN, as the processor has it: `ordered_…(limit, a)` keeps a's NaN.
inline Vec ordered_minimum(Vec limit, Vec a) { return {_mm256_min_ps(limit.v, a.v)}; }
inline Vec ordered_maximum(Vec limit, Vec a) { return {_mm256_max_ps(limit.v, a.v)}; }
inline Vec nearest_integer(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a · 2^n for integral n from −126 to 127; infinite for 128.
inline Vec scale_by_power(Vec a, Vec n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
inline Vec round_bfloat16(Vec a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(a.rounded(), 16))}; }
inline Vec round_float16(Vec a) {
    return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

// Pairs of bfloat16: the first operand's numbers in the lower halves.
inline Vec paired(Vec low, Vec high) {
    return {_mm256_castsi256_ps(_mm256_or_si256(low.rounded(), _mm256_slli_epi32(high.rounded(), 16)))};
}

// Eight rows, transposed in place.
inline void transpose(Vec *rows) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
        t[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
        u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        rows[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        rows[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

// The sums of four vectors.
inline void sum_four(const Vec *from, float *to) {
    const __m256 ab = _mm256_hadd_ps(from[0].v, from[1].v), cd = _mm256_hadd_ps(from[2].v, from[3].v);
    const __m256 s = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}

}  // namespace
