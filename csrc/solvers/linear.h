// C y = p in the cosine form, for the methods that are one linear system: IMTL-G and ConFIG.
#pragma once

#include "problem.h"

namespace flatmtl {

// Doubles of scratch: the factor [T, T] and two columns.
FLATMTL_HD inline int64_t solve_cosine_work(int64_t tasks) { return tasks * tasks + 2 * tasks; }

// y: [T], 0 for inactive tasks; preference: [T] or null (ones). Raises the ridge until the matrix
// is positive definite. *residual: the backward error. Returns status bits.
template <class Team>
FLATMTL_HD int64_t solve_cosine(Team& team, const Opened& o, int64_t n, const double* preference,
                                double ridge, double* work, double* y, double* residual) {
  double* factor = work;
  double* column = factor + n * n;
  double* rest = column + n;
  const auto right = [&](int64_t i) {
    return o.active[i] == 0 ? 0.0 : preference ? preference[i] : 1.0;
  };
  return with_rising_ridge(team, o, n, ridge, [&](double) {
    team.each(n * n, [&](int64_t k) { factor[k] = o.cosine[k]; });
    if (!cholesky_factor(team, factor, n, 1e-14, column)) {
      team.one([&] { *residual = 1; });
      return false;
    }
    team.each(n, [&](int64_t i) { y[i] = 0; });
    // The solution and two steps of refinement, by the same lines.
    for (int64_t step = 0; step < 3; ++step) {
      team.each(n, [&](int64_t i) {
        double s = right(i);
        for (int64_t k = 0; k < n; ++k) s -= o.cosine[i * n + k] * y[k];
        rest[i] = s;
      });
      cholesky_solve(team, factor, n, n, rest);
      team.each(n, [&](int64_t i) { y[i] += rest[i]; });
    }
    team.each(n, [&](int64_t i) {
      double s = right(i), magnitude = fabs(s);
      for (int64_t k = 0; k < n; ++k) {
        const double term = o.cosine[i * n + k] * y[k];
        s -= term;
        magnitude += fabs(term);
      }
      rest[i] = backward_error(s, magnitude);
    });
    const double error = team.max(n, [&](int64_t i) { return rest[i]; });
    team.one([&] { *residual = error; });
    return error <= kTolerance;
  });
}

}  // namespace flatmtl
