// The cosine form of a Gram matrix: C_ij = G_ij / (n_i n_j), n_i = sqrt(G_ii). Solving in it makes
// a method indifferent to how far the gradient norms lie apart, and a ridge on its diagonal means
// the same for every task (a ridge on G itself would drown the small ones).
#pragma once

#include <cmath>

#include "activity.h"

namespace flatmtl {

// C_ij without a ridge, 0 if a task is inactive (then C_ii is 1 all the same).
FLATMTL_HD inline double cosine_entry(const double* gram, const double* active,
                                      const double* inverse_norm, int64_t tasks, int64_t i,
                                      int64_t j) {
  if (i == j) return 1;
  if (active[i] == 0 || active[j] == 0) return 0;
  // each half scaled by one norm at a time: a product of two tiny norms could underflow
  const double c = 0.5 * (gram[i * tasks + j] * inverse_norm[i] * inverse_norm[j] +
                          gram[j * tasks + i] * inverse_norm[j] * inverse_norm[i]);
  return c > 1 ? 1 : c < -1 ? -1 : c;
}

// cosine: [T, T], symmetric; rows and columns of inactive tasks become those of the identity.
// norm, inverse_norm: [T], 0 for an inactive task.
template <class Team>
FLATMTL_HD void cosine_form(Team& team, const double* gram, const double* active, int64_t tasks,
                            double* norm, double* inverse_norm, double* cosine) {
  team.each(tasks, [&](int64_t i) {
    norm[i] = active[i] != 0 ? sqrt(gram[i * tasks + i]) : 0.0;
    inverse_norm[i] = active[i] != 0 ? 1.0 / norm[i] : 0.0;
  });
  team.each2(tasks, tasks, [&](int64_t i, int64_t j) {
    cosine[i * tasks + j] = cosine_entry(gram, active, inverse_norm, tasks, i, j);
  });
}

}  // namespace flatmtl
