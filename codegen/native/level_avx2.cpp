// AVX2 with FMA: eight floats; bfloat16 widened as it is read.
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

DSMOE_TARGET("avx2,fma,f16c")
#define DSMOE_FEW_REGISTERS
#include "vector_avx2.h"
#include "level.h"
extern const Kernels kAvx2 = of_level<Floats, Widened>();
DSMOE_TARGET_END
