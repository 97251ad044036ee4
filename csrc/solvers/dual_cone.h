// UPGrad and DualProj (Quinton and Rey, arXiv 2406.16232): projections on the dual cone of the task
// gradients, so that the update conflicts with none of them.
//
//   DualProj:  argmin v'Gv, v >= u            the projection of the preferred combination u
//   UPGrad:    sum_i argmin v'Gv, v >= u_i e_i  the sum of the projections of u_i g_i
//
// With z = v - u and y = n z it is a non-negative QP in the cosine form, C y >= -C (n u).
#pragma once

#include "nnqp.h"
#include "problem.h"

namespace flatmtl {

struct DualCone {
  const double* preference;  // u [T], or null: 1/T
  bool each;                 // UPGrad
  double ridge;

  // opened, nnqp's, b, y, u (in norms) and total
  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + nnqp_work(tasks) + 4 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* b = scratch + Opened::work(n);  // [T]
    double* y = b + n;                      // [T]
    double* start = y + n;                  // [T] n_i u_i
    double* total = start + n;              // [T] n_i (w_i - u_i)
    double* inner = total + n;
    const Opened o = open(team, p, scratch, inner);
    if (!solvable(o)) return give_up(team, p, o.status);
    // Norms relative to the largest, so that tiny and huge gradients are alike.
    const double top = team.max(n, [&](int64_t i) { return o.norm[i]; });
    team.each(n, [&](int64_t i) {
      start[i] = o.norm[i] / top * (preference ? preference[i] : 1.0 / static_cast<double>(n));
      total[i] = 0;
    });
    int64_t bits = 0;
    double worst = 0;
    // total += factor * argmin for the right-hand side that right(j) gives, the ridge included
    const auto project = [&](double factor, const auto& right) {
      bits |= with_rising_ridge(team, o, n, ridge, [&](double) {
        team.each(n, [&](int64_t j) { b[j] = right(j); });
        return nnqp(team, o.cosine, b, o.active, n, inner, y, p.residual);
      });
      const double error = *p.residual;
      worst = error > worst || !(error <= worst) ? error : worst;
      team.each(n, [&](int64_t i) { total[i] += factor * y[i]; });
    };
    if (each) {
      for (int64_t i = 0; i < n; ++i) {
        const double share = start[i];
        if (o.active[i] == 0 || !(share > 0)) continue;
        project(share, [&](int64_t j) { return -o.cosine[j * n + i]; });
      }
    } else {
      project(1.0, [&](int64_t j) {
        double s = 0;
        for (int64_t k = 0; k < n; ++k) s -= o.cosine[j * n + k] * start[k];
        return s;
      });
    }
    team.each(n, [&](int64_t i) {
      p.weights[i] = o.active[i] != 0 ? (start[i] + total[i]) * top / o.norm[i] : 0.0;
    });
    conclude(team, p, o, bits, worst);
  }
};

}  // namespace flatmtl
