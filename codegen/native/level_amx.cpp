// AMX for bfloat16 from five rows on; everything else as AVX-512 with products of pairs.
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

DSMOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c")
#define DSMOE_PAIRS
#include "vector_avx512.h"
#include "level.h"
#include "tiles.h"

namespace {

using Otherwise = Level<Floats, Pairs>;

// bfloat16 in tiles, or along the rows; float32 as without AMX.
int32_t tiled(const Ffn &f, int32_t rows) {
    if (f.dtype == kFloat32) return Otherwise::tiled(f, rows);
    return rows > kFewRows ? rows : 0;
}

bool by_amx(const Rows &rows) { return rows.tiled > 0 && rows.ffn->dtype == kBfloat16; }

size_t packed_bytes(const Rows &rows) {
    return by_amx(rows) ? ByTiles::packed_bytes(rows) : Otherwise::packed_bytes(rows);
}
size_t hidden_bytes(const Rows &rows) {
    return by_amx(rows) ? ByTiles::hidden_bytes(rows) : Otherwise::hidden_bytes(rows);
}
size_t panel_bytes(const Ffn &f) {
    const size_t a = Otherwise::panel_bytes(f), b = ByTiles::panel_bytes(f);
    return a > b ? a : b;
}
void pack(const Batch &batch, const Rows &rows, Worker &worker) {
    by_amx(rows) ? ByTiles::pack(batch, rows, worker) : Otherwise::pack(batch, rows, worker);
}
void first(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
    by_amx(rows) ? ByTiles::first(batch, rows, range, worker) : Otherwise::first(batch, rows, range, worker);
}
void second(const Batch &batch, const Rows &rows, const Range &range, Worker &worker) {
    by_amx(rows) ? ByTiles::second(batch, rows, range, worker) : Otherwise::second(batch, rows, range, worker);
}

}  // namespace

extern const Kernels kAmx = {tiled,          packed_bytes, hidden_bytes, panel_bytes, ByTiles::enter,
                             ByTiles::leave, pack,         first,        second,      add_rows};
DSMOE_TARGET_END
