// What every solver begins and ends with: one Gram matrix in, weights, status and residual out.
//
// A method is a struct with its options and
//
//   static int64_t work(int64_t tasks)                           doubles of scratch
//   void operator()(Team&, const Problem&, double* scratch)      solves one problem
//
// so that the CPU, the CUDA and the test bodies all run it through one loop over a batch.
#pragma once

#include "cholesky.h"
#include "cosine.h"
#include "residual.h"

namespace flatmtl {

struct Problem {
  const double* gram;  // [T, T]
  int64_t tasks;       // T
  double* weights;     // [T]
  int64_t* status;     // one word
  double* residual;    // one number
  int64_t index;       // in the batch: where a method's state lies
};

// A Gram matrix opened for solving.
struct Opened {
  double* active;        // [T] 1 or 0
  double* norm;          // [T] n_i, 0 for an inactive task
  double* inverse_norm;  // [T] 1 / n_i, 0 for an inactive task
  double* cosine;        // [T, T] symmetric, 1 + ridge on the diagonal
  int64_t alive;         // active tasks
  int64_t status;

  // Doubles of scratch that open() takes.
  FLATMTL_HD static int64_t work(int64_t tasks) { return tasks * tasks + 3 * tasks; }
};

// Symmetric and positive semi-definite, up to what rounding may do to a Gram matrix. Within the
// active tasks; cosine: without a ridge. factor: [T, T + 1] scratch.
template <class Team>
FLATMTL_HD bool is_gram(Team& team, const Problem& p, const Opened& o, double* factor) {
  constexpr double kAsymmetry = 1e-4, kIndefinite = 1e-2;
  const int64_t n = p.tasks;
  double* worst = factor + n * n;  // [T]
  team.each(n, [&](int64_t i) {
    bool ok = !(p.gram[i * n + i] < 0);
    for (int64_t j = 0; j < n; ++j) {
      if (o.active[i] == 0 || o.active[j] == 0) continue;
      const double a = p.gram[i * n + j] * o.inverse_norm[i] * o.inverse_norm[j];
      const double b = p.gram[j * n + i] * o.inverse_norm[j] * o.inverse_norm[i];
      ok = ok && fabs(a - b) <= kAsymmetry && fabs(a) <= 1 + kIndefinite;
    }
    worst[i] = ok ? 0.0 : 1.0;
  });
  const bool plausible = team.max(n, [&](int64_t i) { return worst[i]; }) == 0;
  team.each2(n, n, [&](int64_t i, int64_t j) {
    factor[i * n + j] = o.cosine[i * n + j] + (i == j ? kIndefinite : 0.0);
  });
  return plausible && cholesky_factor(team, factor, n, 0.0, worst);
}

// Activity, norms and cosine form, carved from `work`, and whether this is a Gram matrix at all.
// scratch: [T, T + 1] doubles that nobody needs yet.
template <class Team>
FLATMTL_HD Opened open(Team& team, const Problem& p, double* work, double* scratch) {
  const int64_t n = p.tasks;
  Opened o;
  o.cosine = work;
  o.active = o.cosine + n * n;
  o.norm = o.active + n;
  o.inverse_norm = o.norm + n;
  o.alive = find_active(team, p.gram, n, o.active, o.norm);
  cosine_form(team, p.gram, o.active, n, o.norm, o.inverse_norm, o.cosine);
  o.status = activity_status(o.alive, n);
  if (!is_gram(team, p, o, scratch)) o.status |= kInvalidGram;
  return o;
}

FLATMTL_HD inline bool solvable(const Opened& o) {
  return o.alive > 0 && (o.status & kInvalidGram) == 0;
}

template <class Team>
FLATMTL_HD void set_ridge(Team& team, const Opened& o, int64_t tasks, double ridge) {
  team.each(tasks, [&](int64_t i) { o.cosine[i * tasks + i] = 1 + ridge; });
}

// The largest ridge that is tried: above the noise of a Gram matrix of float32 products.
constexpr double kLargestRidge = 1e-6;

// Runs attempt(ridge) -> bool until it says that its result is sound, with a ridge that grows a
// hundredfold up to kLargestRidge. A Gram matrix of rounded products can be indefinite by more than
// a small ridge (about 1e-7 in the cosine form for float32 products). Returns status bits.
template <class Team, class F>
FLATMTL_HD int64_t with_rising_ridge(Team& team, const Opened& o, int64_t tasks, double ridge,
                                     F attempt) {
  int64_t bits = 0;
  while (true) {
    set_ridge(team, o, tasks, ridge);
    if (attempt(ridge)) return bits;
    if (ridge >= kLargestRidge) return bits | kNotConverged;
    ridge = ridge > 1e-12 ? 100 * ridge : 1e-10;
    if (ridge > kLargestRidge) ridge = kLargestRidge;
    bits |= kRidgeRaised;
  }
}

// Weights 0, for a problem that has no solution to look for.
template <class Team>
FLATMTL_HD void give_up(Team& team, const Problem& p, int64_t status) {
  team.each(p.tasks, [&](int64_t i) { p.weights[i] = 0; });
  team.one([&] {
    *p.status = status;
    *p.residual = 0;
  });
}

// Equal contributions, w_i = (1/n_i) / sum_j (1/n_j): what a solve that failed falls back to.
template <class Team>
FLATMTL_HD void equal_contributions(Team& team, const Problem& p, const Opened& o) {
  const double top = team.max(p.tasks, [&](int64_t i) { return o.inverse_norm[i]; });
  const double total = team.sum(p.tasks, [&](int64_t i) { return o.inverse_norm[i] / top; });
  team.each(p.tasks, [&](int64_t i) { p.weights[i] = o.inverse_norm[i] / top / total; });
}

// The end of a solve whose weights are written: judges the residual, falls back if they are of no
// use. bits: what the solve has found so far.
template <class Team>
FLATMTL_HD void conclude(Team& team, const Problem& p, const Opened& o, int64_t bits,
                         double residual) {
  const double broken =
      team.max(p.tasks, [&](int64_t i) { return is_finite(p.weights[i]) ? 0.0 : 1.0; });
  if (!(residual <= kTolerance)) bits |= kNotConverged;
  if (broken != 0 || !(residual <= kUseless)) {
    bits |= kNotConverged | kFallback;
    equal_contributions(team, p, o);
  }
  team.one([&] {
    *p.status = o.status | bits;
    *p.residual = residual;
  });
}

}  // namespace flatmtl
