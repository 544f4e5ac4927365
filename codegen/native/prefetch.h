// Reads ahead: a few cache lines at every step of a loop, so that all are on their way when the loop ends.
#pragma once
#include <immintrin.h>

#include "kernels.h"

namespace {

class Reader {
  public:
    Reader(const Ahead &ahead, int64_t steps) : at_{ahead.at[0], ahead.at[1]}, left_(steps > 0 ? ahead.lines : 0) {
        if (left_ > 0 && steps <= left_) per_step_ = (left_ + steps - 1) / steps;
        if (left_ > 0)
            for (int64_t every = steps / left_; every > 1; every /= 2) between_ = 2 * between_ + 1;
    }

    inline __attribute__((always_inline)) void step(int64_t i) {
        if ((i & between_) || left_ <= 0) return;
        for (int64_t line = 0; line < per_step_; line++) {
            _mm_prefetch(at_[0] + 64 * line, _MM_HINT_T1);
            _mm_prefetch(at_[1] + 64 * line, _MM_HINT_T1);
        }
        at_[0] += 64 * per_step_;
        at_[1] += 64 * per_step_;
        left_ -= per_step_;
    }

  private:
    const char *at_[2];
    int64_t left_, per_step_ = 1, between_ = 0;  // between_: a power of two less one
};

}  // namespace
