// Weights that do not depend on the gradients (Mean, Sum, Constant, random ones), for the active
// tasks; and the scaling of any weights.
#pragma once

#include "problem.h"

namespace flatmtl {

struct Constant {
  const double* preference;  // [T], or null: `value` for all
  double value;

  FLATMTL_HD static int64_t work(int64_t tasks) { return 2 * tasks; }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    const int64_t alive = find_active(team, p.gram, n, scratch, scratch + n);
    team.each(n, [&](int64_t i) {
      p.weights[i] = scratch[i] == 0 ? 0.0 : preference ? preference[i] : value;
    });
    team.one([&] {
      *p.status = activity_status(alive, n);
      *p.residual = 0;
    });
  }
};

// Random loss weighting (Lin et al., arXiv 2111.10603): the softmax of normal numbers [B, T].
struct Softmax {
  const double* normal;

  FLATMTL_HD static int64_t work(int64_t tasks) { return 2 * tasks; }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    const double* z = normal + p.index * n;
    const int64_t alive = find_active(team, p.gram, n, scratch, scratch + n);
    const double top = team.max(n, [&](int64_t i) { return z[i]; });
    const double total = team.sum(n, [&](int64_t i) { return exp(z[i] - top); });
    team.each(n,
              [&](int64_t i) { p.weights[i] = scratch[i] == 0 ? 0.0 : exp(z[i] - top) / total; });
    team.one([&] {
      *p.status = activity_status(alive, n);
      *p.residual = 0;
    });
  }
};

// At most max_norm (if above 0) for ||d|| = sqrt(w'Gw): the factor that w needs. Rows without
// weight are not read: they may hold NaN. scratch: [T].
template <class Team>
FLATMTL_HD double norm_limit(Team& team, const double* gram, const double* w, int64_t n,
                             double max_norm, double* scratch) {
  if (!(max_norm > 0)) return 1;
  team.each(n, [&](int64_t i) {
    double s = 0;
    for (int64_t j = 0; w[i] != 0 && j < n; ++j)
      if (w[j] != 0) s += gram[i * n + j] * w[j];
    scratch[i] = w[i] * s;
  });
  const double square = team.sum(n, [&](int64_t i) { return scratch[i]; });
  const double length = square > 0 ? sqrt(square) : 0.0;
  return length > max_norm ? max_norm / length : 1.0;
}

// given: [B, T]. scaling 0: as they are, 1: sum to one, 2: sum to T; then at most max_norm (if
// above 0) for ||d|| = sqrt(w'Gw). A sum that is not positive is replaced by the sum of the
// magnitudes.
struct Scale {
  const double* given;
  int64_t scaling;
  double max_norm;

  FLATMTL_HD static int64_t work(int64_t tasks) { return tasks; }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    const double* w = given + p.index * n;
    double factor = 1;
    if (scaling != 0) {
      const double sum = team.sum(n, [&](int64_t i) { return w[i]; });
      const double magnitude = team.sum(n, [&](int64_t i) { return fabs(w[i]); });
      const double target = scaling == 1 ? 1.0 : static_cast<double>(n);
      if (magnitude > 0) factor = target / (sum > 1e-12 * magnitude ? sum : magnitude);
    }
    team.each(n, [&](int64_t i) { p.weights[i] = w[i] * factor; });
    const double limit = norm_limit(team, p.gram, p.weights, n, max_norm, scratch);
    team.each(n, [&](int64_t i) { p.weights[i] *= limit; });
    team.one([&] {
      *p.status = 0;
      *p.residual = 0;
    });
  }
};

}  // namespace flatmtl
