// ConFIG (Liu et al., arXiv 2408.11104): the direction whose cosines with the task gradients are in
// the proportion of a preference p (ones: all equal), with the length sum_i <g_i, d/||d||>.
//
// C y = p,  a = y/n,  w = a * (1'Ga) / (a'Ga): the pseudo-inverse of the T x P matrix of unit
// gradients, without that matrix.
#pragma once

#include "linear.h"

namespace flatmtl {

struct Config {
  const double* preference;  // [T], or null: ones
  double ridge;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + solve_cosine_work(tasks) + 2 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* y = scratch + Opened::work(n);  // [T]
    double* image = y + n;                  // [T] C y
    double* inner = image + n;
    const Opened o = open(team, p, scratch, inner);
    if (!solvable(o)) return give_up(team, p, o.status);
    const int64_t bits = solve_cosine(team, o, n, preference, ridge, inner, y, p.residual);
    const double error = *p.residual;
    const double top = team.max(n, [&](int64_t i) { return o.norm[i]; });
    team.each(n, [&](int64_t i) {
      double s = 0;
      for (int64_t k = 0; k < n; ++k) s += o.cosine[i * n + k] * y[k];
      image[i] = s;
    });
    const double square = team.sum(n, [&](int64_t i) { return y[i] * image[i]; });
    const double along = team.sum(n, [&](int64_t i) { return o.norm[i] / top * image[i]; });
    if (!(square > 0)) {
      equal_contributions(team, p, o);
      return conclude(team, p, o, bits | kFallback, error);
    }
    team.each(n, [&](int64_t i) {
      p.weights[i] = o.active[i] != 0 ? y[i] * (along / square) * (top / o.norm[i]) : 0.0;
    });
    conclude(team, p, o, bits, error);
  }
};

}  // namespace flatmtl
