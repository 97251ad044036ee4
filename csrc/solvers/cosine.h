// The cosine form of a Gram matrix: C_ij = G_ij / (n_i n_j), n_i = sqrt(G_ii), with a ridge on the
// diagonal. Solving in it makes a method indifferent to how far the gradient norms lie apart, and
// the ridge then means the same for every task (a ridge on G itself would drown the small ones).
#pragma once

#include <cmath>

#include "activity.h"

namespace flatmtl {

// cosine: [T, T]; rows and columns of inactive tasks become those of the identity.
// inverse_norm: [T], 0 for an inactive task.
template <class Team>
FLATMTL_HD void cosine_form(Team& team, const double* gram, const double* active, int64_t tasks,
                            double ridge, double* inverse_norm, double* cosine) {
  team.each(tasks, [&](int64_t i) {
    inverse_norm[i] = active[i] != 0 ? 1.0 / sqrt(gram[i * tasks + i]) : 0.0;
  });
  team.each2(tasks, tasks, [&](int64_t i, int64_t j) {
    double c = 0;
    if (active[i] != 0 && active[j] != 0) {
      // each half scaled by one norm at a time: a product of two tiny norms could underflow
      c = 0.5 * (gram[i * tasks + j] * inverse_norm[i] * inverse_norm[j] +
                 gram[j * tasks + i] * inverse_norm[j] * inverse_norm[i]);
      c = c > 1 ? 1 : c < -1 ? -1 : c;
    }
    cosine[i * tasks + j] = i == j ? 1 + ridge : c;
  });
}

}  // namespace flatmtl
