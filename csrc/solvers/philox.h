// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3" (SC 2011): four 32-bit words from a 128-bit counter and a 64-bit key, no state, so that
// every thread draws its own numbers and host and device draw the same ones.
#pragma once

#include <cstdint>

#include "team.h"

namespace flatmtl {

struct Philox {
  uint32_t x, y, z, w;

  // By selection, not by an array: an array indexed at run time would live in local memory on a
  // GPU.
  FLATMTL_HD uint32_t word(uint32_t i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
};

FLATMTL_HD inline Philox philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

}  // namespace flatmtl
