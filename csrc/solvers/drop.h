// The uniform numbers of GradDrop: one for every column, U = (2 b + 1) / 2^24 in (0, 1), b the
// upper 23 bits of word column % 4 of Philox(key; column / 4, 0, step). Exact in float, and so is
// 1 - U. The key differs from those of the random orders and normal numbers, as in normal.h.
#pragma once

#include "philox.h"

namespace flatmtl {

FLATMTL_HD inline uint64_t drop_key(uint64_t seed, uint64_t step) {
  return seed ^ (step & 0xFFFFFFFF00000000ull) ^ 0xD1B54A32D192ED03ull;
}

// The words of the columns 4 * quad .. 4 * quad + 3.
FLATMTL_HD inline Philox drop_words(uint64_t key, uint32_t step, int64_t quad) {
  return philox(key, static_cast<uint32_t>(quad),
                static_cast<uint32_t>(static_cast<uint64_t>(quad) >> 32), 0, step);
}

FLATMTL_HD inline float drop_uniform(uint32_t word) {
  return static_cast<float>(2 * (word >> 9) + 1) * (1.0f / 16777216.0f);
}

}  // namespace flatmtl
