// AVX-512 with products of bfloat16 pairs.
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

DSMOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#define DSMOE_PAIRS
#include "vector_avx512.h"
#include "level.h"
extern const Kernels kAvx512Bf16 = of_level<Floats, Pairs>();
DSMOE_TARGET_END
