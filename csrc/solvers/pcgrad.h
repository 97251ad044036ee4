// PCGrad (Yu et al., arXiv 2001.06782) on coefficients: no gradient is written.
//
// The projected gradient of task i is sum_j K_ij g_j. With K = I and R = K G (R_ij = <g_i', g_j>),
// visiting j = order[i][s] for s = 0..T-1, j != i:
//
//     R_ij < 0  ->  c = R_ij / G_jj;  K_ij -= c;  R_i: -= c * G_j:
//
// and the update is sum_j w_j g_j, w = sum_i K_i: . R is kept up to date, so that a visit without a
// conflict costs nothing: O(T^2) plus O(T) a conflict and row. Two phases a visit, all rows at
// once.
#pragma once

#include "problem.h"

namespace flatmtl {

struct PcGrad {
  const int64_t* order;  // [B, T, T]
  double* coefficients;  // K out [B, T, T]

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + tasks * tasks + 2 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* product = scratch + Opened::work(n);  // R  [T, T]
    double* visit = product + n * n;              // c  [T]
    const int64_t* visits = order + p.index * n * n;
    double* k = coefficients + p.index * n * n;
    const Opened o = open(team, p, scratch, product);
    const bool solve = solvable(o);
    const double* active = o.active;
    double* gram = o.cosine;  // its place; G itself is used, as every visit reads a row of it

    team.each2(n, n, [&](int64_t i, int64_t j) {
      const bool on = solve && active[i] != 0 && active[j] != 0;
      gram[i * n + j] = product[i * n + j] = on ? p.gram[i * n + j] : 0.0;
      k[i * n + j] = on && i == j ? 1.0 : 0.0;
    });
    if (!solve) return give_up(team, p, o.status);
    for (int64_t s = 0; s < n; ++s) {
      team.each(n, [&](int64_t i) {
        const int64_t j = visits[i * n + s];
        visit[i] = 0;
        if (j < 0 || j >= n || j == i || active[i] == 0 || active[j] == 0) return;
        const double r = product[i * n + j];
        if (!(r < 0)) return;
        visit[i] = r / gram[j * n + j];
        k[i * n + j] -= visit[i];
      });
      team.each2(n, n, [&](int64_t i, int64_t m) {
        if (visit[i] != 0) product[i * n + m] -= visit[i] * gram[visits[i * n + s] * n + m];
      });
    }
    team.each(n, [&](int64_t j) {
      double total = 0;
      for (int64_t i = 0; i < n; ++i) total += k[i * n + j];
      p.weights[j] = total;
    });
    team.one([&] {
      *p.status = o.status;
      *p.residual = 0;
    });
  }
};

}  // namespace flatmtl
