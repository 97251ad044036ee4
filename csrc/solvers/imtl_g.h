// IMTL-G (Liu et al., ICLR 2021): the combination with equal projections on every unit gradient,
// sum w = 1. In the cosine form  C y = 1,  w ~ y/n.
//
// With T >= 3 and conflicts sum(y/n) may be zero or negative, which would turn the update around:
// then w_i ~ 1/n_i, and the status says so.
#pragma once

#include "linear.h"

namespace flatmtl {

struct ImtlG {
  double ridge;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + solve_cosine_work(tasks) + 2 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* y = scratch + Opened::work(n);  // [T]
    double* inner = y + n;
    const Opened o = open(team, p, scratch, inner);
    if (!solvable(o)) return give_up(team, p, o.status);
    const int64_t bits = solve_cosine(team, o, n, nullptr, ridge, inner, y, p.residual);
    const double error = *p.residual;
    const double top = team.max(n, [&](int64_t i) { return o.inverse_norm[i]; });
    team.each(n, [&](int64_t i) { y[i] *= o.inverse_norm[i] / top; });
    const double total = team.sum(n, [&](int64_t i) { return y[i]; });
    if (!(total > 0)) {
      equal_contributions(team, p, o);
      return conclude(team, p, o, bits | kFallback, error);
    }
    team.each(n, [&](int64_t i) { p.weights[i] = y[i] / total; });
    conclude(team, p, o, bits, error);
  }
};

}  // namespace flatmtl
