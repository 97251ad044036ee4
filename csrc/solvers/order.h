// Random task orders for the methods that visit tasks in turn (PCGrad, GradVac): one permutation of
// 0..T-1 for every row, by Fisher-Yates on the words of Philox(seed; draw, row, batch, step).
// A word u gives an index below n as floor(u * n / 2^32); the bias, n / 2^32, is below any use
// here.
#pragma once

#include "philox.h"

namespace flatmtl {

// order: [T, T]. The 64-bit step counter is folded into the key's high word beyond 2^32 steps.
template <class Team>
FLATMTL_HD void draw_order(Team& team, uint64_t seed, uint64_t step, int64_t batch_index,
                           int64_t tasks, int64_t* order) {
  const uint64_t key = seed ^ (step & 0xFFFFFFFF00000000ull);
  team.each(tasks, [&](int64_t i) {
    int64_t* row = order + i * tasks;
    for (int64_t k = 0; k < tasks; ++k) row[k] = k;
    Philox words = {};
    // draw numbers the words used by this row: four of them a call
    uint32_t draw = 0;
    for (int64_t k = tasks - 1; k > 0; --k, ++draw) {
      if (draw % 4 == 0)
        words = philox(key, draw / 4, static_cast<uint32_t>(i), static_cast<uint32_t>(batch_index),
                       static_cast<uint32_t>(step));
      const uint64_t u = words.word(draw % 4);
      const int64_t pick = static_cast<int64_t>((u * static_cast<uint64_t>(k + 1)) >> 32);
      const int64_t last = row[k];
      row[k] = row[pick];
      row[pick] = last;
    }
  });
}

}  // namespace flatmtl
