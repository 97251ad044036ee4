// SDMGrad (arXiv 2305.18409) and MoDo (arXiv 2305.20057): weights that follow a stochastic gradient
// on the simplex. They take the cross Gram matrix A = J1 J2' of two batches, which is neither
// symmetric nor semi-definite; the weights of the last call are their state.
#pragma once

#include "problem.h"

namespace flatmtl {

// active[i]: row and column i of A are finite and not all zero. Returns their number.
template <class Team>
FLATMTL_HD int64_t find_active_cross(Team& team, const double* cross, int64_t n, double* active) {
  team.each(n, [&](int64_t i) {
    bool finite = true, row = false, column = false;
    for (int64_t j = 0; j < n; ++j) {
      const double a = cross[i * n + j], b = cross[j * n + i];
      // a task that spoils every product of its own must not take the others with it
      const bool own = is_finite(cross[j * n + j]);
      if (own || j == i) finite = finite && is_finite(a) && is_finite(b);
      row = row || (is_finite(a) && a != 0);
      column = column || (is_finite(b) && b != 0);
    }
    active[i] = finite && row && column ? 1.0 : 0.0;
  });
  return static_cast<int64_t>(team.sum(n, [&](int64_t i) { return active[i]; }));
}

// x <- its Euclidean projection on the simplex of the active entries (0 elsewhere). Michelot's
// algorithm: the support only shrinks. Finite, at most T rounds.
template <class Team>
FLATMTL_HD void project_on_simplex(Team& team, const double* active, int64_t n, double* x,
                                   double* held) {
  // Relative to the largest: the projection does not change, and huge entries do not cancel.
  const double top = team.max(n, [&](int64_t i) { return active[i] != 0 ? x[i] : -1e300; });
  team.each(n, [&](int64_t i) {
    held[i] = active[i];
    x[i] -= top;
  });
  double threshold = 0;
  for (int64_t round = 0; round <= n; ++round) {
    const double count = team.sum(n, [&](int64_t i) { return held[i]; });
    const double total = team.sum(n, [&](int64_t i) { return held[i] != 0 ? x[i] : 0.0; });
    threshold = (total - 1) / count;
    const double leaving =
        team.sum(n, [&](int64_t i) { return held[i] != 0 && !(x[i] > threshold) ? 1.0 : 0.0; });
    if (leaving == 0 || leaving == count) break;
    team.each(n, [&](int64_t i) {
      if (!(x[i] > threshold)) held[i] = 0;
    });
  }
  team.each(n, [&](int64_t i) {
    const double moved = x[i] - threshold;
    x[i] = active[i] != 0 && moved > 0 ? moved : 0.0;
  });
}

struct SdmGrad {
  double* state;             // w [B, T]
  const double* preference;  // [T], or null: 1/T
  double lr;
  double momentum;
  int64_t steps;
  double lambda;

  FLATMTL_HD static int64_t work(int64_t tasks) { return 4 * tasks; }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* active = scratch;       // [T]
    double* velocity = active + n;  // [T]
    double* slope = velocity + n;   // [T]
    double* held = slope + n;       // [T]
    double* w = state + p.index * n;
    const int64_t alive = find_active_cross(team, p.gram, n, active);
    const int64_t status = activity_status(alive, n);
    if (alive == 0) return give_up(team, p, status);
    const auto wish = [&](int64_t i) {
      return active[i] == 0 ? 0.0 : preference ? preference[i] : 1.0 / static_cast<double>(n);
    };
    const double size = team.sum(n, [&](int64_t i) {
      const double a = p.gram[i * n + i];
      return active[i] != 0 && a > 0 ? sqrt(a) : 0.0;
    }) / static_cast<double>(n);
    const double unit = size > 0 ? 1 / size : 1.0;
    team.each(n, [&](int64_t i) {
      velocity[i] = 0;
      if (active[i] == 0) w[i] = 0;
    });
    for (int64_t step = 0; step < steps; ++step) {
      team.each(n, [&](int64_t i) {
        double s = 0;
        for (int64_t j = 0; j < n; ++j)
          if (active[j] != 0) s += p.gram[i * n + j] * unit * unit * (w[j] + lambda * wish(j));
        slope[i] = active[i] != 0 ? s : 0.0;
      });
      team.each(n, [&](int64_t i) {
        velocity[i] = momentum * velocity[i] + slope[i];
        w[i] -= lr * velocity[i];
      });
      project_on_simplex(team, active, n, w, held);
    }
    team.each(n, [&](int64_t i) { p.weights[i] = (w[i] + lambda * wish(i)) / (1 + lambda); });
    team.one([&] {
      *p.status = status;
      *p.residual = 0;
    });
  }
};

struct MoDo {
  double* state;  // w [B, T]
  double gamma;
  double rho;

  FLATMTL_HD static int64_t work(int64_t tasks) { return 3 * tasks; }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* active = scratch;    // [T]
    double* slope = active + n;  // [T]
    double* held = slope + n;    // [T]
    double* w = state + p.index * n;
    const int64_t alive = find_active_cross(team, p.gram, n, active);
    const int64_t status = activity_status(alive, n);
    if (alive == 0) return give_up(team, p, status);
    team.each(n, [&](int64_t i) {
      double s = rho * w[i];
      for (int64_t j = 0; j < n; ++j)
        if (active[j] != 0) s += p.gram[i * n + j] * w[j];
      slope[i] = active[i] != 0 ? s : 0.0;
    });
    team.each(n, [&](int64_t i) { w[i] = active[i] != 0 ? w[i] - gamma * slope[i] : 0.0; });
    project_on_simplex(team, active, n, w, held);
    team.each(n, [&](int64_t i) { p.weights[i] = w[i]; });
    team.one([&] {
      *p.status = status;
      *p.residual = 0;
    });
  }
};

}  // namespace flatmtl
