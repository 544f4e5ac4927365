// A level's kernels without tiles: one kind of product for float32, one for bfloat16.
#pragma once
#include "mixed.h"

namespace {

template <class InFloat32, class InBfloat16>
struct Level {
    using Wide = Mixed<InFloat32>;
    using Narrow = Mixed<InBfloat16>;

    static int32_t tiled(const Ffn &f, int32_t rows) {
        return f.dtype == kFloat32 ? Wide::in_lanes(rows) : Narrow::in_lanes(rows);
    }
    static size_t packed_bytes(const Rows &rows) {
        return wide(rows) ? Wide::packed_bytes(rows) : Narrow::packed_bytes(rows);
    }
    static size_t hidden_bytes(const Rows &rows) {
        return wide(rows) ? Wide::hidden_bytes(rows) : Narrow::hidden_bytes(rows);
    }
    static size_t panel_bytes(const Ffn &f) {
        return f.dtype == kFloat32 ? Wide::panel_bytes(f) : Narrow::panel_bytes(f);
    }
    static void enter() {}
    static void leave() { _mm_sfence(); }  // others read what was written past the caches
    static void pack(const Batch &batch, const Rows &rows, Worker &worker) {
        wide(rows) ? Wide::pack(batch, rows, worker) : Narrow::pack(batch, rows, worker);
    }
    static void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        wide(rows) ? Wide::first(batch, rows, range, worker) : Narrow::first(batch, rows, range, worker);
    }
    static void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
        wide(rows) ? Wide::second(batch, rows, range, worker) : Narrow::second(batch, rows, range, worker);
    }

  private:
    static bool wide(const Rows &rows) { return rows.ffn->dtype == kFloat32; }
};

template <class InFloat32, class InBfloat16>
constexpr Kernels of_level() {
    using L = Level<InFloat32, InBfloat16>;
    return {L::tiled, L::packed_bytes, L::hidden_bytes, L::panel_bytes, L::enter,
            L::leave, L::pack,         L::first,        L::second,      add_rows};
}

}  // namespace
