// One call: pairs sorted by expert, the experts' rows given to threads, and each token's rows added up.
#pragma once
#include "kernels.h"

enum Status : int32_t { kDone = 0, kBadExpert = 1, kNoMemory = 2, kBadLevel = 3 };

// `shared` may be null. Never throws.
Status run(const Ffn &routed, const Ffn *shared, const Call &call, const Kernels &kernels) noexcept;
