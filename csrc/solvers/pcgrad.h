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

#include "activity.h"

namespace flatmtl {

// Doubles of scratch: R, then the visit's coefficients, then the activity of every task.
FLATMTL_HD inline int64_t pcgrad_work(int64_t tasks) { return tasks * tasks + 2 * tasks; }

// gram: [T, T], order: [T, T], weights: [T], coefficients: [T, T] (K).
template <class Team>
FLATMTL_HD void pcgrad(Team& team, const double* gram, const int64_t* order, int64_t tasks,
                       double* work, double* weights, double* coefficients, int64_t* status) {
  double* product = work;                // R  [T, T]
  double* visit = work + tasks * tasks;  // c  [T]
  double* active = visit + tasks;        //    [T]
  const int64_t alive = find_active(team, gram, tasks, active, visit);

  team.each2(tasks, tasks, [&](int64_t i, int64_t j) {
    const bool on = active[i] != 0 && active[j] != 0;
    product[i * tasks + j] = on ? gram[i * tasks + j] : 0.0;
    coefficients[i * tasks + j] = on && i == j ? 1.0 : 0.0;
  });
  for (int64_t s = 0; s < tasks; ++s) {
    team.each(tasks, [&](int64_t i) {
      const int64_t j = order[i * tasks + s];
      visit[i] = 0;
      if (j < 0 || j >= tasks || j == i || active[i] == 0 || active[j] == 0) return;
      const double p = product[i * tasks + j];
      if (!(p < 0)) return;
      visit[i] = p / gram[j * tasks + j];
      coefficients[i * tasks + j] -= visit[i];
    });
    team.each2(tasks, tasks, [&](int64_t i, int64_t k) {
      if (visit[i] != 0 && active[k] != 0)
        product[i * tasks + k] -= visit[i] * gram[order[i * tasks + s] * tasks + k];
    });
  }
  team.each(tasks, [&](int64_t j) {
    double total = 0;
    for (int64_t i = 0; i < tasks; ++i) total += coefficients[i * tasks + j];
    weights[j] = total;
  });
  team.one([&] { *status = activity_status(alive, tasks); });
}

}  // namespace flatmtl
