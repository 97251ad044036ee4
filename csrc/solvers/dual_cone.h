// UPGrad and DualProj (Quinton and Rey, arXiv 2406.16232): projections on the dual cone of the task
// gradients, so that the update conflicts with none of them.
//
//   DualProj:  argmin v'Gv, v >= u            the projection of the preferred combination u
//   UPGrad:    sum_i argmin v'Gv, v >= u_i e_i  the sum of the projections of u_i g_i
//
// With z = v - u and y = n z it is a non-negative QP in the cosine form, C y >= -C (n u).
//
// UPGrad's T programmes know nothing of each other: part() solves one of them, and add_up() adds
// their answers in the order of the tasks, so that a device may solve them side by side with the
// bits of one after the other.
#pragma once

#include "nnqp.h"
#include "problem.h"

namespace flatmtl {

struct DualCone {
  const double* preference;  // u [T], or null: 1/T
  bool each;                 // UPGrad
  double ridge;

  // opened, nnqp's, b, y, u (in norms) and total
  FLATMTL_HD static int64_t work(int64_t tasks) {
    return Opened::work(tasks) + nnqp_work(tasks) + 4 * tasks;
  }

  // What part() leaves: y [T], status bits, residual.
  FLATMTL_HD static int64_t part_size(int64_t tasks) { return tasks + 2; }
  FLATMTL_HD int64_t parts(int64_t tasks) const { return each ? tasks : 1; }

  template <class Team>
  FLATMTL_HD void operator()(Team& team, const Problem& p, double* scratch) const {
    const Begun s = begin(team, p, scratch);
    if (!solvable(s.o)) return give_up(team, p, s.o.status);
    team.each(p.tasks, [&](int64_t i) { s.total[i] = 0; });
    int64_t bits = 0;
    double worst = 0;
    for (int64_t i = 0; i < parts(p.tasks); ++i) {
      if (!wanted(s, i)) continue;
      bits |= solve_part(team, p, s, i, s.y, p.residual);
      worst = larger(worst, *p.residual);
      team.each(p.tasks, [&](int64_t k) { s.total[k] += factor(s, i) * s.y[k]; });
    }
    end(team, p, s, bits, worst);
  }

  // Programme i alone, 0 <= i < parts(T). out: [part_size(T)].
  template <class Team>
  FLATMTL_HD void part(Team& team, const Problem& p, double* scratch, int64_t i,
                       double* out) const {
    const Begun s = begin(team, p, scratch);
    if (!solvable(s.o) || !wanted(s, i)) return;
    const int64_t bits = solve_part(team, p, s, i, out, out + p.tasks + 1);
    team.one([&] { out[p.tasks] = static_cast<double>(bits); });
  }

  // The weights, from what every part() has left. outs: [parts(T), part_size(T)].
  template <class Team>
  FLATMTL_HD void add_up(Team& team, const Problem& p, double* scratch, const double* outs) const {
    const int64_t n = p.tasks, size = part_size(n);
    const Begun s = begin(team, p, scratch);
    if (!solvable(s.o)) return give_up(team, p, s.o.status);
    int64_t bits = 0;
    double worst = 0;
    for (int64_t i = 0; i < parts(n); ++i) {
      if (!wanted(s, i)) continue;
      bits |= static_cast<int64_t>(outs[i * size + n]);
      worst = larger(worst, outs[i * size + n + 1]);
    }
    team.each(n, [&](int64_t k) {
      double total = 0;
      for (int64_t i = 0; i < parts(n); ++i)
        if (wanted(s, i)) total += factor(s, i) * outs[i * size + k];
      s.total[k] = total;
    });
    end(team, p, s, bits, worst);
  }

 private:
  struct Begun {
    Opened o;
    double top;     // the largest norm: with norms relative to it tiny and huge gradients are alike
    double* b;      // [T]
    double* y;      // [T]
    double* start;  // [T] n_i u_i
    double* total;  // [T] n_i (w_i - u_i)
    double* inner;  // nnqp's
  };

  FLATMTL_HD static double larger(double worst, double error) {
    return error > worst || !(error <= worst) ? error : worst;
  }

  template <class Team>
  FLATMTL_HD Begun begin(Team& team, const Problem& p, double* scratch) const {
    const int64_t n = p.tasks;
    Begun s;
    s.b = scratch + Opened::work(n);
    s.y = s.b + n;
    s.start = s.y + n;
    s.total = s.start + n;
    s.inner = s.total + n;
    s.o = open(team, p, scratch, s.inner);
    s.top = team.max(n, [&](int64_t i) { return s.o.norm[i]; });
    team.each(n, [&](int64_t i) {
      s.start[i] =
          s.o.norm[i] / s.top * (preference ? preference[i] : 1.0 / static_cast<double>(n));
    });
    return s;
  }

  // Whether programme i has anything to solve, and what its answer counts.
  FLATMTL_HD bool wanted(const Begun& s, int64_t i) const {
    return !each || (s.o.active[i] != 0 && s.start[i] > 0);
  }
  FLATMTL_HD double factor(const Begun& s, int64_t i) const { return each ? s.start[i] : 1.0; }

  // y, *residual <- programme i; returns status bits.
  template <class Team>
  FLATMTL_HD int64_t solve_part(Team& team, const Problem& p, const Begun& s, int64_t i, double* y,
                                double* residual) const {
    const int64_t n = p.tasks;
    return with_rising_ridge(team, s.o, n, ridge, [&](double) {
      team.each(n, [&](int64_t j) {
        if (each) {
          s.b[j] = -s.o.cosine[j * n + i];
          return;
        }
        double sum = 0;
        for (int64_t k = 0; k < n; ++k) sum -= s.o.cosine[j * n + k] * s.start[k];
        s.b[j] = sum;
      });
      return nnqp(team, s.o.cosine, s.b, s.o.active, n, s.inner, y, residual);
    });
  }

  template <class Team>
  FLATMTL_HD void end(Team& team, const Problem& p, const Begun& s, int64_t bits,
                      double worst) const {
    team.each(p.tasks, [&](int64_t i) {
      p.weights[i] = s.o.active[i] != 0 ? (s.start[i] + s.total[i]) * s.top / s.o.norm[i] : 0.0;
    });
    conclude(team, p, s.o, bits, worst);
  }
};

}  // namespace flatmtl
