// AVX-512: sixteen floats; bfloat16 widened as it is read.
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

DSMOE_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "vector_avx512.h"
#include "level.h"
extern const Kernels kAvx512 = of_level<Floats, Widened>();
DSMOE_TARGET_END
