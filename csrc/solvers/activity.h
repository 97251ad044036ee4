// Which tasks take part in a solve, read from their Gram matrix.
//
// A task is inactive if its gradient is zero or not finite (G_ii == 0, NaN or inf), or if a product
// with an active task is not finite. It gets weight 0 and a bit in the status; the others are
// solved as if it were not there. A NaN in one gradient spoils only its own row and column of G, so
// masking is exact.
#pragma once

#include "team.h"

namespace flatmtl {

FLATMTL_HD inline bool is_finite(double x) { return x - x == 0; }

// active[i] becomes 1 or 0. Returns the number of active tasks. active: [T], scratch: [T].
template <class Team>
FLATMTL_HD int64_t find_active(Team& team, const double* gram, int64_t tasks, double* active,
                               double* scratch) {
  team.each(tasks, [&](int64_t i) {
    const double g = gram[i * tasks + i];
    scratch[i] = is_finite(g) && g > 0 ? 1.0 : 0.0;
  });
  // Finite diagonals bound the off-diagonals of a true Gram; a product that still is not finite
  // comes from a caller's own matrix, and takes both of its tasks out.
  team.each(tasks, [&](int64_t i) {
    bool ok = scratch[i] != 0;
    for (int64_t j = 0; ok && j < tasks; ++j)
      ok = scratch[j] == 0 || (is_finite(gram[i * tasks + j]) && is_finite(gram[j * tasks + i]));
    active[i] = ok ? 1.0 : 0.0;
  });
  return static_cast<int64_t>(team.sum(tasks, [&](int64_t i) { return active[i]; }));
}

FLATMTL_HD inline int64_t activity_status(int64_t active, int64_t tasks) {
  return (active == 0 ? kNoActiveTask : 0) | (active < tasks ? kInactiveTask : 0);
}

}  // namespace flatmtl
