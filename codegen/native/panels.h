// A few outputs' rows of an expert's matrix: where they lie, or a copy with the inputs side by side.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace {

struct Panel {
    const char *data;
    int64_t row_bytes;  // from an output's row to the next

    const char *row(int64_t i) const { return data + i * row_bytes; }
};

inline const char *element(const Matrix &m, size_t size, int64_t expert, int64_t output, int64_t input) {
    return static_cast<const char *>(m.data) +
           (expert * m.per_expert + output * m.per_output + input * m.per_input) * size;
}

// The rows where they lie; their inputs must be side by side.
inline Panel in_place(const Matrix &m, size_t size, int64_t expert, int64_t output) {
    return {element(m, size, expert, output, 0), m.per_output * static_cast<int64_t>(size)};
}

// Numbers of kLanes outputs at one input (float32), or at two (bfloat16), whose distance is 1 or 2.
inline Vec across(const float *at, const float *, int64_t distance) {
    return distance == 1 ? Vec::load(at) : Vec::alternate(at);
}
inline Vec across(const uint16_t *at, const uint16_t *next, int64_t distance) {
    return distance == 1 ? Vec::both_rows(at, next) : Vec::both_rows_alternate(at, next);
}

// The rows of kLanes outputs whose inputs are apart and that are neighbours themselves, or every other one: squares of
// numbers are read along the outputs and transposed. What lies behind them is read ahead for the outputs that follow.
template <class T>
inline void gather_across(const Matrix &m, int64_t expert, int64_t output, int64_t inputs, int64_t padded, T *to) {
    constexpr int64_t kPerNumber = sizeof(float) / sizeof(T), kNumbers = Vec::kLanes, kSpan = kNumbers * kPerNumber;
    const T *from = reinterpret_cast<const T *>(element(m, sizeof(T), expert, output, 0));
    const int64_t ahead = 2 * kNumbers * m.per_output;  // a panel is two of these
    int64_t k = 0;
    for (; k + kSpan <= inputs; k += kSpan) {
        Vec square[kNumbers];
        for (int64_t i = 0; i < kNumbers; i++) {
            const T *at = from + (k + i * kPerNumber) * m.per_input, *next = at + (kPerNumber - 1) * m.per_input;
            square[i] = across(at, next, m.per_output);
            _mm_prefetch(reinterpret_cast<const char *>(at + ahead), _MM_HINT_T1);
            if (kPerNumber == 2) _mm_prefetch(reinterpret_cast<const char *>(next + ahead), _MM_HINT_T1);
        }
        transpose(square);
        for (int64_t r = 0; r < Vec::kLanes; r++) square[r].store(reinterpret_cast<float *>(to + r * padded + k));
    }
    for (; k < padded; k++)
        for (int64_t r = 0; r < Vec::kLanes; r++)
            to[r * padded + k] = k < inputs ? from[k * m.per_input + r * m.per_output] : T(0);
}

template <class T>
inline void gather(const Matrix &m, int64_t expert, int64_t output, int64_t outputs, int64_t inputs, int64_t padded,
                   T *to) {
    if (m.per_input == 1) {
        for (int64_t r = 0; r < outputs; r++) {
            memcpy(to + r * padded, element(m, sizeof(T), expert, output + r, 0), inputs * sizeof(T));
            memset(to + r * padded + inputs, 0, (padded - inputs) * sizeof(T));
        }
        return;
    }
    int64_t r = 0;
    if (m.per_output == 1 || m.per_output == 2)
        for (; r + Vec::kLanes <= outputs; r += Vec::kLanes)
            gather_across(m, expert, output + r, inputs, padded, to + r * padded);
    for (; r < outputs; r++) {
        const T *from = reinterpret_cast<const T *>(element(m, sizeof(T), expert, output + r, 0));
        for (int64_t k = 0; k < padded; k++) to[r * padded + k] = k < inputs ? from[k * m.per_input] : T(0);
    }
}

// A copy of `outputs` rows in `to`, filled with zeros to `padded` inputs and to `rows` rows.
inline Panel copied(const Matrix &m, size_t size, int64_t expert, int64_t output, int64_t outputs, int64_t rows,
                    int64_t inputs, int64_t padded, char *to) {
    if (size == 4)
        gather(m, expert, output, outputs, inputs, padded, reinterpret_cast<float *>(to));
    else
        gather(m, expert, output, outputs, inputs, padded, reinterpret_cast<uint16_t *>(to));
    memset(to + outputs * padded * size, 0, (rows - outputs) * padded * size);
    return {to, padded * static_cast<int64_t>(size)};
}

}  // namespace
