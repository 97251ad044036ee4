// CAGrad (Liu et al., arXiv 2110.14048):  max_d min_i <g_i, d>  subject to  ||d - g0|| <= c ||g0||,
// g0 the mean gradient.
//
// For a given value t of the inner minimum, the nearest d to g0 with <g_i, d> >= t is
// g0 + sum_i x_i g_i, where  G x + b >= t,  x >= 0, complementary, b = G 1 / T:  a non-negative QP.
// Its distance psi(t) = ||x||_G grows from 0 at t = min b, convexly, and the solution is where it
// is K = c ||g0||. On a fixed support psi^2 is a parabola in t, so that one step from the right
// support is exact: a handful of QPs, no tolerance.
//
// Norms are taken relative to the largest, y = n x, u = 1/n:  C y >= t u - beta.
#pragma once

#include "nnqp.h"
#include "problem.h"

namespace flatmtl {

struct Cagrad {
  double c;
  int64_t rescale;  // 0: none, 1: / (1 + c^2), 2: / (1 + c)
  double ridge;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + nnqp_work(tasks) + 6 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* u = scratch + Opened::work(n);  // [T] 1 / n_i
    double* beta = u + n;                   // [T] <g_i, g0> / n_i
    double* right = beta + n;               // [T] t u - beta
    double* y = right + n;                  // [T]
    double* row = y + n;                    // [T]
    double* held = row + n;                 // [T] the support of the last round
    double* inner = held + n;
    const Opened o = open(team, p, scratch, inner);
    if (!solvable(o)) return give_up(team, p, o.status);
    const double tasks = static_cast<double>(n);

    const double top = team.max(n, [&](int64_t i) { return o.norm[i]; });
    team.each(n, [&](int64_t i) {
      double s = 0;
      for (int64_t j = 0; j < n; ++j) s += o.cosine[i * n + j] * (o.norm[j] / top);
      beta[i] = o.active[i] != 0 ? s / tasks : 0.0;
      u[i] = o.active[i] != 0 ? top / o.norm[i] : 0.0;
    });
    const double sum_norm = team.sum(n, [&](int64_t i) { return o.norm[i] / top; });
    const double mean_square =
        team.sum(n, [&](int64_t i) { return o.norm[i] / top * beta[i]; }) / tasks;
    const double radius = mean_square > 0 ? c * sqrt(mean_square) : 0.0;  // K
    const double factor = rescale == 1 ? 1 / (1 + c * c) : rescale == 2 ? 1 / (1 + c) : 1.0;

    int64_t bits = 0;
    team.one([&] { *p.residual = 0; });
    if (radius > 1e-8 * sum_norm / tasks) {  // below, ||g0|| is the rounding of G
      bits = with_rising_ridge(team, o, n, ridge, [&](double used) {
        return search(team, p, o, radius, used, u, beta, right, y, row, held, inner);
      });
      // The combination sum_i x_i g_i, without the ridge, against the lengths it is made of. Next
      // to nothing: the gradients cancel, the point is Pareto-stationary.
      const double square = team.sum(n, [&](int64_t i) {
        double s = 0;
        for (int64_t j = 0; j < n; ++j) s += (i == j ? 1.0 : o.cosine[i * n + j]) * y[j];
        return y[i] * s;
      });
      const double least = 1e-6 * team.sum(n, [&](int64_t i) { return y[i]; });
      if (square < least * least) {
        bits = kFallback;
        team.each(n, [&](int64_t i) { y[i] = 0; });
        team.one([&] { *p.residual = 0; });
      }
    } else {
      team.each(n, [&](int64_t i) { y[i] = 0; });
    }
    team.each(n, [&](int64_t i) {
      p.weights[i] = o.active[i] != 0 ? (1 / tasks + y[i] * u[i]) * factor : 0.0;
    });
    conclude(team, p, o, bits, *p.residual);
  }

 private:
  static constexpr double kHuge = 1e300;

  // psi(t) = radius. y: the solution; *p.residual: its residual. True if sound.
  template <class Team>
  FLATMTL_HD static bool search(Team& team, const Problem& p, const Opened& o, double radius,
                                double ridge, const double* u, const double* beta, double* right,
                                double* y, double* row, double* held, double* inner) {
    const int64_t n = p.tasks;
    // t lies between min b, where psi = 0, and min (b + K n), which Cauchy and Schwarz allow.
    const double reach = radius * sqrt(1 + ridge);
    double low =
        -team.max(n, [&](int64_t i) { return o.active[i] != 0 ? -beta[i] / u[i] : -kHuge; });
    double high = -team.max(
        n, [&](int64_t i) { return o.active[i] != 0 ? -(beta[i] + reach) / u[i] : -kHuge; });
    double t = high;
    team.each(n, [&](int64_t i) { held[i] = -1; });
    int64_t unchanged = 0;
    bool exact = false;  // t came from the parabola of the last support
    for (int round = 0; round < 60; ++round) {
      team.each(n, [&](int64_t i) { right[i] = t * u[i] - beta[i]; });
      const bool sound = nnqp(team, o.cosine, right, o.active, n, inner, y, p.residual, round > 0);
      const double equations = *p.residual;
      if (!sound) return false;
      const double square = team.sum(n, [&](int64_t i) {
        double s = 0;
        for (int64_t j = 0; j < n; ++j) s += o.cosine[i * n + j] * y[j];
        return y[i] * s;
      });
      const double magnitude = team.sum(n, [&](int64_t i) {
        double s = 0;
        for (int64_t j = 0; j < n; ++j) s += fabs(o.cosine[i * n + j]) * y[j];
        return y[i] * s;
      });
      const double slope = team.sum(n, [&](int64_t i) { return y[i] * u[i]; });
      const double target = radius * radius, excess = square - target;
      const double gap = backward_error(excess, magnitude + target);
      team.one([&] { *p.residual = gap > equations ? gap : equations; });
      // The step from the right support is exact; a second one takes out the first one's rounding.
      const bool same = exact && team.max(n, [&](int64_t i) {
        return (y[i] > 0) == (held[i] > 0) ? 0.0 : 1.0;
      }) == 0;
      unchanged = same ? unchanged + 1 : 0;
      team.each(n, [&](int64_t i) { held[i] = y[i] > 0 ? 1.0 : 0.0; });
      if (unchanged >= 3 || (unchanged >= 1 && fabs(excess) <= 1e-13 * target)) break;
      if (square > target)
        high = t;
      else
        low = t;
      const double curvature = nnqp_form(team, u, n, inner, row);
      // psi^2(t + s) = psi^2 + 2 slope s + curvature s^2 on this support: the root of larger t
      const double under = slope * slope - curvature * excess;
      double next = under >= 0 ? t - excess / (slope + sqrt(under)) : t;
      exact = next > low && next < high;
      if (!exact) {
        // Newton's step on psi: from either side it lands at or above the solution.
        const double distance = sqrt(square);
        next = t - (distance - radius) * distance / slope;
      }
      if (!(next > low && next < high)) next = 0.5 * (low + high);
      if (!(next > low && next < high)) break;  // the bracket is down to neighbouring numbers
      t = next;
    }
    return *p.residual <= kTolerance;
  }
};

}  // namespace flatmtl
