// PCD, priority-constrained descent (arXiv 2606.29521): the direction nearest to the primary task's
// normalised gradient that gives every other task at least a fraction tau of its own progress:
//
//   min 0.5 ||d - s_0 g_0||^2   subject to   <s_j g_j, d> >= tau ||s_j g_j||^2,  j >= 1,
//
// s_i = 1 / sqrt(EMA of ||g_i||^2 + eps), and d then scaled to the length of g_0. In the cosine
// form C y >= tau m - C_0 m_0 with m = s n: a non-negative QP. No such direction: d = g_0.
#pragma once

#include "nnqp.h"
#include "problem.h"

namespace flatmtl {

struct Pcd {
  double* state;  // [B, T + 1]: moving averages of the squared norms, steps
  double tau;
  double beta;
  double eps;
  double ridge;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + nnqp_work(tasks) + 5 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* size = scratch + Opened::work(n);  // [T] m_i = s_i n_i
    double* b = size + n;                      // [T]
    double* y = b + n;                         // [T] then w_i in units of 1 / n_i
    double* use = y + n;                       // [T] the constraints
    double* row = use + n;                     // [T]
    double* inner = row + n;
    const Opened o = open(team, p, scratch, inner);
    double* average = state + p.index * (n + 1);
    const double steps = average[n] + 1;
    if ((o.status & kInvalidGram) == 0) {
      const double bias = 1 - exp(steps * log(beta));  // beta = 0: 1
      team.each(n, [&](int64_t i) {
        const double square = p.gram[i * n + i];
        if (is_finite(square)) average[i] = beta * average[i] + (1 - beta) * square;
        const double root = sqrt(average[i] / bias + eps);
        size[i] = root > 0 ? o.norm[i] / root : 0.0;
      });
      team.one([&] { average[n] = steps; });
    }
    if (!solvable(o) || o.active[0] == 0) return give_up(team, p, o.status);

    team.each(n, [&](int64_t j) {
      use[j] = j > 0 ? o.active[j] : 0.0;
      b[j] = use[j] != 0 ? tau * size[j] - o.cosine[j * n] * size[0] : 0.0;
    });
    const double most = team.max(n, [&](int64_t j) { return fabs(b[j]); });
    bool feasible = true;
    int64_t bits = with_rising_ridge(team, o, n, ridge, [&](double used) {
      const bool sound = nnqp(team, o.cosine, b, use, n, inner, y, p.residual);
      // Only the ridge holds the multipliers of constraints that contradict each other.
      feasible = used * team.max(n, [&](int64_t j) { return y[j]; }) <= 1e-3 * most;
      return sound || !feasible;
    });
    double error = *p.residual;
    if (!feasible) {
      bits = kFallback;
      error = 0;
      team.each(n, [&](int64_t j) { y[j] = 0; });
    }
    // y is d in units of the unit gradients; its length without the ridge
    team.one([&] { y[0] = size[0]; });
    team.each(n, [&](int64_t i) {
      double s = 0;
      for (int64_t j = 0; j < n; ++j) s += (i == j ? 1.0 : o.cosine[i * n + j]) * y[j];
      row[i] = y[i] * s;
    });
    const double square = team.sum(n, [&](int64_t i) { return row[i]; });
    const double magnitude = team.sum(n, [&](int64_t i) { return y[i]; });
    const bool vanishes = !(square > 1e-14 * magnitude * magnitude);
    const double length = vanishes ? 0.0 : 1 / sqrt(square);
    team.each(n, [&](int64_t i) {
      p.weights[i] = o.active[i] != 0 && !vanishes ? y[i] * length * (o.norm[0] / o.norm[i]) : 0.0;
    });
    conclude(team, p, o, vanishes ? bits | kFallback : bits, error);
  }
};

}  // namespace flatmtl
