// A few outputs' rows of an expert's matrix: where they lie, or a copy with the inputs side by side.
#pragma once
#include <cstring>

#include "kernels.h"

namespace {

struct Panel {
    const char *data;
    int64_t row_bytes;  // from an output's row to the next

    const char *row(int64_t i) const { return data + i * row_bytes; }
};

inline const char *element(const Matrix &m, size_t size, int64_t expert, int64_t output, int64_t input) {
    return static_cast<const char *>(m.data) + (expert * m.per_expert + output * m.per_output + input * m.per_input) * size;
}

// The rows where they lie; their inputs must be side by side.
inline Panel in_place(const Matrix &m, size_t size, int64_t expert, int64_t output) {
    return {element(m, size, expert, output, 0), m.per_output * static_cast<int64_t>(size)};
}

template <class T>
inline void gather(const Matrix &m, int64_t expert, int64_t output, int64_t outputs, int64_t inputs, int64_t padded, T *to) {
    if (m.per_input == 1) {
        for (int64_t r = 0; r < outputs; r++) {
            memcpy(to + r * padded, element(m, sizeof(T), expert, output + r, 0), inputs * sizeof(T));
            memset(to + r * padded + inputs, 0, (padded - inputs) * sizeof(T));
        }
        return;
    }
    constexpr int64_t kSide = 32;  // squares, so that both sides stay in the cache
    for (int64_t k = 0; k < padded; k += kSide) {
        const int64_t end = k + kSide < padded ? k + kSide : padded;
        for (int64_t r = 0; r < outputs; r++) {
            const T *from = reinterpret_cast<const T *>(element(m, sizeof(T), expert, output + r, 0));
            for (int64_t i = k; i < end; i++) to[r * padded + i] = i < inputs ? from[i * m.per_input] : T(0);
        }
    }
}

// A copy of `outputs` rows in `to`, filled with zeros to `padded` inputs and to `rows` rows.
inline Panel copied(const Matrix &m, size_t size, int64_t expert, int64_t output, int64_t outputs, int64_t rows,
                    int64_t inputs, int64_t padded, char *to) {
    if (size == 4) gather(m, expert, output, outputs, inputs, padded, reinterpret_cast<uint32_t *>(to));
    else gather(m, expert, output, outputs, inputs, padded, reinterpret_cast<uint16_t *>(to));
    memset(to + outputs * padded * size, 0, (rows - outputs) * padded * size);
    return {to, padded * static_cast<int64_t>(size)};
}

}  // namespace
