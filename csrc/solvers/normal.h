// Standard normal numbers, one for every task and problem: Box and Muller on the words of
// Philox(seed; 0, task, batch, step). The key differs from the one of the random orders, so that a
// seed shared by two methods does not tie them together.
#pragma once

#include <cmath>

#include "philox.h"

namespace flatmtl {

// out: [T]
template <class Team>
FLATMTL_HD void draw_normal(Team& team, uint64_t seed, uint64_t step, int64_t batch_index,
                            int64_t tasks, double* out) {
  const uint64_t key = seed ^ (step & 0xFFFFFFFF00000000ull) ^ 0x9E3779B97F4A7C15ull;
  team.each(tasks, [&](int64_t i) {
    const Philox words = philox(key, 0, static_cast<uint32_t>(i),
                                static_cast<uint32_t>(batch_index), static_cast<uint32_t>(step));
    const double unit = 1.0 / 9007199254740992.0;  // 2^-53
    const uint64_t a = (static_cast<uint64_t>(words.x) << 21) + (words.y >> 11);
    const uint64_t b = (static_cast<uint64_t>(words.z) << 21) + (words.w >> 11);
    const double u = (static_cast<double>(a) + 0.5) * unit, v = static_cast<double>(b) * unit;
#ifdef __CUDA_ARCH__
    const double cosine = cospi(2 * v);  // cos would bring its reduction of huge angles
#else
    const double cosine = cos(6.283185307179586 * v);
#endif
    out[i] = sqrt(-2 * log(u)) * cosine;
  });
}

}  // namespace flatmtl
