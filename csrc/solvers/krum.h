// Krum and Multi-Krum (Blanchard et al., NeurIPS 2017): the mean of the gradients whose nearest
// neighbours are nearest. Distances come from G: ||g_i - g_j||^2 = G_ii + G_jj - 2 G_ij.
#pragma once

#include "problem.h"

namespace flatmtl {

struct Krum {
  int64_t byzantine;
  int64_t selected;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + tasks * tasks + 2 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* distance = scratch + Opened::work(n);  // [T, T], -1: not to be counted
    double* score = distance + n * n;              // [T]
    const Opened o = open(team, p, scratch, distance);
    if (!solvable(o)) return give_up(team, p, o.status);
    const double top = team.max(n, [&](int64_t i) { return o.norm[i]; });
    team.each2(n, n, [&](int64_t i, int64_t j) {
      const double a = o.norm[i] / top, b = o.norm[j] / top;
      const double square = a * a + b * b - 2 * a * b * o.cosine[i * n + j];
      const bool counts = i != j && o.active[i] != 0 && o.active[j] != 0;
      distance[i * n + j] = !counts ? -1.0 : square > 0 ? sqrt(square) : 0.0;
    });
    const int64_t nearest = o.alive - byzantine - 2 > 1 ? o.alive - byzantine - 2 : 1;
    team.each(n, [&](int64_t i) {
      double total = 0;
      double* row = distance + i * n;
      for (int64_t k = 0; k < nearest; ++k) {
        int64_t best = -1;
        for (int64_t j = 0; j < n; ++j)
          if (row[j] >= 0 && (best < 0 || row[j] < row[best])) best = j;
        if (best < 0) break;
        total += row[best];
        row[best] = -1;
      }
      score[i] = total;
    });
    const int64_t count = selected < o.alive ? selected : o.alive;
    team.each(n, [&](int64_t i) {
      int64_t before = 0;
      for (int64_t j = 0; j < n; ++j)
        if (o.active[j] != 0 && (score[j] < score[i] || (score[j] == score[i] && j < i))) ++before;
      p.weights[i] = o.active[i] != 0 && before < count ? 1.0 / static_cast<double>(count) : 0.0;
    });
    team.one([&] {
      *p.status = o.status;
      *p.residual = 0;
    });
  }
};

}  // namespace flatmtl
