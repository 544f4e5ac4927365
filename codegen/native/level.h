// A level's kernels by rows: one kind of product for float32, one for bfloat16.
#pragma once
#include "rows.h"

namespace {

template <class InFloat32, class InBfloat16>
struct Level {
    static bool tiled(const Ffn &, int32_t) { return false; }
    static size_t packed_bytes(const Rows &rows) {
        return wide(rows) ? ByRows<InFloat32>::packed_bytes(rows) : ByRows<InBfloat16>::packed_bytes(rows);
    }
    static size_t hidden_bytes(const Rows &rows) {
        return wide(rows) ? ByRows<InFloat32>::hidden_bytes(rows) : ByRows<InBfloat16>::hidden_bytes(rows);
    }
    static size_t panel_bytes(const Ffn &f) {
        const int64_t first = f.products * f.hidden, inputs = first > f.width ? first : f.width;
        return kHiddenStep * (inputs + 2 * 64) * element_bytes(f.dtype);
    }
    static void nothing() {}
    static void pack(const Batch &batch, const Rows &rows, Worker &worker) {
        wide(rows) ? ByRows<InFloat32>::pack(batch, rows, worker) : ByRows<InBfloat16>::pack(batch, rows, worker);
    }
    static void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        wide(rows) ? ByRows<InFloat32>::first(batch, rows, range, worker) : ByRows<InBfloat16>::first(batch, rows, range, worker);
    }
    static void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        wide(rows) ? ByRows<InFloat32>::second(batch, rows, range, worker) : ByRows<InBfloat16>::second(batch, rows, range, worker);
    }

  private:
    static bool wide(const Rows &rows) { return rows.ffn->dtype == kFloat32; }
};

template <class InFloat32, class InBfloat16>
constexpr Kernels by_rows() {
    using L = Level<InFloat32, InBfloat16>;
    return {L::tiled, L::packed_bytes, L::hidden_bytes, L::panel_bytes, L::nothing, L::nothing, L::pack, L::first, L::second, add_rows};
}

}  // namespace
