// GradVac (Wang et al., arXiv 2010.05874) on coefficients: no gradient is written.
//
// The modified gradient of task i is sum_j K_ij g_j. Visiting j = order[i][s], j != i, with the
// cosine phi of it and g_j and the target h = target_ij:
//
//   phi < h:  K_ij += |g_i'| / |g_j| * (h sqrt(1 - phi^2) - phi sqrt(1 - h^2)) / sqrt(1 - h^2)
//   always:   target_ij = (1 - beta) h + beta phi
//
// so that the cosine becomes h. With targets 0 it is PCGrad. R = K G is kept up to date, as there.
#pragma once

#include "problem.h"

namespace flatmtl {

struct GradVac {
  const int64_t* order;  // [B, T, T]
  double* target;        // [B, T, T]
  double beta;
  double eps;  // added to sqrt(1 - h^2)

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + tasks * tasks + 2 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* k = scratch + Opened::work(n);  // K  [T, T], in units of the norms: K_ij n_j
    double* visit = k + n * n;              // [T] what is added to K_ij n_j
    const Opened o = open(team, p, scratch, k);
    double* product = o.cosine;  // its place: K C  [T, T], <g_i', g_j> / n_j
    if (!solvable(o)) return give_up(team, p, o.status);
    const int64_t* visits = order + p.index * n * n;
    double* goal = target + p.index * n * n;
    const double top = team.max(n, [&](int64_t i) { return o.norm[i]; });

    team.each2(n, n, [&](int64_t i, int64_t j) {
      const double own = o.norm[i] / top;
      k[i * n + j] = i == j ? own : 0.0;
      product[i * n + j] *= own;
    });
    for (int64_t s = 0; s < n; ++s) {
      team.each(n, [&](int64_t i) {
        const int64_t j = visits[i * n + s];
        visit[i] = 0;
        if (j < 0 || j >= n || j == i || o.active[i] == 0 || o.active[j] == 0) return;
        double square = 0;
        for (int64_t m = 0; m < n; ++m) square += k[i * n + m] * product[i * n + m];
        const double length = square > 0 ? sqrt(square) : 0.0;
        double phi = length > 0 ? product[i * n + j] / length : 0.0;
        phi = phi > 1 ? 1 : phi < -1 ? -1 : phi;
        const double h = goal[i * n + j];
        if (phi < h) {
          const double sine = sqrt(1 - h * h > 0 ? 1 - h * h : 0.0);
          visit[i] = length * (h * sqrt(1 - phi * phi) - phi * sine) / (sine + eps);
          if (!is_finite(visit[i]))
            visit[i] = 0;  // h = 1 and eps = 0: no finite correction does it
          k[i * n + j] += visit[i];
        }
        goal[i * n + j] = (1 - beta) * h + beta * phi;
      });
      team.each2(n, n, [&](int64_t i, int64_t m) {
        if (visit[i] != 0)
          product[i * n + m] +=
              visit[i] * cosine_entry(p.gram, o.active, o.inverse_norm, n, visits[i * n + s], m);
      });
    }
    team.each(n, [&](int64_t j) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += k[i * n + j];
      p.weights[j] = o.active[j] != 0 ? total * (top / o.norm[j]) : 0.0;
    });
    team.one([&] {
      *p.status = o.status;
      *p.residual = 0;
    });
  }
};

}  // namespace flatmtl
