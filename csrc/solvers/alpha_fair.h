// Alpha-fair weights, the equation behind Nash-MTL (alpha = 1; Navon et al., arXiv 2202.01017),
// FairGrad (Ban and Ji, arXiv 2402.15638) and PIVRG (alpha = 2 with preferences):
//
//   (G w)_i = (c_i / w_i)^(1/alpha),  w > 0,
//
// the optimality condition of a strictly convex problem. In the cosine form, y = n w:
//
//   (C y)_i = kappa_i y_i^(-1/alpha),   alpha log kappa_i = log c_i + (1 - alpha) log n_i =: l_i,
//
// so that for alpha = 1 the norms do not matter at all. Primal-dual Newton on
//   log y + alpha log r = l,   C y = r,
// with steps that keep y and r positive; 5 iterations on ordinary problems, about 15 on wide
// scales.
#pragma once

#include "problem.h"

namespace flatmtl {

struct AlphaFair {
  double alpha;              // above 0, at most 5: beyond, weights span more than float64 does
  const double* preference;  // c [T], positive, or null: ones
  double ridge;

  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + tasks * tasks + 7 * tasks;
  }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const Opened o = open(team, p, scratch, scratch + Opened::work(p.tasks));
    if (!solvable(o)) return give_up(team, p, o.status);
    double error = 0;
    const int64_t bits = solve(team, p, o, scratch + Opened::work(p.tasks), &error);
    conclude(team, p, o, bits, error);
  }

  // Writes the weights; *error: the residual. Returns status bits.
  template <class Team>
  FLATMTL_HD int64_t solve(Team& team, const Problem& p, const Opened& o, double* scratch,
                           double* error) const {
    const int64_t n = p.tasks;
    double* log_kappa = scratch;  // [T] l_i, its mean removed
    double* y = log_kappa + n;    // [T]
    double* inner = y + n;        // newton's
    team.each(n, [&](int64_t i) {
      log_kappa[i] = o.active[i] != 0
                         ? (preference ? log(preference[i]) : 0.0) + (1 - alpha) * log(o.norm[i])
                         : 0.0;
    });
    const double mean =
        team.sum(n, [&](int64_t i) { return log_kappa[i]; }) / static_cast<double>(o.alive);
    team.each(n, [&](int64_t i) {
      if (o.active[i] != 0) log_kappa[i] -= mean;
    });
    // Wide scales are approached in stages, from l = 0, where the norms do not matter. y and r go
    // with exp(l / (1 + alpha)): one stage for every factor e of them, and every exp(4) of l, so
    // that ordinary problems have one or two.
    const double spread = team.max(n, [&](int64_t i) { return fabs(log_kappa[i]); });
    const int stages = 1 + static_cast<int>(spread / (alpha < 3 ? 1 + alpha : 4));
    const int64_t bits = with_rising_ridge(team, o, n, ridge, [&](double) {
      for (int stage = 1; stage <= stages; ++stage)
        *error = newton(team, o, n, log_kappa, stage, stages, y, inner);
      return *error <= kTolerance;
    });
    const double unit = exp(mean / (1 + alpha));  // undoes the removed mean
    team.each(n, [&](int64_t i) { p.weights[i] = y[i] * unit * o.inverse_norm[i]; });
    return bits;
  }

 private:
  // Solves for l * stage / stages. y: [T], of the stage before, then of this one; 0 for inactive
  // tasks. inner: [T, T + 5]. Returns the residual.
  template <class Team>
  FLATMTL_HD double newton(Team& team, const Opened& o, int64_t n, const double* log_kappa,
                           int stage, int stages, double* y, double* inner) const {
    double* factor = inner;       // [T, T]
    double* r = factor + n * n;   // [T] C y, as the iteration has it
    double* step_y = r + n;       // [T]
    double* step_r = step_y + n;  // [T]
    double* column = step_r + n;  // [T]
    double* gap = column + n;     // [T] C y - r
    const double inverse = 1 / alpha;
    const double share = static_cast<double>(stage) / stages;
    const auto on = [&](int64_t i) { return o.active[i] != 0; };
    const auto goal = [&](int64_t i) { return exp(inverse * (share * log_kappa[i] - log(y[i]))); };

    // What solves the problem without its off-diagonal, moved along from stage to stage; then the
    // best multiple of it.
    team.each(n, [&](int64_t i) {
      const double moved = exp(log_kappa[i] / stages / (1 + alpha));
      y[i] = !on(i) ? 0.0 : stage == 1 ? moved : y[i] * moved;
    });
    team.each(n, [&](int64_t i) {
      double s = 0;
      for (int64_t j = 0; j < n; ++j) s += o.cosine[i * n + j] * y[j];
      gap[i] = s;
      r[i] = on(i) ? goal(i) : 0.0;
    });
    const double square = team.sum(n, [&](int64_t i) { return y[i] * gap[i]; });
    const double wanted = team.sum(n, [&](int64_t i) { return y[i] * r[i]; });
    if (square > 1e-12 * wanted) {
      const double multiple = exp(log(wanted / square) * alpha / (1 + alpha));
      team.each(n, [&](int64_t i) {
        y[i] *= multiple;
        if (on(i)) r[i] = goal(i);
      });
    }

    double error = 1, before = 1e300;
    for (int iteration = 0; iteration < 64; ++iteration) {
      // residual of the equations themselves: C y = kappa y^(-1/alpha)
      team.each(n, [&](int64_t i) {
        if (!on(i)) {
          step_y[i] = column[i] = gap[i] = 0;
          return;
        }
        double s = 0, magnitude = 0;
        for (int64_t j = 0; j < n; ++j) {
          const double term = o.cosine[i * n + j] * y[j];
          s += term;
          magnitude += fabs(term);
        }
        const double wanted_r = goal(i);
        gap[i] = s - r[i];
        step_y[i] = backward_error(s - wanted_r, wanted_r);              // in the plain sense
        column[i] = backward_error(s - wanted_r, magnitude + wanted_r);  // against its rounding
      });
      const double plain = team.max(n, [&](int64_t i) { return step_y[i]; });
      error = team.max(n, [&](int64_t i) { return column[i]; });
      // done, at the end of what rounding allows, or lost
      const bool stalled = error <= 1e-13 && plain > 0.5 * before;
      if (plain <= (stage < stages ? 1e-3 : 1e-13) || stalled || !(error <= 1)) break;
      before = plain;

      // diag(y) (C + diag(r / (alpha y))) diag(y), and its right-hand side
      team.each2(n, n, [&](int64_t i, int64_t j) {
        const double own = on(i) ? inverse * r[i] * y[i] : 1.0;
        factor[i * n + j] = y[i] * o.cosine[i * n + j] * y[j] + (i == j ? own : 0.0);
      });
      team.each(n, [&](int64_t i) {
        const double first = on(i) ? log(y[i]) + alpha * log(r[i]) - share * log_kappa[i] : 0.0;
        step_y[i] = y[i] * (-inverse * r[i] * first - gap[i]);
      });
      if (!cholesky_factor(team, factor, n, 0.0, column)) return 1;
      cholesky_solve(team, factor, n, n, step_y);
      team.each(n, [&](int64_t i) { step_y[i] *= y[i]; });
      team.each(n, [&](int64_t i) {
        double s = gap[i];
        for (int64_t j = 0; j < n; ++j) s += o.cosine[i * n + j] * step_y[j];
        step_r[i] = s;
        // how far this task's y or r would fall: 1 / (the step that takes it to zero)
        const double fall_y = on(i) ? -step_y[i] / y[i] : 0.0, fall_r = on(i) ? -s / r[i] : 0.0;
        column[i] = fall_y > fall_r ? fall_y : fall_r;
      });
      const double fall = team.max(n, [&](int64_t i) { return column[i]; });
      const double length = fall > 0.9 ? 0.9 / fall : 1.0;
      team.each(n, [&](int64_t i) {
        if (!on(i)) return;
        y[i] += length * step_y[i];
        r[i] += length * step_r[i];
      });
    }
    return error;
  }
};

}  // namespace flatmtl
