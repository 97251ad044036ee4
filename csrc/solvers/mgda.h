// MGDA (Desideri 2012; Sener and Koltun, arXiv 1810.04650): the point of least norm in the convex
// hull of the task gradients,  min w'Gw  over the simplex, exactly.
//
// With v = w / (w'Gw) it is  min 0.5 v'Gv - 1'v, v >= 0,  and in the cosine form, y_i = n_i v_i,
// C y = 1/n on the support: one non-negative QP whose condition does not depend on the norms.
#pragma once

#include "nnqp.h"
#include "problem.h"

namespace flatmtl {

struct Mgda {
  double ridge;

  // opened, nnqp's, b and y
  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + nnqp_work(tasks) + 2 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* b = scratch + Opened::work(n);  // [T]
    double* y = b + n;                      // [T]
    double* inner = y + n;
    const Opened o = open(team, p, scratch, inner);
    if (!solvable(o)) return give_up(team, p, o.status);
    // b = 1/n scaled so that its largest entry is 1 (the scale cancels in w)
    const double top = team.max(n, [&](int64_t i) { return o.inverse_norm[i]; });
    team.each(n, [&](int64_t i) { b[i] = o.inverse_norm[i] / top; });
    const int64_t bits = with_rising_ridge(team, o, n, ridge, [&](double) {
      return nnqp(team, o.cosine, b, o.active, n, inner, y, p.residual);
    });
    const double total = team.sum(n, [&](int64_t i) { return y[i] * b[i]; });
    team.each(n, [&](int64_t i) { p.weights[i] = y[i] * b[i] / total; });
    conclude(team, p, o, bits, *p.residual);
  }
};

}  // namespace flatmtl
