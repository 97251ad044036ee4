// MGDA (Desideri 2012; Sener and Koltun, arXiv 1810.04650): the point of least norm in the convex
// hull of the task gradients,  min w'Gw  over the simplex, exactly.
//
// With v = w / (w'Gw) it is  min 0.5 v'Gv - 1'v, v >= 0,  and in the cosine form, y_i = n_i v_i,
// C y = 1/n on the support: one non-negative QP whose condition does not depend on the norms.
#pragma once

#include "cosine.h"
#include "nnqp.h"

namespace flatmtl {

// Doubles of scratch: cosine [T, T], nnqp's, and b, y, active [T] each.
FLATMTL_HD inline int64_t mgda_work(int64_t tasks) {
  return tasks * tasks + nnqp_work(tasks) + 3 * tasks;
}

// The largest ridge that is tried: above the noise of a Gram matrix of float32 products.
constexpr double kLargestRidge = 1e-6;

// gram: [T, T], weights: [T]. ridge: added to the diagonal of the cosine matrix. A Gram matrix of
// rounded products can be indefinite by more than that (about 1e-7 for float32 products) and the
// active set then fails; the solve is repeated with a ridge 100 times larger, up to kLargestRidge,
// and the status says so.
template <class Team>
FLATMTL_HD void mgda(Team& team, const double* gram, int64_t tasks, double ridge, double* work,
                     double* weights, int64_t* status, double* residual) {
  double* cosine = work;
  double* b = cosine + tasks * tasks;
  double* y = b + tasks;
  double* active = y + tasks;
  double* inner = active + tasks;

  const int64_t alive = find_active(team, gram, tasks, active, b);
  cosine_form(team, gram, active, tasks, ridge, b, cosine);
  // b = 1/n scaled so that its largest entry is 1 (the scale cancels in w)
  const double top = team.max(tasks, [&](int64_t i) { return b[i]; });
  team.each(tasks, [&](int64_t i) { b[i] = top > 0 ? b[i] / top : 0.0; });

  int64_t outcome = activity_status(alive, tasks);
  while (true) {
    const bool converged = nnqp(team, cosine, b, active, tasks, inner, y, residual);
    // Near-stationary gradients make y large (up to 1/ridge), and the rounding of C y with it.
    const double size = team.sum(tasks, [&](int64_t i) { return y[i]; });
    const bool sound = converged && *residual <= 1e-6 + 1e-13 * size;
    if (sound) break;
    if (ridge >= kLargestRidge) {
      outcome |= kNotConverged;
      break;
    }
    ridge = ridge > 1e-12 ? 100 * ridge : 1e-10;
    if (ridge > kLargestRidge) ridge = kLargestRidge;
    outcome |= kRidgeRaised;
    team.each(tasks, [&](int64_t i) { cosine[i * tasks + i] = 1 + ridge; });
  }

  const double total = team.sum(tasks, [&](int64_t i) { return y[i] * b[i]; });
  team.each(tasks, [&](int64_t i) { weights[i] = total > 0 ? y[i] * b[i] / total : 0.0; });
  team.one([&] { *status = outcome; });
}

}  // namespace flatmtl
