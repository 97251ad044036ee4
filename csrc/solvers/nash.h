// Nash-MTL (Navon et al., arXiv 2202.01017): alpha-fair weights with alpha = 1, computed at every
// `every`-th call and used again in between (the paper's update_weights_every), unless a task has
// no weight yet that has a gradient now.
//
// The state, [T + 1] a problem, lies on the device: the last good weights, then the number of
// calls. They are also what a solve that fails falls back to, as the official code does.
#pragma once

#include "alpha_fair.h"
#include "fixed.h"

namespace flatmtl {

struct Nash {
  double* last;  // [B, T + 1]
  int64_t every;
  double max_norm;  // of the update, at every call; 0: no bound
  double ridge;

  FLATMTL_HD static int64_t work(int64_t tasks) { return AlphaFair::work(tasks); }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    double* kept = last + p.index * (n + 1);
    const int64_t call = static_cast<int64_t>(kept[n]);
    double* inner = scratch + Opened::work(n);
    const Opened o = open(team, p, scratch, inner);
    if (o.status & kInvalidGram) return give_up(team, p, o.status);
    if (o.alive == 0) {
      give_up(team, p, o.status);
    } else if (call % every != 0 && !lacks_one(team, o, kept, n)) {
      reuse(team, p, o, kept, 0);
    } else {
      double error = 0;
      const int64_t bits = AlphaFair{1.0, nullptr, ridge}.solve(team, p, o, inner, &error);
      const bool good = (bits & kNotConverged) == 0;
      const double any = team.max(n, [&](int64_t i) { return kept[i]; });
      if (good || !(any > 0)) {
        conclude(team, p, o, bits, error);
        if (good) team.each(n, [&](int64_t i) { kept[i] = p.weights[i]; });
      } else {
        reuse(team, p, o, kept, bits | kFallback);
        team.one([&] { *p.residual = error; });
      }
    }
    const double limit = norm_limit(team, p.gram, p.weights, n, max_norm, inner);
    team.each(n, [&](int64_t i) { p.weights[i] *= limit; });
    team.one([&] { kept[n] = static_cast<double>(call + 1); });
  }

 private:
  // An active task without a kept weight (they are all positive): it was inactive at the last
  // solve, or there was none. It must not wait for the next one.
  template <class Team>
  FLATMTL_HD static bool lacks_one(Team& team, const Opened& o, const double* kept, int64_t n) {
    return team.max(n, [&](int64_t i) { return o.active[i] != 0 && !(kept[i] > 0) ? 1.0 : 0.0; }) !=
           0;
  }

  template <class Team>
  FLATMTL_HD static void reuse(Team& team, const Problem& p, const Opened& o, const double* kept,
                               int64_t bits) {
    team.each(p.tasks, [&](int64_t i) { p.weights[i] = o.active[i] != 0 ? kept[i] : 0.0; });
    team.one([&] {
      *p.status = o.status | bits;
      *p.residual = 0;
    });
  }
};

}  // namespace flatmtl
